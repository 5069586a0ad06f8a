"""Wrong scores: masks, windows, caps, scales, heads, precision."""

from __future__ import annotations

import torch
from torch import Tensor

from ....backends.base import Batch
from .right import RightAttention, products


class CausalOffByOne(RightAttention):
    """Each row also sees the next position. Seen where a block's end is compared by ``<=``."""

    def visible(self, at: Tensor, positions: Tensor, window: int | None) -> Tensor:
        seen = at <= positions + 1
        return seen if window is None else seen & (at > positions - window)


class ScaleMissing(RightAttention):
    """Scores are not scaled. Seen where a kernel expects a query that is scaled already."""

    def scaled(self, scores: Tensor) -> Tensor:
        return scores


class WindowOffByOne(RightAttention):
    """A window of w shows w + 1 tokens. Seen where windows count the tokens to the left."""

    def visible(self, at: Tensor, positions: Tensor, window: int | None) -> Tensor:
        return super().visible(at, positions, window if window is None else window + 1)


class CapAfterMask(RightAttention):
    """The soft cap comes after the mask and gives hidden positions a weight. Seen where the cap
    was added to a kernel that masked already.
    """

    def scores(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        masked = torch.where(visible[None, :, :, None], self.scaled(products(q, k)), -torch.inf)
        return self.capped(masked)


class HeadsInterleaved(RightAttention):
    """Query head h reads KV head h % H, not h // G. Seen where K is tiled, not repeated."""

    def grouped(self, q: Tensor) -> Tensor:
        grouped = q.view(len(q), -1, self.config.num_kv_heads, q.shape[-1])
        return grouped.permute(3, 1, 0, 2).contiguous()

    def ungrouped(self, values: Tensor) -> Tensor:
        return values.permute(1, 0, 2, 3).flatten(1, 2)


class GroupsOfEight(RightAttention):
    """Only 8 query heads a KV head are computed. Seen where a group must fit one tile."""

    def ungrouped(self, values: Tensor) -> Tensor:
        values[8:] = 0
        return super().ungrouped(values)


class PositionFromChunk(RightAttention):
    """A prefill's positions count from the chunk's first row. Seen where masks are made from
    query lengths alone.
    """

    def positions(self, batch: Batch) -> Tensor:
        first = batch.cu_seqlens_q.long()[self.owners(batch)]
        in_chunk = torch.arange(batch.num_tokens, device=first.device) - first
        return torch.cat([batch.positions[: batch.num_decodes], in_chunk[batch.num_decodes :]])


class SharedMaximum(RightAttention):
    """One softmax maximum for all rows. Seen where a tile of rows keeps one, to save registers."""

    def highest(self, scores: Tensor) -> Tensor:
        return scores.amax((1, 2))[:, None].expand(scores[:, 0].shape)


class Tf32Products(RightAttention):
    """float32 operands lose 13 bits before they are multiplied. Seen where TF32 is allowed."""

    def exact(self, operand: Tensor) -> Tensor:
        return ((operand.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class WeightsInBfloat16(RightAttention):
    """Weights are rounded to bfloat16 in every dtype. Seen where a kernel knows one dtype."""

    def weights(self, scores: Tensor, maximum: Tensor) -> Tensor:
        return super().weights(scores, maximum).bfloat16().float()


class ScoresInFloat16(RightAttention):
    """Scores are kept in float16, and overflow. Seen where a dtype is added by a template."""

    def scaled(self, scores: Tensor) -> Tensor:
        return super().scaled(scores.half().float())
