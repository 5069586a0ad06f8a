"""When a request ends, and what is said about it. Pure functions, with vLLM's meanings."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import StrEnum

from .params import SamplingParams


class FinishReason(StrEnum):
    """Why a request ended, spelt as the OpenAI API spells it."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, slots=True)
class Finish:
    """How a request ended.

    ``stop_reason`` is the stop string or the stop token id; ``None`` for EOS and for a length.
    """

    reason: FinishReason
    stop_reason: int | str | None = None


def ending_token_ids(params: SamplingParams, eos_token_ids: Collection[int]) -> frozenset[int]:
    """The token ids that end this request; the sampler masks them before ``min_tokens``."""
    ids = frozenset(params.stop_ids)
    return ids if params.ignore_eos else ids.union(eos_token_ids)


def check_token(
    token_id: int,
    params: SamplingParams,
    num_output_tokens: int,
    eos_token_ids: Collection[int],
) -> Finish | None:
    """Whether ``token_id``, output token number ``num_output_tokens``, ends the request by itself.

    Such a token stays in ``token_ids``; ``Detokenizer.append(…, ends=True)`` keeps it out of the
    text. EOS wins over a stop token of the same id.
    """
    if num_output_tokens <= params.min_tokens:
        return None
    if not params.ignore_eos and token_id in eos_token_ids:
        return Finish(FinishReason.STOP)
    if token_id in params.stop_ids:
        return Finish(FinishReason.STOP, token_id)
    return None


def check_finish(
    token_id: int,
    params: SamplingParams,
    *,
    num_prompt_tokens: int,
    num_output_tokens: int,
    max_model_len: int,
    eos_token_ids: Collection[int],
    matched_stop: str | None = None,
) -> Finish | None:
    """Whether the request ends after ``token_id``, the last of ``num_output_tokens``.

    ``matched_stop`` is ``Detokenizer.matched_stop``. The first of these decides: EOS, a stop token,
    a stop string, ``max_tokens``, the context length.
    """
    ended = check_token(token_id, params, num_output_tokens, eos_token_ids)
    if ended is not None:
        return ended
    if matched_stop is not None:
        return Finish(FinishReason.STOP, matched_stop)
    full = num_prompt_tokens + num_output_tokens >= max_model_len
    spent = params.max_tokens is not None and num_output_tokens >= params.max_tokens
    return Finish(FinishReason.LENGTH) if full or spent else None
