"""The checks of SGLang's deterministic test, by its names: ``single``, ``prefix``, ``radix_cache``.

Each compares whole outputs, token ids and logprobs as bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from ..core.engine import Engine
from ..errors import ConfigError
from ..sampling.params import SamplingParams
from .drive import as_transcripts, drive, drive_alone
from .transcript import Transcript
from .workload import Case, long_text, long_tokens

MODES = ("single", "prefix", "radix_cache")

_QUESTION = "Tell me about Richard Feynman: "
PREFIX_LENGTHS = (1, 511, 2048, 4097)
"""Prefix lengths of ``prefix``, in characters (in tokens for a model without a tokenizer)."""

_RADIX_TOKENS = 100


@dataclass(frozen=True, slots=True)
class ModeResult:
    """One line of a mode: how many outputs of one prompt were taken, and how many differ."""

    label: str
    samples: int
    unique: int

    def __str__(self) -> str:
        prefix = f"{self.label}: " if self.label else ""
        return f"{prefix}Total samples: {self.samples}, Unique samples: {self.unique}"


def run_mode(
    engine: Engine, mode: str, n_trials: int, n_start: int, params: SamplingParams
) -> Iterator[ModeResult]:
    """Run one mode; trial ``t`` is a batch of ``n_start + t`` requests.

    :raises ConfigError: an unknown mode, fewer than one trial, or ``radix_cache`` without one.
    """
    if n_trials < 1 or n_start < 1:
        raise ConfigError(
            f"n_trials was {n_trials} and n_start {n_start}; wanted at least 1 of both."
        )
    if mode == "single":
        return _single(engine, n_trials, n_start, params)
    if mode == "prefix":
        return _prefix(engine, n_trials, n_start, params)
    if mode == "radix_cache":
        if engine.scheduler.cache is None:
            raise ConfigError("mode radix_cache needs the radix cache, and it is off.")
        return _radix_cache(engine, n_trials, params)
    raise ConfigError(f"unknown mode {mode!r}; wanted one of {', '.join(MODES)}.")


def _single(
    engine: Engine, n_trials: int, n_start: int, params: SamplingParams
) -> Iterator[ModeResult]:
    """One question in batches of growing size; every output counts, not only the first."""
    case = Case("question", _encode(engine, _QUESTION, 12), params)
    samples: list[Transcript] = []
    for size in range(n_start, n_start + n_trials):
        engine.flush_cache()
        samples += as_transcripts(drive(engine, [case] * size))
    yield _result("", samples)


def _prefix(
    engine: Engine, n_trials: int, n_start: int, params: SamplingParams
) -> Iterator[ModeResult]:
    """Prompts that are prefixes of one text, mixed at random in batches of growing size."""
    text = long_text(80)
    cases = [
        Case(str(length), _encode(engine, text[:length], length), params)
        for length in PREFIX_LENGTHS
    ]
    samples: list[list[Transcript]] = [[] for _ in cases]
    random = Random(0)
    for size in range(n_start, n_start + n_trials):
        engine.flush_cache()
        picks = [random.randrange(len(cases)) for _ in range(size)]
        outputs = as_transcripts(drive(engine, [cases[pick] for pick in picks]))
        for pick, transcript in zip(picks, outputs, strict=True):
            samples[pick].append(transcript)
    for index, found in enumerate(samples):
        yield _result(f"Prompt {index} with prefix length {PREFIX_LENGTHS[index]}", found)


def _radix_cache(engine: Engine, n_trials: int, params: SamplingParams) -> Iterator[ModeResult]:
    """A prompt cold, and again on the prefix that an earlier request left; decoding's too."""
    for trial in range(n_trials):
        random = Random(trial)
        vocab = engine.vocab_size
        prompt = tuple(random.randrange(vocab) for _ in range(_RADIX_TOKENS))
        first = Case("first", prompt, params)
        engine.flush_cache()
        output = drive(engine, [first])[0]
        turn = Case("turn", (*prompt, *output.outputs[0].token_ids), params)
        warm = as_transcripts(drive(engine, [first])) + as_transcripts(drive(engine, [turn]))
        cold = as_transcripts(drive_alone(engine, [first, turn]))
        yield _result(f"Trial {trial}, prompt cached by prefill", [warm[0], cold[0]])
        yield _result(f"Trial {trial}, prompt cached by decoding", [warm[1], cold[1]])


def _encode(engine: Engine, text: str, length: int) -> tuple[int, ...]:
    if engine.tokenizer is None:
        return tuple(long_tokens(None, engine.vocab_size, length))
    tokens: list[int] = engine.tokenizer.encode(text)
    return tuple(tokens)


def _result(label: str, samples: Sequence[Transcript]) -> ModeResult:
    return ModeResult(label, len(samples), len(set(samples)))
