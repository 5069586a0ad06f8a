"""Where tokens stand among all of their row, and which stand first.

Tokens are ranked by raw logit, ties by lowest id, -0 as 0. All is done by comparisons and integer
counts, so that neighbours change nothing, and in shapes that the host knows, so that it need not
wait for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.transfer import to_device
from .distribution import Distribution

_ROWS, _CPU_ROWS = 32, 8
"""Rows ranked at once: their keys take memory, and should stay in a CPU's cache."""

_LAST_ID = 2**32 - 1


@dataclass(frozen=True, slots=True)
class RankedRows:
    """Some rows that are ranked together.

    rows:         their indices, ``A`` of them
    ranks:        int64 ``[A]``, of the rows' own tokens; the likeliest has 1
    top_ids:      int64 ``[A, K]``, the tokens of ranks 1 … K; K is the most that any of them asks
    top_logprobs: fp32 ``[A, K]``
    """

    rows: Sequence[int]
    ranks: Tensor
    top_ids: Tensor
    top_logprobs: Tensor


def rank_tokens(
    model: Distribution, token_ids: Tensor, num_top: Sequence[int | None]
) -> list[RankedRows]:
    """Rank the own token of each row that has a ``num_top``, and list its likeliest tokens.

    token_ids: int64 ``[R]``
    num_top:   how many to list per row, at most V; None leaves the row out
    """
    device = model.logits.device
    # Those that ask for much come together, so that few others are listed as far as they are.
    asked = sorted((count, i) for i, count in enumerate(num_top) if count is not None)
    index = to_device([i for _, i in asked], torch.int64, device)
    step = _CPU_ROWS if device.type == "cpu" else _ROWS
    ranked = []
    for begin in range(0, len(asked), step):
        piece = asked[begin : begin + step]
        rows, width = index[begin : begin + step], piece[-1][0]
        logits = model.logits.index_select(0, rows)
        ranks = _ranks(logits, token_ids[rows])
        top_ids = _highest_ids(logits, width) if width else rows.new_empty(len(piece), 0)
        ranked.append(RankedRows([i for _, i in piece], ranks, top_ids, model.of(rows, top_ids)))
    return ranked


def _ranks(logits: Tensor, token_ids: Tensor) -> Tensor:
    """1 + the tokens with a higher logit, or an equal one and a lower id; int64 ``[R]``."""
    own_ids = token_ids.unsqueeze(1)
    own = logits.gather(1, own_ids)
    ids = torch.arange(logits.shape[1], device=logits.device)
    higher = torch.count_nonzero(logits > own, dim=1)
    return 1 + higher + torch.count_nonzero((logits == own) & (ids < own_ids), dim=1)


def _highest_ids(logits: Tensor, count: int) -> Tensor:
    """The ``count`` highest of each row, ties by lowest id; int64 ``[R, count]``, highest first."""
    # Keys in the order of the logits, then from the last id to the first: none is there twice, so
    # that the result does not depend on how topk treats equals. Adding 0 makes -0 a 0.
    bits = (logits + 0.0).view(torch.int32)
    bits ^= (bits >> 31) & 0x7FFFFFFF
    keys = bits.long()
    keys <<= 32
    keys |= _LAST_ID - torch.arange(logits.shape[1], device=logits.device)
    return _LAST_ID - (keys.topk(count, dim=1).values & _LAST_ID)
