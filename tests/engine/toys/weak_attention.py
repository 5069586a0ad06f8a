"""Attention whose bits depend on all that its promises leave open.

``RightAttention`` adds a row's positions in tiles that begin at multiples of their length. Here

- without ``chunk_invariant`` a prefill adds what lies before its chunk apart from the chunk;
- with an ``alignment`` its tiles begin at the chunk's first position modulo that;
- without ``decode_equals_prefill`` a decode joins the tiles from the last to the first.
"""

from __future__ import annotations

from collections.abc import Iterator

from weak_backends import ALL, Promises

from isobit.backends.base import AttentionConfig, Batch
from isobit.plugins.conformance.mutants.right import Plan, RightAttention, cut


class WeakAttention(RightAttention):
    """``starts`` collects where every chunk began."""

    TILE = SPLIT = 16
    promises: Promises

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__(config)
        self.starts: set[int] = set()

    def plan(self, batch: Batch) -> Plan:
        self.starts.update(self.chunk_start(batch, b) for b in self.prefills(batch))
        return super().plan(batch)

    def blocks(self, plan: Plan) -> Iterator[slice]:
        """The decodes, then each prefill by itself."""
        batch = plan.batch
        if batch.num_decodes:
            yield slice(0, batch.num_decodes)
        for b in self.prefills(batch):
            yield slice(int(batch.cu_seqlens_q[b]), int(batch.cu_seqlens_q[b + 1]))

    def splits(self, plan: Plan, rows: slice) -> list[range]:
        longest = max(plan.walked[rows])
        if rows.start < plan.batch.num_decodes:
            found = cut(longest, self.SPLIT)
            return found if self.promises.decode_equals_prefill else found[::-1]
        start = self.chunk_start(plan.batch, int(plan.owners[rows.start]))
        edge = start % self.promises.alignment if self.promises.chunk_invariant else start
        before = [range(s.start, min(s.stop, edge)) for s in cut(edge, self.SPLIT)]
        after = [range(edge + s.start, edge + s.stop) for s in cut(longest - edge, self.SPLIT)]
        return before + after

    @staticmethod
    def prefills(batch: Batch) -> range:
        return range(batch.num_decodes, batch.num_seqs)

    @staticmethod
    def chunk_start(batch: Batch, sequence: int) -> int:
        return batch.kv_lens[sequence] - batch.query_lens[sequence]


for _promises in ALL:
    _name = _promises.class_name
    globals()[_name] = type(_name, (WeakAttention,), {"promises": _promises})
