"""Logprobs as they are given back: one dict a position, keyed by token id."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import EngineError
from .rows import SampledRow


@dataclass(frozen=True, slots=True)
class Logprob:
    """One token at one position, under the model's own distribution.

    logprob: natural logarithm, before temperature, penalties and filters
    rank:    place among all tokens by raw logit, ties by lowest id; the likeliest is 1
    decoded_token: the token's own text, special tokens included; ``None`` without a tokenizer
    """

    logprob: float
    rank: int
    decoded_token: str | None


def token_logprobs(row: SampledRow, tokenizer: Any | None) -> dict[int, Logprob]:
    """The row's token first, then the likeliest tokens that were asked for, in order of rank.

    The token itself appears once, so the dict has ``len(row.top)`` entries or one more.

    :raises EngineError: if the row was sampled without asking for logprobs.
    """
    if row.rank is None:
        raise EngineError(f"Token {row.token_id} has no rank: its row asked for no logprobs.")
    entries = [(row.token_id, row.logprob, row.rank)]
    entries += [(token_id, lp, rank) for rank, (token_id, lp) in enumerate(row.top, start=1)]
    result: dict[int, Logprob] = {}
    for token_id, logprob, rank in entries:
        if token_id not in result:
            result[token_id] = Logprob(logprob, rank, _decode_one(tokenizer, token_id))
    return result


def _decode_one(tokenizer: Any | None, token_id: int) -> str | None:
    if tokenizer is None:
        return None
    text: str = tokenizer.decode(
        [token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return text
