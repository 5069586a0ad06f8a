"""What the triton attention backend plans: splits, workspaces, work, sizes; what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from isobit.backends.base import LayerCache
from isobit.backends.triton_attention import TritonAttention
from isobit.errors import ConfigError
from isobit.kernels.triton.prefill import prefill_work
from isobit.kernels.triton.tiling import (
    KV_TILE,
    NEAR_END,
    NEAR_SPLIT,
    SPLIT,
    Tiling,
    default_tiling,
)


@pytest.mark.parametrize(
    ("variant", "programs"),
    [({}, 1), ({}, 1 << 12), ({"window": 40}, 1), ({"window": 100, "cap": 3.0}, 1 << 12)],
)
def test_the_splits_that_one_program_walks_change_no_bit(
    variant, programs, served, small, assert_same_bits
):
    lengths = [150, 64, 65, 128, 129, 256]
    parts = [(b, n - 1, n) for b, n in enumerate(lengths)]
    prefilled = served(lengths, **variant)
    expected = [prefilled.attend([(b, 0, n)])[0][-1:] for b, n in enumerate(lengths)]
    for serial in (0, 64, 128, 256):
        tiling = replace(small, serial=serial, serial_from=1, decode_programs=programs)
        case = served(lengths, tiling=tiling, **variant)
        plan = case.backend.plan(case.batch(parts, len(parts)))
        assert plan.partials is not None
        assert plan.partials.acc.shape[1] == {0: 3, 64: 3, 128: 2, 256: 0}[serial]
        for a, b in zip(case.attend(parts, len(parts)), expected, strict=True):
            assert_same_bits(a, b, serial)


def test_other_splits_are_other_bits(served, small, assert_same_bits):
    """The negative control of what is compared here."""
    parts = [(0, 149, 150)]
    (expected,) = served([150], tiling=small).attend(parts, 1)
    (other,) = served([150], tiling=replace(small, near_split=128)).attend(parts, 1)
    with pytest.raises(AssertionError):
        assert_same_bits(other, expected)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the padding's queries
@pytest.mark.parametrize("variant", [{}, {"window": 40}])
def test_the_grid_of_a_graph_changes_no_bit(variant, served, assert_same_bits):
    case = served([150, 20, 64], heads=(2, 1), **variant)
    parts = [(0, 149, 150), (1, 19, 20), (2, 63, 64)]
    exact = case.attend(parts, 3)
    case.backend.capture(5)
    for padding, slots, serial in ((0, 3, 1), (2, 2, 2)):
        plan = case.backend.plan(case.batch(parts, 3, padding))
        assert plan.partials is not None
        assert plan.partials.acc.shape[:2] == (3 + padding, slots)
        assert plan.partials.serial == serial
        for a, b in zip(case.attend(parts, 3, padding), exact, strict=True):
            assert_same_bits(a, b)


def test_the_graphs_share_one_workspace(served):
    case = served([150] * 5, heads=(2, 1))
    case.backend.capture(5)
    plans = [
        case.backend.plan(case.batch([(b, 149, 150) for b in range(n)], n)) for n in range(1, 6)
    ]
    assert len({plan.partials.acc.data_ptr() for plan in plans}) == 1
    states = [plan.partials.acc.shape[0] * plan.partials.acc.shape[1] for plan in plans]
    assert states == [3, 6, 9, 8, 10]
    room = plans[0].partials.acc.untyped_storage().nbytes()
    assert room == 10 * 2 * (16 + 2) * 4


def test_a_step_larger_than_the_graphs_has_a_workspace_of_its_own(served, assert_same_bits):
    case = served([70, 20])
    case.backend.capture(1)
    parts = [(0, 69, 70), (1, 19, 20)]
    plan = case.backend.plan(case.batch(parts, 2))
    assert plan.partials is not None
    assert plan.partials.acc.shape[:2] == (2, 2)
    for a, b in zip(case.attend(parts, 2), served([70, 20]).attend(parts, 2), strict=True):
        assert_same_bits(a, b)


def test_a_plan_is_replayed_with_new_lengths(served, assert_same_bits):
    case = served([150, 20], heads=(2, 1))
    case.backend.capture(2)
    batch = case.batch([(0, 4, 5), (1, 0, 1)], 2)
    plan = case.backend.plan(batch)
    parts = [(0, 149, 150), (1, 19, 20)]
    now = case.batch(parts, 2)
    for name in ("slot_mapping", "seq_lens", "block_table"):
        getattr(batch, name).copy_(getattr(now, name))
    refreshed = replace(batch, kv_lens=now.kv_lens)
    case.backend.replay(plan, refreshed)
    q = case.queries(parts)
    out = torch.full_like(q, torch.nan)
    case.backend.run_written(q, case.cache(parts), plan, out)
    assert_same_bits(out, torch.cat(case.attend(parts, 2)))


def test_the_longest_walks_come_first():
    work = prefill_work([1, 8, 3], [90, 8, 40], first=1, group=3, rows=16)
    assert work == [(2, 0), (1, 1), (1, 0)]
    rows = prefill_work([200], [200], first=0, group=5, rows=16)
    assert sorted(rows) == [(0, tile) for tile in range(math.ceil(200 * 5 / 16))]


@pytest.mark.parametrize("head_dim", [16, 64, 80, 128, 192, 256])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("shared_memory", [101376, 166912, 232448])
def test_tilings_differ_only_in_what_is_free(head_dim, itemsize, shared_memory):
    chosen = default_tiling(head_dim, itemsize, shared_memory)
    assert (chosen.kv_tile, chosen.near_split) == (KV_TILE, NEAR_SPLIT)
    assert (chosen.near_end, chosen.split) == (NEAR_END, SPLIT)


def test_splits_are_counted_as_the_kernels_count_them():
    tiling = Tiling(near_split=64, near_end=128, split=128, serial=256)
    lengths = {1: 1, 64: 1, 65: 2, 128: 2, 129: 3, 256: 3, 257: 4}
    assert {n: tiling.splits(n) for n in lengths} == lengths
    assert (tiling.serial_splits(127), tiling.serial_splits(128)) == (1, 3)
    assert replace(tiling, serial=0).serial_splits(128) == 1


def test_what_cannot_be_served_is_refused(monkeypatch, served):
    case = served([20])
    with pytest.raises(ConfigError, match="positive scale"):
        TritonAttention(replace(case.backend.config, scale=-1.0))
    with pytest.raises(ConfigError, match="positive soft cap"):
        TritonAttention(replace(case.backend.config, logit_soft_cap=0.0))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match="runs on a CUDA device"):
        TritonAttention(replace(case.backend.config, device=torch.device("cpu")))
    batch = case.batch([(0, 0, 20)], 0)
    shape = case.backend.kv_cache_shape(4)
    odd = torch.zeros(shape, device=case.backend.config.device).repeat(1, 1, 1, 2)[..., ::2]
    with pytest.raises(ValueError, match="contiguous"):
        case.backend.run_written(
            case.q[0],
            LayerCache(0, odd, odd),
            case.backend.plan(batch),
            torch.empty_like(case.q[0]),
        )
