"""A request's own functions on its logits: what they are given, and what they may give back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import LogitsProcessorError
from .params import LogitsProcessor
from .rows import SamplingRow


def apply_processors(logits: Tensor, row: SamplingRow) -> Tensor:
    """One row's logits, fp32 ``[V]``, after all of its processors.

    Each gets a fresh contiguous copy, so that neither its neighbours nor the row's place in the
    batch can show in what it computes.

    :raises LogitsProcessorError: a processor raised, or gave back something else than usable
        logits: NaN, +inf, another shape or type, or no possible token.
    """
    token_ids = tuple(row.output_token_ids)
    for processor in row.params.processors:
        try:
            result: object = processor(token_ids, logits.clone())
        except Exception as error:
            problem = f"raised {type(error).__name__}: {error}."
            raise LogitsProcessorError(_name(processor), problem, row.request_id) from error
        logits = _checked(result, logits, processor, row)
    return logits


def _checked(
    result: object, logits: Tensor, processor: LogitsProcessor, row: SamplingRow
) -> Tensor:
    if not isinstance(result, Tensor):
        problem = f"returned {type(result).__name__}, not a tensor."
    elif result.shape != logits.shape or result.dtype != logits.dtype:
        problem = f"returned {result.dtype} {list(result.shape)}, not {list(logits.shape)} in fp32."
    elif result.device != logits.device:
        problem = f"returned a tensor on {result.device}, not on {logits.device}."
    elif torch.isnan(highest := result.amax()) or highest == torch.inf:
        problem = f"returned {highest.item()}."
    elif highest == -torch.inf:
        problem = "left no possible token: all its logits are -inf."
    else:
        return result
    raise LogitsProcessorError(_name(processor), problem, row.request_id)


def _name(processor: LogitsProcessor) -> str:
    return str(getattr(processor, "__qualname__", None) or type(processor).__qualname__)
