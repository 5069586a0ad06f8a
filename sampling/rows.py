"""What the sampler is told about each row of logits, and what it gives back."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from .params import SamplingParams
from .token_counts import TokenCounts


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRow:
    """One request that samples its next token.

    seed:     the request's own, or the engine's where it has none
    choice:   index of the choice among the request's ``n``
    position: absolute position of the token being sampled (prompt length + tokens so far)
    prompt_token_ids, output_token_ids: what penalties and ``min_tokens`` look at
    eos_token_ids: the model's end-of-sequence tokens
    request_id: what errors call the row
    pending:  there is one more output token than ``output_token_ids`` lists: the device has
        sampled it and the host has not read it yet. ``position`` counts it
    counts:   the choice's own, kept from step to step so that penalties need not count all tokens
        anew each time; None counts them anew, to the same bits
    """

    params: SamplingParams
    seed: int
    choice: int
    position: int
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    eos_token_ids: Collection[int]
    request_id: str = ""
    pending: bool = False
    counts: TokenCounts | None = None

    @property
    def num_output_tokens(self) -> int:
        """The output's tokens so far, with the pending one."""
        return len(self.output_token_ids) + self.pending


def needs_tokens(params: SamplingParams) -> bool:
    """Whether the host must know all earlier tokens before it samples: for logits processors."""
    return bool(params.processors)


@dataclass(frozen=True, slots=True)
class SampledRow:
    """One token and what the model itself thought of it.

    ``logprob`` and ``top`` are of the model's own distribution: no temperature, no penalties, no
    filters. Tokens are ranked by raw logit, ties by lowest id. ``rank`` is the token's place, 1 for
    the likeliest, and ``None`` where no logprobs were asked for. ``top`` holds (token id, logprob)
    of ranks 1, 2, …
    """

    token_id: int
    logprob: float
    rank: int | None
    top: tuple[tuple[int, float], ...]
