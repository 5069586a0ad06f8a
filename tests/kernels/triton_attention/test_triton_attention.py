"""The triton attention backend gives the right values, and always the same bits."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from isobit.kernels.triton import decode, prefill, tiling
from isobit.kernels.triton.tiling import Launch

EDGES = [1, 16, 63, 64, 65, 129, 150]
VARIANTS = [
    pytest.param({}, id="plain"),
    pytest.param({"window": 1}, id="window-1"),
    pytest.param({"window": 40}, id="window-40"),
    pytest.param({"window": 64, "cap": 3.0}, id="window-64-cap"),
]


@pytest.mark.parametrize(
    ("page_size", "dtype"),
    [
        (1, torch.float32),
        (16, torch.bfloat16),
        (16, torch.float16),
        (48, torch.float16),
        (64, torch.float32),
        (64, torch.bfloat16),
        (256, torch.bfloat16),
    ],
)
def test_close_to_fp64(page_size, dtype, served, assert_close):
    lengths = [1, 64, 65, 130]
    case = served(lengths, heads=(2, 1), page_size=page_size, dtype=dtype)
    for b, result in enumerate(case.attend([(b, 0, n) for b, n in enumerate(lengths)])):
        assert_close(case, b, result)


@pytest.mark.parametrize(
    ("heads", "dim"),
    [
        ((1, 1), 24),
        ((4, 4), 32),
        ((14, 2), 40),
        ((9, 3), 64),
        ((16, 1), 80),
        ((2, 1), 128),
        ((17, 1), 192),
        ((2, 1), 256),
    ],
)
def test_head_layouts(heads, dim, served, assert_same_bits, assert_close):
    case = served([70], heads=heads, dim=dim)
    (whole,) = case.attend([(0, 0, 70)])
    assert_close(case, 0, whole)
    for position in (0, 63, 69):
        (row,) = case.attend([(0, position, position + 1)], decodes=1)
        assert_same_bits(row, whole[position : position + 1], position)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_and_chunks_equal_prefill(variant, dtype, served, assert_same_bits, assert_close):
    case = served([150], dtype=dtype, **variant)
    (whole,) = case.attend([(0, 0, 150)])
    assert_close(case, 0, whole)
    for cuts in ([1, 64], [63], [7, 128, 129], [100]):
        parts = [case.attend([(0, a, b)])[0] for a, b in pairwise([0, *cuts, 150])]
        assert_same_bits(torch.cat(parts), whole, cuts)
    for position in [n - 1 for n in EDGES]:
        (row,) = case.attend([(0, position, position + 1)], decodes=1)
        assert_same_bits(row, whole[position : position + 1], position)


@pytest.mark.parametrize("variant", [{}, {"window": 40}])
def test_neighbours_and_order_change_no_bit(variant, served, assert_same_bits):
    lengths = [150, 1, 64, 65, 130]
    case = served(lengths, **variant)
    alone = [case.attend([(b, 0, n)])[0] for b, n in enumerate(lengths)]
    decodes = [(4, 129, 130), (2, 63, 64), (1, 0, 1)]
    prefills = [(0, 100, 150), (3, 0, 65), (4, 0, 17)]
    for parts, count in (
        (decodes + prefills, 3),
        (decodes[::-1] + prefills[::-1], 3),
        (decodes[:1] + prefills[1:], 1),
        (decodes, 0),  # one row of a prefill instead of a decode
    ):
        for (b, first, end), result in zip(parts, case.attend(parts, count), strict=True):
            assert_same_bits(result, alone[b][first:end], (count, b, first))


def test_pages_and_launches_change_no_bit(served, small, assert_same_bits):
    parts = [(0, 149, 150), (1, 0, 70)]
    expected = served([150, 70]).attend(parts, 1)
    taller = replace(small, prefill=Launch(64, 8, 2), decode=Launch(32, 2, 2))
    for changed in (
        served([150, 70], page_size=1),
        served([150, 70], page_size=24),
        served([150, 70], page_size=64),
        served([150, 70], page_size=128),
        served([150, 70], tiling=taller),
        served([150, 70], tiling=replace(small, decode_programs=1)),
        served([150, 70], tiling=replace(small, flat=True)),
    ):
        for a, b in zip(changed.attend(parts, 1), expected, strict=True):
            assert_same_bits(a, b)


def test_a_cache_too_large_for_int32_changes_no_bit(monkeypatch, served, assert_same_bits):
    parts = [(0, 149, 150), (1, 0, 70)]
    expected = served([150, 70]).attend(parts, 1)

    def wide(*arguments):
        return tiling.kernel_arguments(*arguments) | {"WIDE": True}

    monkeypatch.setattr(decode, "kernel_arguments", wide)
    monkeypatch.setattr(prefill, "kernel_arguments", wide)
    for a, b in zip(served([150, 70]).attend(parts, 1), expected, strict=True):
        assert_same_bits(a, b)


def test_the_cache_is_only_read(served, bits):
    case = served([40, 30], page_size=16)
    parts = [(1, 29, 30), (0, 10, 40)]
    cache, q = case.cache(parts), case.queries(parts)
    before = [cache.k.clone(), cache.v.clone()]
    plan = case.backend.plan(case.batch(parts, 1))
    case.backend.run_written(q, cache, plan, torch.empty_like(q))
    for old, new in zip(before, (cache.k, cache.v), strict=True):
        assert torch.equal(bits(old), bits(new))


def test_extreme_scores(served, reference, assert_same_bits):
    case = served([130])
    case.q[0] *= 300
    (whole,) = case.attend([(0, 0, 130)])
    exact = reference(case, 0)
    torch.testing.assert_close(whole.cpu().double(), exact, rtol=1e-3, atol=1e-3)
    (last,) = case.attend([(0, 129, 130)], 1)
    assert_same_bits(last, whole[129:])


@pytest.mark.parametrize(
    "sizes", [{"near_split": 128}, {"near_end": 0}, {"near_end": 256}], ids=str
)
def test_splits_that_follow_the_batch_are_caught(sizes, served, small, bits):
    """Negative control: splits of other sizes for a larger batch give other bits."""
    small, large = (
        served([250, 140], tiling=tiling) for tiling in (small, replace(small, **sizes))
    )
    alone = small.attend([(0, 249, 250)], 1)[0]
    together = large.attend([(0, 249, 250), (1, 139, 140)], 2)[0]
    assert not torch.equal(bits(alone), bits(together))
