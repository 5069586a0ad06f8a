"""Runs a backend as the engine would: pages, slots, batches, plans, graphs.

What the engine leaves undefined is filled with what shows a mistake: unwritten slots and the null
page hold garbage, ``out`` holds NaN, and rows behind it are watched. A CUDA device is kept busy
before each step, so that the next is planned, and after the last the backend freed, while the
device has not begun the step; not where a step is audited, which waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as AnySequence
from contextlib import nullcontext
from itertools import accumulate
from random import Random
from typing import Any

import torch
from torch import Tensor

from ...backends.base import AttentionBackend, AttentionConfig, Batch, LayerCache
from ...backends.recording import Recorded, record, warm_up
from .audit import Audit
from .generators import untouched_generators
from .scenario import Geometry, Piece, Run, Sequence, Step
from .values import Rows, all_rows

_SPARE_PAGES = 3
_GUARD_ROWS = 4
_BEFORE_A_STEP = 2_000_000
"""Cycles that the device is busy, about a millisecond: longer than the host takes for a step."""
_BEFORE_THE_LAST = 20_000_000
"""Longer than it takes to free a backend, to make another and to plan with it."""

Factory = Callable[[AttentionConfig], AttentionBackend]


class Outputs:
    """What a run gave: per sequence its rows ``[length, q_heads, head_dim]``, and which are set."""

    def __init__(self, sequences: AnySequence[Sequence], geometry: Geometry) -> None:
        shape = (geometry.num_q_heads, geometry.head_dim)
        self.rows = [
            torch.empty(s.length, *shape, dtype=_dtype(geometry), device=geometry.device)
            for s in sequences
        ]
        self.computed = [torch.zeros(s.length, dtype=torch.bool) for s in sequences]

    def put(self, piece: Piece, rows: Tensor) -> None:
        self.rows[piece.sequence][piece.start : piece.stop] = rows
        self.computed[piece.sequence][piece.start : piece.stop] = True


def execute(
    factory: Factory, geometry: Geometry, sequences: AnySequence[Sequence], run: Run
) -> Outputs:
    """Compute the run on a fresh backend and a fresh cache.

    :raises BackendError: the backend wrote where nothing may be written, broke a graph's rules,
        or touched a global generator.
    """
    watch = untouched_generators() if run.generators else nullcontext()
    with torch.inference_mode(), watch:
        rig = _Rig(factory, geometry, sequences, run)
        outputs = Outputs(sequences, geometry)
        for number, step in enumerate(run.steps, 1):
            rig.keep_busy(_BEFORE_THE_LAST if number == len(run.steps) else _BEFORE_A_STEP)
            for piece, rows in zip(step, rig.step(step), strict=True):
                outputs.put(piece, rows)
        rig.forget_graphs()
        return outputs


class _Rig:
    def __init__(
        self, factory: Factory, geometry: Geometry, sequences: AnySequence[Sequence], run: Run
    ) -> None:
        self._geometry, self._sequences, self._run = geometry, sequences, run
        self._device = torch.device(geometry.device)
        self._backend = factory(_config(geometry, sequences, run))
        self._values = [
            all_rows(sequences, geometry, run.layers - 1 - layer) for layer in range(run.layers)
        ]
        self._tables = _place_pages(sequences, geometry, run)
        num_pages = 1 + _SPARE_PAGES + sum(_pages(s, geometry) for s in sequences)
        self._caches = [self._cache(layer, num_pages) for layer in range(run.layers)]
        self._graphs: dict[int, _Graph] = {}
        self._capturing = False

    def keep_busy(self, cycles: int) -> None:
        if self._device.type == "cuda":
            torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]

    def forget_graphs(self) -> None:
        """They refer to the rig: with them the backend would stay until garbage is collected."""
        self._graphs.clear()

    def step(self, step: Step) -> list[Tensor]:
        """The last layer's rows, by piece."""
        if self._run.graph and all(piece.decode for piece in step):
            out = self._replay(step)
        else:
            out = self._eager(step)
        ends = list(accumulate(piece.stop - piece.start for piece in step))
        return [out[end - (p.stop - p.start) : end] for end, p in zip(ends, step, strict=True)]

    def _eager(self, step: Step) -> Tensor:
        batch = self._batch(step, len(step), None)
        audit = Audit(self._caches, batch, self._geometry) if self._run.audit else None
        plan = self._backend.plan(batch)
        for values, cache in zip(self._values, self._caches, strict=True):
            rows = _gather(values, step)
            guarded = self._fresh_out(len(rows.q))
            out = guarded[: len(rows.q)]
            before = [t.clone() for t in (rows.q, rows.k, rows.v)] if audit else []
            self._one_layer(rows, cache, batch, plan, out)
            if audit:
                audit.check_layer(cache, rows, before)
                audit.check_guard(guarded[len(rows.q) :])
        return out

    def _one_layer(
        self, rows: Rows, cache: LayerCache, batch: Batch, plan: Any, out: Tensor
    ) -> None:
        """One layer, its K and V written by whoever is to write them."""
        if not self._geometry.engine_writes_kv:
            self._backend.run(rows.q, rows.k, rows.v, cache, plan, out)
            return
        for pages, new in ((cache.k, rows.k), (cache.v, rows.v)):
            pages.flatten(0, 1).index_copy_(0, batch.slot_mapping, new)
        self._backend.run_written(rows.q, cache, plan, out)

    def _replay(self, step: Step) -> Tensor:
        bucket = _bucket(len(step))
        if not self._capturing:
            self._capturing = True
            most = max(len(s) for s in self._run.steps if all(p.decode for p in s))
            self._backend.capture(_bucket(most))
        if bucket not in self._graphs:
            self._graphs[bucket] = _Graph(self, bucket)
        return self._graphs[bucket].replay(step)

    def _fresh_out(self, num_rows: int) -> Tensor:
        g = self._geometry
        shape = (num_rows + _GUARD_ROWS, g.num_q_heads, g.head_dim)
        return torch.full(shape, torch.nan, dtype=_dtype(g), device=self._device)

    def _cache(self, layer: int, num_pages: int) -> LayerCache:
        shape = self._backend.kv_cache_shape(num_pages)
        generator = torch.Generator().manual_seed(layer)

        def tensor() -> Tensor:
            if self._run.unwritten == "nan":
                data = torch.full(shape, torch.nan)
            else:
                data = torch.randn(shape, generator=generator) * 1000
            return data.to(_dtype(self._geometry)).to(self._device)

        return LayerCache(layer, tensor(), tensor())

    def _batch(self, step: Step, num_seqs: int, width: int | None) -> Batch:
        """The step's batch, filled up to ``num_seqs`` with padding."""
        padding = num_seqs - len(step)
        page_size = self._geometry.page_size
        query_lens = [p.stop - p.start for p in step] + [1] * padding
        kv_lens = [p.stop for p in step] + [1] * padding
        positions = [x for p in step for x in range(p.start, p.stop)] + [0] * padding
        slots = [self._slot(p.sequence, x) for p in step for x in range(p.start, p.stop)]
        width = width or max(-(-length // page_size) for length in kv_lens)
        tables = [self._tables[p.sequence][: -(-p.stop // page_size)] for p in step]
        rows = [table + [0] * (width - len(table)) for table in [*tables, *[[]] * padding]]
        starts = [sum(query_lens[:i]) for i in range(num_seqs + 1)]

        def tensor(data: list[int] | list[list[int]], dtype: torch.dtype) -> Tensor:
            host = torch.tensor(data, dtype=dtype, pin_memory=self._device.type == "cuda")
            return host.to(self._device, non_blocking=True)

        return Batch(
            token_ids=tensor([0] * len(positions), torch.int64),
            positions=tensor(positions, torch.int64),
            slot_mapping=tensor(slots + [0] * padding, torch.int64),
            cu_seqlens_q=tensor(starts, torch.int32),
            seq_lens=tensor(kv_lens, torch.int32),
            block_table=tensor(rows, torch.int32),
            query_lens=query_lens,
            kv_lens=kv_lens,
            num_decodes=sum(p.decode for p in step) + padding,
        )

    def _slot(self, sequence: int, position: int) -> int:
        page_size = self._geometry.page_size
        return self._tables[sequence][position // page_size] * page_size + position % page_size


class _Graph:
    """A decode step of ``num_seqs`` sequences, captured on padding alone."""

    def __init__(self, rig: _Rig, num_seqs: int) -> None:
        self._rig, self._num_seqs = rig, num_seqs
        self._width = max(len(table) for table in rig._tables)
        self._batch = rig._batch((), num_seqs, self._width)
        self._plan = rig._backend.plan(self._batch)
        g = rig._geometry
        zeros = [torch.zeros(num_seqs, h, g.head_dim) for h in (g.num_q_heads, g.num_kv_heads)]
        self._rows = [
            Rows(*(zeros[i].to(rig._device, _dtype(g), copy=True) for i in (0, 1, 1)))
            for _ in rig._values
        ]
        self._out = rig._fresh_out(num_seqs)[:num_seqs]
        warm_up(self._work, rig._device)
        self._recorded: Recorded = record(self._work, rig._device)

    def _work(self) -> None:
        for rows, cache in zip(self._rows, self._rig._caches, strict=True):
            self._rig._one_layer(rows, cache, self._batch, self._plan, self._out)

    def replay(self, step: Step) -> Tensor:
        new = self._rig._batch(step, self._num_seqs, self._width)
        for name in ("token_ids", "positions", "slot_mapping", "seq_lens", "block_table"):
            getattr(self._batch, name).copy_(getattr(new, name))
        batch = Batch(
            token_ids=self._batch.token_ids,
            positions=self._batch.positions,
            slot_mapping=self._batch.slot_mapping,
            cu_seqlens_q=self._batch.cu_seqlens_q,
            seq_lens=self._batch.seq_lens,
            block_table=self._batch.block_table,
            query_lens=new.query_lens,
            kv_lens=new.kv_lens,
            num_decodes=new.num_decodes,
        )
        for static, values in zip(self._rows, self._rig._values, strict=True):
            rows = _gather(values, step)
            for name in ("q", "k", "v"):
                getattr(static, name)[: len(step)] = getattr(rows, name)
        self._out.fill_(torch.nan)
        self._rig._backend.replay(self._plan, batch)
        self._recorded.replay()
        return self._out[: len(step)].clone()


def _gather(values: AnySequence[Rows], step: Step) -> Rows:
    def packed(name: str) -> Tensor:
        return torch.cat([getattr(values[p.sequence], name)[p.start : p.stop] for p in step])

    return Rows(packed("q"), packed("k"), packed("v"))


def _config(geometry: Geometry, sequences: AnySequence[Sequence], run: Run) -> AttentionConfig:
    window = geometry.sliding_window
    return AttentionConfig(
        num_layers=run.layers,
        num_q_heads=geometry.num_q_heads,
        num_kv_heads=geometry.num_kv_heads,
        head_dim=geometry.head_dim,
        scale=geometry.head_dim**-0.5,
        page_size=geometry.page_size,
        dtype=_dtype(geometry),
        device=torch.device(geometry.device),
        max_model_len=max(s.length for s in sequences),
        sliding_windows=() if window is None else (window,) * run.layers,
        logit_soft_cap=geometry.logit_soft_cap,
        deterministic=geometry.deterministic,
    )


def _place_pages(sequences: AnySequence[Sequence], geometry: Geometry, run: Run) -> list[list[int]]:
    """Each sequence's pages, in an order of their own; shared ones are the source's."""
    counts = [_pages(s, geometry) for s in sequences]
    ids = list(range(1, 1 + _SPARE_PAGES + sum(counts)))
    if run.placement:
        Random(run.placement).shuffle(ids)
    tables: list[list[int]] = []
    for sequence, count in zip(sequences, counts, strict=True):
        table = [ids.pop(0) for _ in range(count)]
        if run.shared and sequence.prefix_of is not None:
            whole_pages = sequence.prefix // geometry.page_size
            table[:whole_pages] = tables[sequence.prefix_of][:whole_pages]
        tables.append(table)
    return tables


def _pages(sequence: Sequence, geometry: Geometry) -> int:
    return -(-sequence.length // geometry.page_size)


def _bucket(num_seqs: int) -> int:
    """The captured size for a batch: a power of two that leaves room for padding."""
    return 1 << num_seqs.bit_length()


def _dtype(geometry: Geometry) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, geometry.dtype)
    return dtype
