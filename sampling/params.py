"""What a request may ask of the sampler, checked when it is made."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, cast

from ..errors import RequestError
from .strict import refuse_names, refuse_unknown

if TYPE_CHECKING:
    from torch import Tensor

LogitsProcessor = Callable[[Sequence[int], "Tensor"], "Tensor"]
"""``(output token ids so far, logits fp32 [V]) -> logits fp32 [V]``: a pure function."""

MIN_TEMPERATURE = 1e-5
MAX_TEMPERATURE = 1e5
MAX_CHOICES = 2**14
_INT64 = (-(2**63), 2**63 - 1)


@refuse_unknown
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request is sampled. Names and meanings are vLLM's.

    Objects hash, and pickle where their logits processors do.

    n:              choices for one prompt, at most 16384; each has noise of its own
    temperature:    0 = greedy (the highest logit, lowest id on ties), else 1e-5 … 1e5
    top_p:          keep the smallest set of likeliest tokens whose mass reaches it; 1 = off
    top_k:          keep that many likeliest tokens; 0 or -1 = off
    min_p:          keep tokens at least this fraction as likely as the likeliest; 0 = off
    seed:           an int64, or None for the engine's ``sampling_seed``
    max_tokens:     at most this many tokens; None = up to the context length; 0 = none, only the
                    prompt is scored, which needs ``prompt_logprobs`` and ``n=1``
    min_tokens:     EOS, stop tokens and stop strings cannot end the output before this many
    stop:           a string or several; given out as a tuple without repeats
    stop_token_ids: token ids that end the output; given out as a tuple
    ignore_eos:     generate on after EOS
    logprobs:       per output token, report this many likeliest tokens and always the sampled
                    one; 0 = only the sampled one; None = none
    prompt_logprobs: the same for the prompt's tokens
    presence_penalty, frequency_penalty: -2 … 2, over the output's tokens
    repetition_penalty: 0.01 … 100, over the prompt's and the output's tokens; 1 = off
    logit_bias:     token id -> -100 … 100, added to the logits; given out as sorted pairs
    logits_processors: functions ``(output token ids so far, logits fp32 [V]) -> logits fp32 [V]``,
                    applied in order to the model's own logits, before all else. Each gets a copy
                    of its row alone. They must be pure: equal arguments give equal bits, and
                    nothing else is read or changed; no fingerprint covers them. Compared and
                    hashed by identity; given out as a tuple
    skip_special_tokens: leave special tokens out of the text
    include_stop_str_in_output: keep the stop string (or stop token) in the text

    :raises RequestError: for a value of the wrong type or out of range.
    :raises UnknownParameterError: for a name that does not exist.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]] | None = None
    logits_processors: Sequence[LogitsProcessor] | None = ()
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        for name, value in _checked(self).items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> SamplingParams:
        """Build from parsed JSON, as the OpenAI API spells it.

        ``null`` stands for the default, except ``max_tokens: null``, which means up to the context
        length. ``logit_bias`` may have its token ids as strings, as JSON's keys must be.
        ``logits_processors`` are refused: JSON holds no functions.
        """
        refuse_names(cls.__name__, mapping, [f.name for f in fields(cls)])
        values = {k: v for k, v in mapping.items() if v is not None or k == "max_tokens"}
        if values.get("logits_processors"):
            raise _wrong(
                "logits_processors",
                "nothing, as JSON holds no functions",
                values["logits_processors"],
                "Pass functions to SamplingParams in Python, or use logit_bias.",
            )
        if isinstance(values.get("logit_bias"), Mapping):
            values["logit_bias"] = {_id_key(k): v for k, v in values["logit_bias"].items()}
        return cls(**values)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` with the type that it has once checked."""
        return tuple(self.stop or ())

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """``stop_token_ids`` with the type that it has once checked."""
        return tuple(self.stop_token_ids or ())

    @property
    def bias_pairs(self) -> tuple[tuple[int, float], ...]:
        """``logit_bias`` as (token id, bias) in ascending id; empty where there is none."""
        return cast("tuple[tuple[int, float], ...]", self.logit_bias or ())

    @property
    def processors(self) -> tuple[LogitsProcessor, ...]:
        """``logits_processors`` with the type that it has once checked."""
        return tuple(self.logits_processors or ())

    @property
    def scores_only(self) -> bool:
        """Whether no token is to be sampled: only the prompt is scored."""
        return self.max_tokens == 0

    def check_vocabulary(self, vocab_size: int, eos_token_ids: Collection[int] = ()) -> None:
        """Check what only the model knows; called when a request is submitted.

        :raises RequestError: for a token id or a number of logprobs beyond the vocabulary, or a
            ``min_tokens`` that leaves no token to sample.
        """
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None and value > vocab_size:
                raise _wrong(
                    name, f"at most the vocabulary's {vocab_size}", value, "Ask for fewer."
                )
        biased = tuple(token_id for token_id, _ in self.bias_pairs)
        for name, ids in (("stop_token_ids", self.stop_ids), ("logit_bias", biased)):
            for token_id in ids:
                if token_id >= vocab_size:
                    raise _wrong(
                        name,
                        f"token ids below the vocabulary's {vocab_size}",
                        token_id,
                        "Use the ids of this model's tokenizer.",
                    )
        ending = {*self.stop_ids, *(() if self.ignore_eos else eos_token_ids)}
        if self.min_tokens and len(ending) == vocab_size:
            wanted = "0 where every token of the vocabulary ends the output"
            raise _wrong("min_tokens", wanted, self.min_tokens, "Stop at fewer tokens.")


def _checked(p: SamplingParams) -> dict[str, object]:
    """Every field of ``p`` in its final form; raises where one is wrong."""
    limit = _max_tokens(p)
    least = _integer("min_tokens", p.min_tokens, 0)
    if limit is not None and least > limit:
        raise _wrong("min_tokens", f"at most max_tokens = {limit}", least, "Raise max_tokens.")
    checked: dict[str, object] = {
        "n": _integer("n", p.n, 1, MAX_CHOICES),
        "temperature": _temperature(p.temperature),
        "top_p": _top_p(p.top_p),
        "top_k": _integer("top_k", p.top_k, -1, remedy="Use 0 or -1 for no limit."),
        "min_p": _real("min_p", p.min_p, 0.0, 1.0),
        "seed": None if p.seed is None else _integer("seed", p.seed, *_INT64),
        "max_tokens": limit,
        "min_tokens": least,
        "stop": _stop(p.stop),
        "stop_token_ids": _ids("stop_token_ids", p.stop_token_ids),
        "presence_penalty": _real("presence_penalty", p.presence_penalty, -2.0, 2.0),
        "frequency_penalty": _real("frequency_penalty", p.frequency_penalty, -2.0, 2.0),
        "repetition_penalty": _real("repetition_penalty", p.repetition_penalty, 0.01, 100.0),
        "logit_bias": _bias(p.logit_bias),
        "logits_processors": _processors(p.logits_processors),
    }
    for name in ("logprobs", "prompt_logprobs"):
        value = getattr(p, name)
        remedy = "Use 0 for the token's own logprob, None for none."
        checked[name] = None if value is None else _integer(name, value, 0, remedy=remedy)
    for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
        if not isinstance(getattr(p, name), bool):
            raise _wrong(name, "True or False", getattr(p, name), "Pass a bool.")
    return checked


def _wrong(name: str, wanted: str, given: object, remedy: str) -> RequestError:
    return RequestError(f"{name}: wanted {wanted}, given {given!r}. {remedy}")


def _integer(
    name: str, value: object, low: int, high: int | None = None, *, remedy: str = ""
) -> int:
    wanted = f"an integer of at least {low}" if high is None else f"an integer in {low} … {high}"
    remedy = remedy or "Pass an integer in range."
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise _wrong(name, wanted, value, remedy)
    number = int(value)
    if number < low or (high is not None and number > high):
        raise _wrong(name, wanted, value, remedy)
    return number


def _real(name: str, value: object, low: float, high: float, remedy: str = "") -> float:
    wanted = f"a number in {low:g} … {high:g}"
    remedy = remedy or "Pass a finite number in range."
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _wrong(name, wanted, value, remedy)
    number = float(value)
    if not low <= number <= high:  # NaN fails this too
        raise _wrong(name, wanted, value, remedy)
    return number


def _temperature(value: object) -> float:
    remedy = f"Use 0 for greedy, or {MIN_TEMPERATURE:g} … {MAX_TEMPERATURE:g}."
    number = _real("temperature", value, 0.0, MAX_TEMPERATURE, remedy)
    if 0.0 < number < MIN_TEMPERATURE:
        raise _wrong("temperature", f"0 or at least {MIN_TEMPERATURE:g}", value, remedy)
    return abs(number)  # -0.0 is 0.0


def _top_p(value: object) -> float:
    number = _real("top_p", value, 0.0, 1.0)
    if number == 0.0:
        raise _wrong("top_p", "a number above 0", value, "Use top_k=1 for the likeliest token.")
    return number


def _max_tokens(p: SamplingParams) -> int | None:
    value: object = p.max_tokens
    if value is None:
        return None
    least = 1 if p.prompt_logprobs is None else 0
    remedy = "Use None for up to the context length; 0 only scores a prompt, with prompt_logprobs."
    limit = _integer("max_tokens", value, least, remedy=remedy)
    if limit == 0 and p.n != 1:
        raise _wrong("n", "1 with max_tokens=0", p.n, "Leave n out: a prompt is scored once.")
    return limit


def _stop(value: object) -> tuple[str, ...]:
    strings = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(strings, Sequence) or isinstance(strings, bytes):
        raise _wrong("stop", "a string or a list of strings", value, "Pass stop=['…'].")
    for item in strings:
        if not isinstance(item, str) or not item:
            raise _wrong("stop", "non-empty strings", item, "Leave it out to stop nowhere.")
    return tuple(dict.fromkeys(strings))


def _ids(name: str, value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise _wrong(name, "a list of token ids", value, f"Pass {name}=[…].")
    return tuple(_integer(name, item, 0) for item in value)


def _bias(value: object) -> tuple[tuple[int, float], ...] | None:
    if value is None:
        return None
    remedy = "Pass logit_bias={token_id: bias}."
    if not isinstance(value, (Mapping, tuple, list)):
        raise _wrong("logit_bias", "a mapping of token id to bias", value, remedy)
    try:
        pairs = dict(value)
    except (TypeError, ValueError):
        raise _wrong("logit_bias", "a mapping of token id to bias", value, remedy) from None
    name = "logit_bias"
    return tuple(
        sorted((_integer(name, k, 0), _real(name, v, -100, 100)) for k, v in pairs.items())
    )


def _processors(value: object) -> tuple[LogitsProcessor, ...]:
    if value is None:
        return ()
    if not isinstance(value, Sequence) or not all(callable(item) for item in value):
        remedy = "Pass logits_processors=[function]."
        raise _wrong("logits_processors", "a list of functions", value, remedy)
    return tuple(value)


def _id_key(key: object) -> object:
    """A JSON object's key as a token id; anything else is left for the check to refuse."""
    return int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key
