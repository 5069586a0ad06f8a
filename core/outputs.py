"""What the engine gives back, as frozen data."""

from __future__ import annotations

from dataclasses import dataclass

from ..sampling.logprobs import Logprob
from ..sampling.stopping import FinishReason

TokenLogprobs = dict[int, Logprob]
"""Logprobs at one position by token id: the token itself and the most likely ones asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionOutput:
    """One choice of a request.

    ``logprobs[i]`` belongs to ``token_ids[i]`` and is of the model's own distribution, before
    temperature, penalties and filters; ``None`` where ``SamplingParams.logprobs`` was.
    ``finish_reason`` is ``None`` while the choice is unfinished. ``stop_reason`` is the stop string
    or stop token id that ended it, ``None`` for the end-of-sequence token or a length.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """A finished request.

    ``prompt_logprobs[i]`` belongs to ``prompt_token_ids[i]``; it is ``None`` for the first, which
    nothing precedes, and for those that were not asked for. ``num_cached_tokens`` counts the prompt
    tokens taken from the prefix cache by the first choice. ``fingerprint`` names everything the
    bits depend on but the request itself; under ``deterministic=False`` it promises nothing.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None
    outputs: tuple[CompletionOutput, ...]
    num_cached_tokens: int
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreOutput:
    """The logprobs of a given sequence, as decoding would have reported them.

    All tuples have one entry a token of ``token_ids``; it is ``None`` for the first ``prompt_len``
    tokens and for the very first, which nothing precedes. ``logprobs`` are natural logarithms,
    ``ranks`` count from 1. ``top_logprobs`` holds each token itself and the likeliest ones that
    were asked for; ``None`` with ``top=0``. ``cumulative_logprob`` is the sum of ``logprobs``.
    """

    token_ids: tuple[int, ...]
    prompt_len: int
    logprobs: tuple[float | None, ...]
    ranks: tuple[int | None, ...]
    top_logprobs: tuple[TokenLogprobs | None, ...] | None
    cumulative_logprob: float
    num_cached_tokens: int
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamChunk:
    """What one step added to one choice: the pieces of all its chunks make up its output.

    ``token_ids`` is one token, or empty where a request only scored its prompt.

    ``text`` may be empty while a character or a possible stop string is incomplete.
    ``output`` is the whole request, on its very last chunk alone.
    """

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    output: RequestOutput | None = None
