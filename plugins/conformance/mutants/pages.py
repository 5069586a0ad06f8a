"""Wrong memory: pages, slots, what is written, when, and where."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ....backends.base import AttentionConfig, Batch, LayerCache
from .right import Plan, RightAttention


class NeighboursPages(RightAttention):
    """A sequence's first row reads its neighbour's pages. Seen where owners are searched for in
    the cumulative lengths from the wrong side.
    """

    def owners(self, batch: Batch) -> Tensor:
        row = torch.arange(batch.num_tokens, device=batch.positions.device)
        return (torch.searchsorted(batch.cu_seqlens_q.long(), row) - 1).clamp(min=0)


class StaleLastPage(RightAttention):
    """A page that decoding adds is not seen while the batch stays the same. Seen where the table
    is copied only if the sequences change.
    """

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__(config)
        self.kept: Tensor | None = None

    def table(self, batch: Batch, owners: Tensor) -> Tensor:
        new = super().table(batch, owners)
        if self.kept is None or not torch.equal(self.kept[:, 0], new[:, 0]):
            self.kept = new
        return self.kept


class TailNotCleared(RightAttention):
    """Weight 0 meets what a page's unwritten tail holds. Seen where masked values are trusted to
    be finite.
    """

    def visible_values(self, v: Tensor, visible: Tensor) -> Tensor:
        return v


class TailWritten(RightAttention):
    """The rest of a step's last page is zeroed. Seen where pages are written as whole tiles."""

    def write(self, k: Tensor, v: Tensor, layer: LayerCache, plan: Plan) -> None:
        super().write(k, v, layer, plan)
        _clear_tail(layer, plan, self.config.page_size)


class TailCleared(RightAttention):
    """The rest of a last page that the engine wrote is zeroed. Seen where unwritten values are
    cleared in memory, not masked.
    """

    def run_written(self, q: Tensor, layer: LayerCache, plan: Plan, out: Tensor) -> None:
        _clear_tail(layer, plan, self.config.page_size)
        super().run_written(q, layer, plan, out)


def _clear_tail(layer: LayerCache, plan: Plan, page_size: int) -> None:
    """Zeros behind the step's last slot, to the end of its page."""
    last = plan.batch.slot_mapping[-1:]
    slots = last + torch.arange(1, page_size, device=last.device)
    slots = torch.where(slots % page_size > last % page_size, slots, 0)
    for cache in (layer.k, layer.v):
        cache.flatten(0, 1).index_fill_(0, slots, 0)


class PaddingWritten(RightAttention):
    """Padding rows are written to a page that may be anyone's. Seen where an engine's null page is
    not the backend's.
    """

    def write(self, k: Tensor, v: Tensor, layer: LayerCache, plan: Plan) -> None:
        slots = plan.batch.slot_mapping
        page_size = self.config.page_size
        slots = torch.where(slots < page_size, slots + page_size, slots)
        super().write(k, v, layer, replace(plan, batch=replace(plan.batch, slot_mapping=slots)))


class PastTheEnd(RightAttention):
    """``out`` is filled to a multiple of four rows. Seen where tiles of rows are not masked."""

    def store(self, result: Tensor, rows: slice, out: Tensor) -> None:
        super().store(result, rows, out)
        whole = -(-rows.stop // 4) * 4
        if rows.stop == len(out):
            out.as_strided((whole, *out.shape[1:]), out.stride())[rows.stop :] = 0


class OnePageAChunk(RightAttention):
    """A chunk's rows all go to its last page, and the last to come stays. Seen where a page is
    looked up once a sequence.
    """

    def write(self, k: Tensor, v: Tensor, layer: LayerCache, plan: Plan) -> None:
        page_size = self.config.page_size
        slots = plan.batch.slot_mapping
        last = plan.batch.cu_seqlens_q.long()[plan.owners + 1] - 1
        slots = slots[last] // page_size * page_size + slots % page_size
        super().write(k, v, layer, replace(plan, batch=replace(plan.batch, slot_mapping=slots)))


class WrittenLate(RightAttention):
    """K and V are written after attention. Seen where the two run on different streams."""

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, layer: LayerCache, plan: Plan, out: Tensor
    ) -> None:
        self.run_written(q, layer, plan, out)
        self.write(k, v, layer, plan)


class RowsByLength(RightAttention):
    """Rows of equal length all get the first one's result. Seen where rows are sorted by length
    and found again by it.
    """

    def attend(self, q: Tensor, layer: LayerCache, plan: Plan, rows: slice) -> Tensor:
        lengths, order = plan.positions[rows].sort(stable=True)
        found = torch.searchsorted(lengths, plan.positions[rows])
        return super().attend(q, layer, plan, rows)[order][found]


class OutAdded(RightAttention):
    """Results are added to what ``out`` held. Seen where splits add theirs to it."""

    def store(self, result: Tensor, rows: slice, out: Tensor) -> None:
        out[rows] += result


class PhysicalOrder(RightAttention):
    """A tile's positions are added in the order in which they lie in memory. Seen where reads are
    sorted by address.
    """

    def locate(self, at: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        positions, slots = super().locate(at, table)
        slots, order = slots.sort(dim=0, stable=True)
        return positions.gather(0, order), slots


class GatheredOnce(RightAttention):
    """All layers read the first layer's pages. Seen where gathered tiles are kept for a step."""

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__(config)
        self.kept: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def gather(self, layer: LayerCache, slots: Tensor) -> tuple[Tensor, Tensor]:
        key = tuple(slots.flatten().tolist())
        if layer.index == 0:
            self.kept[key] = super().gather(layer, slots)
        return self.kept[key]


class HostBufferReused(RightAttention):
    """Positions are copied from a host buffer that the next plan writes over. Seen where a
    workspace is pinned once and nobody waits for the copies, on CUDA alone.
    """

    MOST_ROWS = 1 << 17

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__(config)
        pinned = config.device.type == "cuda"
        self.host = torch.empty(self.MOST_ROWS, dtype=torch.int64, pin_memory=pinned)

    def positions(self, batch: Batch) -> Tensor:
        spans = zip(batch.query_lens, batch.kv_lens, strict=True)
        values = [position for new, kv in spans for position in range(kv - new, kv)]
        host = self.host[: len(values)]
        host.copy_(torch.tensor(values))
        copied = host.to(self.config.device, non_blocking=True)
        # A position past its sequence would end in an error of the device, not in a wrong number.
        return torch.minimum(copied, batch.seq_lens[self.owners(batch)] - 1)
