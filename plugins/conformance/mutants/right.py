"""A paged attention backend that holds everything there is to declare, in plain torch.

It is slow and easy to read. The mutants beside it override one method or constant each.

Contract: the row at position ``p`` walks the positions ``0 … p`` in tiles of ``TILE``, grouped
into splits of ``SPLIT``, both aligned at absolute positions. A tile's scores are added over the
channels by ``pairwise_sum``; its weights, and its weighted values, over the positions by the same.
Tiles join their split by the online softmax in ascending order, and so do splits the row. Only
elementwise operations are used, so a row's bits depend on its query and its positions ``0 … p``
alone, on any device. A tile past a row's own position changes nothing: it adds zeros, times one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ....backends.base import AttentionBackend, AttentionConfig, Batch, LayerCache
from ....kernels.elementary import exp_f32

LOWEST = torch.finfo(torch.float32).min
"""The maximum of no scores: finite, so that its difference from itself is 0."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One step.

    owners:    int64 ``[T]``, the sequence that each row belongs to
    positions: int64 ``[T]``
    table:     int64 ``[T, max_pages]``, each row's pages
    walked:    how many positions each row walks; the host's, so frozen in a graph
    """

    batch: Batch
    owners: Tensor
    positions: Tensor
    table: Tensor
    walked: list[int]


@dataclass(frozen=True, slots=True)
class State:
    """An online softmax; for ``G`` query heads a KV head, ``R`` rows and ``H`` KV heads.

    maximum, total: fp32 ``[G, R, H]``
    values:         fp32 ``[G, R, H, D]``
    """

    maximum: Tensor
    total: Tensor
    values: Tensor


class RightAttention(AttentionBackend):
    """Causal grouped-query attention over pages, with windows, soft caps and graphs."""

    TILE = 32
    SPLIT = 128
    BLOCK = 64
    """Rows that are computed at once; no bit depends on it."""

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__(config)
        self.capturing = False

    # Steps

    def plan(self, batch: Batch) -> Plan:
        owners = self.owners(batch)
        return Plan(
            batch=batch,
            owners=owners,
            positions=self.positions(batch),
            table=self.table(batch, owners),
            walked=self.walked(batch),
        )

    def capture(self, max_num_seqs: int) -> None:
        self.capturing = True

    def replay(self, plan: Plan, batch: Batch) -> None:
        plan.positions.copy_(batch.positions)
        plan.table.copy_(self.table(batch, plan.owners))

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, layer: LayerCache, plan: Plan, out: Tensor
    ) -> None:
        self.write(k, v, layer, plan)
        self.run_written(q, layer, plan, out)

    def run_written(self, q: Tensor, layer: LayerCache, plan: Plan, out: Tensor) -> None:
        for rows in self.blocks(plan):
            self.store(self.attend(q[rows], layer, plan, rows), rows, out)

    def owners(self, batch: Batch) -> Tensor:
        row = torch.arange(batch.num_tokens, device=batch.positions.device)
        return torch.searchsorted(batch.cu_seqlens_q.long(), row, right=True) - 1

    def positions(self, batch: Batch) -> Tensor:
        return batch.positions.clone()

    def table(self, batch: Batch, owners: Tensor) -> Tensor:
        return batch.block_table.index_select(0, owners).long()

    def walked(self, batch: Batch) -> list[int]:
        if self.capturing and batch.num_decodes == batch.num_seqs:
            return [self.config.max_model_len] * batch.num_seqs
        spans = zip(batch.query_lens, batch.kv_lens, strict=True)
        return [length for new, kv in spans for length in range(kv - new + 1, kv + 1)]

    def blocks(self, plan: Plan) -> Iterator[slice]:
        """Rows that are computed together: decodes, then prefills."""
        decodes, num_rows = plan.batch.num_decodes, plan.batch.num_tokens
        for start, stop in ((0, decodes), (decodes, num_rows)):
            for first in range(start, stop, self.BLOCK):
                yield slice(first, min(first + self.BLOCK, stop))

    def write(self, k: Tensor, v: Tensor, layer: LayerCache, plan: Plan) -> None:
        layer.k.flatten(0, 1).index_copy_(0, plan.batch.slot_mapping, k)
        layer.v.flatten(0, 1).index_copy_(0, plan.batch.slot_mapping, v)

    def store(self, result: Tensor, rows: slice, out: Tensor) -> None:
        out[rows] = result

    # Attention

    def attend(self, q: Tensor, layer: LayerCache, plan: Plan, rows: slice) -> Tensor:
        """What ``out`` gets for some rows, ``[R, q_heads, head_dim]`` in its dtype."""
        grouped = self.exact(self.grouped(q.float()))
        tile, longest = self.tile_length(plan, rows), max(plan.walked[rows])
        parts = []
        for split in self.splits(plan, rows):
            part = self.empty(grouped)
            for first in range(split.start, min(split.stop, longest), tile):
                at = torch.arange(first, min(first + tile, split.stop), device=q.device)
                part = self.add_tile(part, grouped, at, layer, plan, rows)
            parts.append(part)
        merged = self.merge(parts)
        result = merged.values / merged.total[..., None]
        return self.ungrouped(result).to(q.dtype)

    def tile_length(self, plan: Plan, rows: slice) -> int:
        return self.TILE

    def splits(self, plan: Plan, rows: slice) -> list[range]:
        """The positions of each split, up to the longest of the rows."""
        return cut(max(plan.walked[rows]), self.SPLIT)

    def grouped(self, q: Tensor) -> Tensor:
        """``[R, q_heads, D]`` as ``[D, G, R, H]``: query head ``h`` reads KV head ``h // G``."""
        grouped = q.view(len(q), self.config.num_kv_heads, -1, q.shape[-1])
        return grouped.permute(3, 2, 0, 1).contiguous()

    def ungrouped(self, values: Tensor) -> Tensor:
        """``[G, R, H, D]`` as ``[R, q_heads, D]``."""
        return values.permute(1, 2, 0, 3).flatten(1, 2)

    def empty(self, q: Tensor) -> State:
        """The softmax of no positions, for q ``[D, G, R, H]``."""
        shape = q.shape[1:]
        return State(
            torch.full(shape, LOWEST, device=q.device),
            torch.zeros(shape, device=q.device),
            torch.zeros(*shape, q.shape[0], device=q.device),
        )

    def add_tile(
        self, state: State, q: Tensor, at: Tensor, layer: LayerCache, plan: Plan, rows: slice
    ) -> State:
        """The state with the positions ``at`` added."""
        at, slots = self.locate(at, plan.table[rows])
        visible = self.visible(at, plan.positions[rows], self.config.sliding_window(layer.index))
        k, v = self.gather(layer, slots)
        scores = self.scores(q, self.exact(k), visible)
        maximum = torch.maximum(state.maximum, self.highest(scores))
        weights = self.weights(scores, maximum)
        old = exp_f32(state.maximum - maximum)
        v = self.visible_values(v, visible)
        by_position = weights.transpose(0, 1)
        return State(
            maximum,
            state.total * old + pairwise_sum(by_position),
            state.values * old[..., None] + pairwise_sum(by_position[..., None] * v[:, None]),
        )

    def locate(self, at: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Positions and their slots, both ``[tile, R]``; past the table any slot will do."""
        page_size = self.config.page_size
        column = (at // page_size).clamp(max=table.shape[1] - 1)
        pages = table.index_select(1, column).T
        return at[:, None].expand_as(pages), pages * page_size + (at % page_size)[:, None]

    def visible(self, at: Tensor, positions: Tensor, window: int | None) -> Tensor:
        """Which of the positions ``at`` ``[tile, R]`` each row sees."""
        seen = at <= positions
        return seen if window is None else seen & (at > positions - window)

    def gather(self, layer: LayerCache, slots: Tensor) -> tuple[Tensor, Tensor]:
        """K and V at the slots, fp32 ``[tile, R, H, D]``."""
        flat, shape = slots.flatten(), (*slots.shape, *layer.k.shape[2:])
        k = layer.k.flatten(0, 1).index_select(0, flat).view(shape)
        v = layer.v.flatten(0, 1).index_select(0, flat).view(shape)
        return k.float(), v.float()

    def exact(self, operand: Tensor) -> Tensor:
        """What a score's operand is rounded to: nothing."""
        return operand

    def scores(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        """fp32 ``[G, tile, R, H]``; minus infinity where a row does not see the position."""
        capped = self.capped(self.scaled(products(q, k)))
        return torch.where(visible[None, :, :, None], capped, -torch.inf)

    def scaled(self, scores: Tensor) -> Tensor:
        return scores * self.config.scale

    def capped(self, scores: Tensor) -> Tensor:
        cap = self.config.logit_soft_cap
        # Not divided: a GPU multiplies by the reciprocal anyway, and so both give the same bits.
        return scores if cap is None else tanh_f32(scores * (1 / cap)) * cap

    def highest(self, scores: Tensor) -> Tensor:
        """The tile's maximum, ``[G, R, H]``."""
        return scores.amax(1)

    def weights(self, scores: Tensor, maximum: Tensor) -> Tensor:
        return exp_f32(scores - maximum[:, None])

    def visible_values(self, v: Tensor, visible: Tensor) -> Tensor:
        """Zeros where a row sees nothing: weight 0 times NaN would be NaN."""
        return torch.where(visible[..., None, None], v, 0.0)

    def merge(self, parts: list[State]) -> State:
        """The splits joined, in ascending order."""
        merged = parts[0]
        for part in parts[1:]:
            merged = self.joined(merged, part)
        return merged

    def joined(self, one: State, other: State) -> State:
        maximum = torch.maximum(one.maximum, other.maximum)
        a, b = exp_f32(one.maximum - maximum), exp_f32(other.maximum - maximum)
        return State(
            maximum,
            one.total * a + other.total * b,
            one.values * a[..., None] + other.values * b[..., None],
        )


def cut(length: int, size: int) -> list[range]:
    """The positions below ``length`` in splits of ``size``; the last one is whole too."""
    return [range(start, start + size) for start in range(0, length, size)]


def products(q: Tensor, k: Tensor) -> Tensor:
    """``q . k`` for q ``[D, G, R, H]`` and k ``[tile, R, H, D]``: ``[G, tile, R, H]``."""
    by_channel = k.permute(3, 0, 1, 2).contiguous()
    return pairwise_sum(q[:, :, None] * by_channel[:, None])


def pairwise_sum(x: Tensor) -> Tensor:
    """The sum over the first axis: its second half is added to its first until one is left.

    An odd one out is carried along. The order depends on the axis's length alone.
    """
    while len(x) > 1:
        half = len(x) // 2
        odd = x[2 * half :]
        x = x[:half] + x[half : 2 * half]
        if len(odd):
            x = torch.cat([x, odd])
    return x[0]


def tanh_f32(x: Tensor) -> Tensor:
    """tanh out of ``exp_f32``, to 2e-7."""
    small = exp_f32(x.abs() * -2.0)
    return torch.copysign((1.0 - small) / (1.0 + small), x)
