"""The flashinfer backend over a fake FlashInfer: what is planned when, and read from where.

What FlashInfer's own kernels give can be shown on a GPU only:
``isobit plugins test flashinfer --device cuda``.
"""

from __future__ import annotations

import gc
import sys
from dataclasses import replace

import pytest
import torch

from isobit.backends.base import AttentionConfig, Batch, LayerCache
from isobit.plugins.conformance.judge import Judge
from isobit.plugins.conformance.scenario import (
    Run,
    Sequence,
    Trial,
    alone,
    chunks,
    then_decode,
    together,
    whole,
)

LENGTHS = [40, 1, 130, 16, 17]
SEQUENCES = tuple(Sequence(length=n + 3, seed=i) for i, n in enumerate(LENGTHS))
PIECES = [then_decode(i, n, n + 3) for i, n in enumerate(LENGTHS)]
# Some decode while others prefill, and batches of every size up to all.
STEPS = together(*PIECES, delays=(0, 1, 0, 2, 1))
VARIANTS = [
    {},
    {"sliding_window": 20, "logit_soft_cap": 5.0},
    {"num_q_heads": 9, "num_kv_heads": 3},
]


def trial(geometry, run: Run, against: Run | None = None) -> Trial:
    return Trial(
        label="", cells=(), geometry=geometry, sequences=SEQUENCES, run=run, against=against
    )


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("graph", [False, True])
def test_close_to_fp64(judge: Judge, geometry, variant, deterministic, graph) -> None:
    """Over pages that held NaN, each sequence's in an order of its own."""
    shape = replace(geometry, deterministic=deterministic, **variant)
    run = Run(steps=STEPS, unwritten="nan", graph=graph)
    assert judge.judge(trial(shape, run)) is None


@pytest.mark.parametrize("page_size", [1, 32])
def test_page_sizes(judge: Judge, geometry, page_size) -> None:
    lengths = [7, 1, 12]
    sequences = tuple(Sequence(length=n + 3, seed=i) for i, n in enumerate(lengths))
    steps = together(*(then_decode(i, n, n + 3) for i, n in enumerate(lengths)), delays=(0, 1))
    case = trial(replace(geometry, page_size=page_size), Run(steps=steps, audit=True, layers=2))
    assert judge.judge(replace(case, sequences=sequences)) is None


def test_neighbours_change_no_bit(judge: Judge, geometry) -> None:
    assert judge.judge(trial(geometry, Run(steps=STEPS), Run(steps=alone(*PIECES)))) is None


def test_splits_that_follow_the_batch_are_caught(judge: Judge, geometry) -> None:
    """The control: what FlashInfer does where it is left to choose."""
    lifted = replace(geometry, deterministic=False)
    found = judge.judge(trial(lifted, Run(steps=STEPS), Run(steps=alone(*PIECES))))
    assert found is not None
    assert found.sequence >= 0


def _in_chunks(geometry) -> Trial:
    cut = [chunks(i, n, (1, 16, 33, 70)) for i, n in enumerate(LENGTHS)]
    uncut = [whole(i, n) for i, n in enumerate(LENGTHS)]
    return trial(geometry, Run(steps=together(*cut)), Run(steps=alone(*uncut)))


def test_chunks_change_no_bit(judge: Judge, geometry) -> None:
    assert judge.judge(_in_chunks(geometry)) is None


def test_a_query_tile_that_follows_the_batch_is_caught(judge, ours, geometry, monkeypatch) -> None:
    """The control: the ``fa2`` prefill in place of ``fa3``."""
    right = ours.prefill.prefill_wrapper

    def wrong(floats, int_bytes, backend):
        assert backend == "fa3"
        return right(floats, int_bytes, "fa2")

    monkeypatch.setattr(ours.prefill, "prefill_wrapper", wrong)
    found = judge.judge(_in_chunks(geometry))
    assert found is not None
    assert found.sequence >= 0


def test_a_decode_has_other_bits_than_a_prefill(judge: Judge, geometry) -> None:
    """Why ``decode_equals_prefill`` is not declared."""
    prefilled = [whole(i, n + 3) for i, n in enumerate(LENGTHS)]
    found = judge.judge(trial(geometry, Run(steps=STEPS), Run(steps=alone(*prefilled))))
    assert found is not None
    assert found.position >= LENGTHS[found.sequence]


def test_graphs_give_what_ordinary_steps_give(judge: Judge, geometry) -> None:
    # One more starts late: what is not a decode alone runs as it comes, between replays.
    assert judge.judge(trial(geometry, Run(steps=STEPS, graph=True), Run(steps=STEPS))) is None


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_plan_that_is_not_refreshed_is_caught(ours, geometry, deterministic) -> None:
    class Stale(ours.backend):
        def replay(self, plan, batch) -> None:
            """Leave everything as it was captured."""

    shape = replace(geometry, deterministic=deterministic)
    found = Judge(Stale).judge(trial(shape, Run(steps=STEPS, graph=True)))
    assert found is not None
    assert found.sequence >= 0


def make(ours, **changes):
    fields = {
        "num_layers": 1,
        "num_q_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        "scale": 0.125,
        "page_size": 16,
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "max_model_len": 320,
    }
    return ours.backend(AttentionConfig(**fields | changes))


def decodes(*kv_lens: int, prefill: int = 0) -> Batch:
    """A step of decodes, and one prefill of so many rows; pages follow one another."""
    lens = [*kv_lens, prefill] if prefill else list(kv_lens)
    queries = [1] * len(kv_lens) + ([prefill] if prefill else [])
    width = max(-(-n // 16) for n in lens)
    return Batch(
        token_ids=torch.zeros(sum(queries), dtype=torch.int64),
        positions=torch.zeros(sum(queries), dtype=torch.int64),
        slot_mapping=torch.zeros(sum(queries), dtype=torch.int64),
        cu_seqlens_q=torch.tensor([0, *queries]).cumsum(0).int(),
        seq_lens=torch.tensor(lens, dtype=torch.int32),
        block_table=torch.arange(1, 1 + len(lens) * width).int().view(len(lens), width),
        query_lens=queries,
        kv_lens=lens,
        num_decodes=len(kv_lens),
    )


DECODE, PREFILL = "BatchDecodeWithPagedKVCacheWrapper", "BatchPrefillWithPagedKVCacheWrapper"


def test_unsplit_decodes_are_planned_once_a_number_of_sequences(ours, log) -> None:
    backend = make(ours)
    backend.capture(4)
    log.clear()
    for step in (decodes(5, 9), decodes(100, 33), decodes(7), decodes(8, 17)):
        backend.plan(step)
    assert log == [(DECODE, 2), (DECODE, 1)]
    plan = backend.plan(decodes(5, 9))
    log.clear()
    backend.replay(plan, decodes(50, 3))
    assert log == []


def test_a_mixed_step_is_two_calls(ours, log) -> None:
    backend = make(ours)
    log.clear()
    plan = backend.plan(decodes(5, 9, prefill=20))
    assert log == [(DECODE, 2), (PREFILL, 1)]
    assert (plan.num_decodes, len(plan.decodes), len(plan.prefills)) == (2, 1, 1)
    assert backend.plan(decodes(5)).prefills == {}


def test_what_a_recorded_step_reads_stays_where_it_is(ours, monkeypatch) -> None:
    monkeypatch.setattr(ours.decode, "_ORDINARY_SEQS", 1)
    backend = make(ours)
    backend.capture(2)
    first = backend.plan(decodes(5, 9))
    read = [t.data_ptr() for t in vars(ours.made[-1].buffers).values()]
    backend.plan(decodes(300, 300, prefill=40))  # makes the tensors of ordinary steps grow
    backend.plan(decodes(*range(1, 40)))
    again = backend.plan(decodes(320, 320))
    assert first.decodes[-1] is again.decodes[-1]
    assert backend.plan(decodes(5, 9, prefill=3)).decodes[-1] is not first.decodes[-1]
    planned = [w for w in ours.made if w.planned is not None]
    (wrapper,) = [w for w in planned if w.buffers.indptr.data_ptr() == read[0]]
    assert [t.data_ptr() for t in vars(wrapper.buffers).values()] == read
    assert wrapper.buffers.indptr.tolist() == [0, 20, 40]
    assert wrapper.buffers.last.tolist() == [16, 16]
    assert wrapper.buffers.indices.tolist() == list(range(1, 41))


def test_each_window_has_its_wrappers(ours) -> None:
    backend = make(ours, num_layers=3, sliding_windows=(None, 5, 5))
    cache = [torch.randn(60, 16, 2, 64, dtype=torch.bfloat16) for _ in range(2)]
    step = decodes(50, 33, prefill=40)
    plan = backend.plan(step)
    assert set(plan.decodes) == set(plan.prefills) == {-1, 4}
    q = torch.randn(42, 4, 64, dtype=torch.bfloat16)
    outs = [torch.empty_like(q) for _ in range(3)]
    for layer, out in enumerate(outs):
        backend.run_written(q, LayerCache(layer, *cache), plan, out)
    assert torch.equal(outs[1], outs[2])
    assert (outs[0] != outs[1]).any(dim=(1, 2))[[0, 1, 41]].all()


@pytest.mark.parametrize("deterministic", [True, False])
def test_no_host_buffer_is_written_while_a_copy_reads_it(
    ours, monkeypatch, deterministic: bool
) -> None:
    def steps():
        backend = make(ours, deterministic=deterministic)
        for rows in (20, 3, 200, 40_000):  # the last needs a larger int workspace
            backend.plan(decodes(5, 9, prefill=rows))
        backend.capture(2)
        plan = backend.plan(decodes(5, 9))
        backend.replay(plan, decodes(6, 10))
        backend.replay(plan, decodes(7, 11))

    steps()
    monkeypatch.setattr(ours.wrappers.HostCopies, "wait", lambda copies: None)
    with pytest.raises(Exception, match="while a copy reads it"):
        steps()


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_host_buffer_is_freed_only_when_its_copy_is_done(
    ours, monkeypatch, deterministic: bool
) -> None:
    monkeypatch.setattr(ours.decode, "_ORDINARY_SEQS", 1)

    def freed_early() -> list[str]:
        backend = make(ours, deterministic=deterministic)
        backend.plan(decodes(5, 9, prefill=20))
        backend.plan(decodes(*range(1, 40)))  # what ordinary steps use is outgrown
        ours.made.clear()  # now the backend alone holds them
        del backend
        gc.collect()
        return ours.freed_early

    assert freed_early() == []
    monkeypatch.setattr(ours.wrappers, "_wait_for", lambda copies: None)
    assert {DECODE, PREFILL} <= set(freed_early())


def test_a_lost_device_is_not_waited_for(ours, monkeypatch) -> None:
    asked, unraisable = [], []

    def lost(copies):
        asked.append(copies)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    backend = make(ours)
    monkeypatch.setattr(ours.wrappers.HostCopies, "wait", lost)
    del backend
    gc.collect()
    assert len(asked) == len(ours.made)
    assert not unraisable


def test_lifted_graphs_have_wrappers_of_fixed_buffers(ours, log) -> None:
    backend = make(ours, deterministic=False)
    backend.capture(4)
    log.clear()
    two = backend.plan(decodes(5, 9))
    assert ours.made[-1].graph
    assert backend.plan(decodes(5, 9)).decodes[-1] is two.decodes[-1]
    backend.replay(two, decodes(300, 9))
    assert log == [(DECODE, 2)] * 3  # planned again for each replay
    assert ours.made[-1].buffers.last.tolist() == [12, 9]
    assert backend.plan(decodes(1, 2, 3, 4, 5)).decodes[-1] is not two.decodes[-1]
    backend.plan(decodes(1, 2, 3))
    graphs = [w for w in ours.made if getattr(w, "graph", False)]
    assert len({w.fixed[1].data_ptr() for w in graphs}) == 1  # pages are listed once for all sizes
    assert len({w.fixed[2].data_ptr() for w in graphs}) == len(graphs) == 2


def test_what_flashinfer_refuses_is_said_with_what_to_lower(ours, monkeypatch) -> None:
    backend = make(ours)

    def refuse(wrapper, *arguments, **options):
        raise RuntimeError("Buffer overflow when allocating memory for batch_prefill_tmp_v")

    for wrapper in ours.made:
        monkeypatch.setattr(wrapper, "plan", refuse.__get__(wrapper))
    with pytest.raises(Exception, match=r"Buffer overflow.*lower max_num_seqs"):
        backend.plan(decodes(5, prefill=9))
