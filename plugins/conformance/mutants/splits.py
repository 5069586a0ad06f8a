"""Wrong orders of addition: it is attention, and its bits depend on what they should not."""

from __future__ import annotations

from itertools import count

import torch

from ....backends.base import AttentionConfig
from .right import Plan, RightAttention, State, cut

_STARTS = count()


class SplitsByBatch(RightAttention):
    """More sequences, longer splits. Seen where the number of splits fills the processors that
    the batch leaves idle.
    """

    def splits(self, plan: Plan, rows: slice) -> list[range]:
        size = self.SPLIT if plan.batch.num_seqs > 1 else self.TILE
        return cut(max(plan.walked[rows]), size)


class SplitsByLongest(RightAttention):
    """Each row in four splits of the longest row's. Seen where all rows get one launch grid."""

    def splits(self, plan: Plan, rows: slice) -> list[range]:
        longest = max(plan.walked[rows])
        return cut(longest, -(-longest // (4 * self.TILE)) * self.TILE)


class TileByRows(RightAttention):
    """A row's sum runs over tiles whose length follows the number of rows. Seen where small
    batches take another kernel.
    """

    def tile_length(self, plan: Plan, rows: slice) -> int:
        return self.TILE if plan.batch.num_tokens > 8 else self.TILE // 2


class PrefixApart(RightAttention):
    """A chunk's own tokens are a split of their own. Seen where a prefill over a prefix is two
    kernels and a merge.
    """

    def splits(self, plan: Plan, rows: slice) -> list[range]:
        found = super().splits(plan, rows)
        if rows.start < plan.batch.num_decodes:
            return found
        edge = plan.batch.kv_lens[-1] - plan.batch.query_lens[-1]
        parts = [
            (range(s.start, edge), range(edge, s.stop)) if s.start < edge < s.stop else (s,)
            for s in found
        ]
        return [part for pair in parts for part in pair]


class CompletionOrder(RightAttention):
    """Splits join in the order in which they end. Seen where they are added by atomics. What ends
    first changes here from one backend to the next.
    """

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__(config)
        self.first = next(_STARTS)

    def merge(self, parts: list[State]) -> State:
        first = self.first % len(parts)
        return super().merge(parts[first:] + parts[:first])


class DecodeApart(RightAttention):
    """A decode walks other tiles than a prefill. Seen where each has a kernel of its own."""

    def tile_length(self, plan: Plan, rows: slice) -> int:
        return self.TILE // 2 if rows.start < plan.batch.num_decodes else self.TILE


class TunedByFirstCall(RightAttention):
    """The first call tries another tile. Seen where an autotuner times its candidates on it."""

    tuned = False

    def tile_length(self, plan: Plan, rows: slice) -> int:
        tile = self.TILE if self.tuned else self.TILE // 2
        self.tuned = True
        return tile


class StalePartials(RightAttention):
    """A step with fewer splits joins the rest from an earlier one. Seen where a workspace is not
    cleared and its use is not counted.
    """

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__(config)
        self.workspace: dict[torch.Size, list[State]] = {}

    def merge(self, parts: list[State]) -> State:
        shape = parts[0].total.shape
        stale = self.workspace.get(shape, [])[len(parts) :]
        self.workspace[shape] = parts + stale
        return super().merge(parts + stale)
