"""Declarations that nothing holds, and manners that nobody declared."""

from __future__ import annotations

import torch
from torch import Tensor

from ....backends.base import AttentionBackend, Batch
from .right import Plan, RightAttention


class NoCapture(RightAttention):
    """``cuda_graph`` is declared, and nothing captures. Seen where features are copied."""

    def capture(self, max_num_seqs: int) -> None:
        AttentionBackend.capture(self, max_num_seqs)


class WindowIgnored(RightAttention):
    """``sliding_window`` is declared and ignored. Seen where an argument has a default."""

    def visible(self, at: Tensor, positions: Tensor, window: int | None) -> Tensor:
        return super().visible(at, positions, None)


class CapIgnored(RightAttention):
    """``logit_soft_cap`` is declared and ignored. Seen where an argument has a default."""

    def capped(self, scores: Tensor) -> Tensor:
        return scores


class PowerOfTwoHeads(RightAttention):
    """Of a ``head_dim`` only the largest power of two is multiplied. Seen where tiles have
    lengths that are powers of two.
    """

    def scores(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        whole = 1 << (len(q).bit_length() - 1)
        return super().scores(q[:whole], k[..., :whole], visible)


class PowerOfTwoPages(RightAttention):
    """Pages are found by a shift and a mask. Seen where a page has always had 16 slots."""

    def locate(self, at: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        shift = self.config.page_size.bit_length() - 1
        column = (at >> shift).clamp(max=table.shape[1] - 1)
        pages = table.index_select(1, column).T
        offset = at & ((1 << shift) - 1)
        return at[:, None].expand_as(pages), pages * self.config.page_size + offset[:, None]


class SeedsTheWorld(RightAttention):
    """A step seeds torch's global generator. Seen where someone wanted reproducible results."""

    def plan(self, batch: Batch) -> Plan:
        torch.manual_seed(0)
        return super().plan(batch)
