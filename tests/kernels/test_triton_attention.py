"""The triton backend: on a CUDA device if there is one, else under Triton's interpreter.

The interpreter multiplies by numpy, which cannot do bfloat16 and whose order of addition follows
the shapes. Here its ``tl.dot`` adds in ascending order instead, as the contract of the device has
it: one order, whatever the height of a tile.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

if sys.platform != "linux":
    pytest.skip("triton is there on Linux only", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from triton.runtime import interpreter

from isobit.backends.base import AttentionConfig, Batch, LayerCache
from isobit.backends.triton_attention import TritonAttention
from isobit.errors import ConfigError
from isobit.kernels.triton import decode, prefill, tiling
from isobit.kernels.triton.prefill import prefill_work
from isobit.kernels.triton.tiling import (
    KV_TILE,
    NEAR_END,
    NEAR_SPLIT,
    SPLIT,
    Launch,
    Tiling,
    default_tiling,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EDGES = [1, 16, 63, 64, 65, 129, 150]
TILING = Tiling(
    near_split=64,
    near_end=128,
    split=128,
    prefill=Launch(16, 4, 1),
    decode=Launch(16, 4, 1),
    serial=128,
    serial_from=4,
)
VARIANTS = [
    pytest.param({}, id="plain"),
    pytest.param({"window": 1}, id="window-1"),
    pytest.param({"window": 40}, id="window-40"),
    pytest.param({"window": 64, "cap": 3.0}, id="window-64-cap"),
]


def ordered_dot(builder, a, b, d, input_precision, max_num_imprecise_acc):
    """``d + a @ b`` in fp32, k ascending."""
    wide = [
        builder.cast_impl(x, interpreter.tl.float32).data
        if x.dtype.scalar == interpreter.tl.bfloat16
        else x.data.astype("float32")
        for x in (a, b)
    ]
    total = d.data.copy()
    for k in range(wide[0].shape[1]):
        total += wide[0][:, k, None] * wide[1][None, k]
    return interpreter.TensorHandle(total, d.dtype.scalar)


@pytest.fixture(autouse=True)
def _ordered_dot(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", ordered_dot)
    with torch.inference_mode():
        yield


@dataclass
class Served:
    """Sequences in shuffled pages, and the backend that attends to them."""

    backend: TritonAttention
    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    table: Tensor
    num_pages: int

    def slots(self, b: int, first: int, end: int) -> Tensor:
        size = self.backend.config.page_size
        positions = torch.arange(first, end, device=DEVICE)
        return self.table[b].long()[positions // size] * size + positions % size

    def cache(self, parts: list[tuple[int, int, int]]) -> LayerCache:
        """What earlier steps wrote, and the engine in this one; everything else is NaN."""
        shape = self.backend.kv_cache_shape(self.num_pages)
        dtype = self.backend.config.dtype
        k, v = (torch.full(shape, torch.nan, dtype=dtype, device=DEVICE) for _ in range(2))
        for b, _, end in parts:
            slots = self.slots(b, 0, end)
            k.view(-1, *shape[2:])[slots] = self.k[b][:end]
            v.view(-1, *shape[2:])[slots] = self.v[b][:end]
        return LayerCache(0, k, v)

    def queries(self, parts: list[tuple[int, int, int]]) -> Tensor:
        return torch.cat([self.q[b][first:end] for b, first, end in parts])

    def batch(self, parts: list[tuple[int, int, int]], decodes: int, padding: int = 0) -> Batch:
        lens = [end - first for _, first, end in parts] + [1] * padding
        kv_lens = [end for _, _, end in parts] + [1] * padding
        slots = [self.slots(*part) for part in parts]
        pages = torch.zeros(len(lens), self.table.shape[1] + 1, dtype=torch.int32, device=DEVICE)
        pages[: len(parts), :-1] = self.table[[b for b, _, _ in parts]]
        for row, length in enumerate(kv_lens):  # past the last page stands the null page
            pages[row, -(-length // self.backend.config.page_size) :] = 0
        zeros = torch.zeros(padding, dtype=torch.int64, device=DEVICE)
        slot_mapping = torch.cat([*slots, zeros])
        return Batch(
            token_ids=torch.zeros_like(slot_mapping),
            positions=torch.zeros_like(slot_mapping),  # not read
            slot_mapping=slot_mapping,
            cu_seqlens_q=torch.tensor([0, *lens], device=DEVICE).cumsum(0, dtype=torch.int32),
            seq_lens=torch.tensor(kv_lens, dtype=torch.int32, device=DEVICE),
            block_table=pages,
            query_lens=lens,
            kv_lens=kv_lens,
            num_decodes=decodes + padding,
        )

    def attend(
        self, parts: list[tuple[int, int, int]], decodes: int = 0, padding: int = 0
    ) -> list[Tensor]:
        """parts: (sequence, first position, end), decodes first -> each part's rows."""
        batch = self.batch(parts, decodes, padding)
        q = torch.cat([self.queries(parts), torch.full_like(self.q[0][:padding], torch.nan)])
        out = torch.full_like(q, torch.nan)
        self.backend.run_written(q, self.cache(parts), self.backend.plan(batch), out)
        return list(out.split(batch.query_lens))[: len(parts)]


def served(
    lengths: list[int],
    *,
    heads: tuple[int, int] = (3, 1),
    dim: int = 16,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    cap: float | None = None,
    tiling: Tiling = TILING,
) -> Served:
    generator = torch.Generator().manual_seed(sum(lengths) + dim)
    config = AttentionConfig(
        num_layers=1,
        num_q_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=dim,
        scale=dim**-0.5,
        page_size=page_size,
        dtype=dtype,
        device=DEVICE,
        max_model_len=256,
        sliding_windows=() if window is None else (window,),
        logit_soft_cap=cap,
    )
    q, k, v = (
        [torch.randn(n, h, dim, generator=generator).to(DEVICE, dtype) for n in lengths]
        for h in (heads[0], heads[1], heads[1])
    )
    counts = [-(-length // page_size) for length in lengths]
    order = 1 + torch.randperm(sum(counts) + 2, generator=generator, dtype=torch.int32)
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32, device=DEVICE)
    for b, count in enumerate(counts):
        table[b, :count] = order[sum(counts[:b]) : sum(counts[: b + 1])]
    return Served(TritonAttention(config, tiling), q, k, v, table, sum(counts) + 3)


def reference(case: Served, b: int) -> Tensor:
    """Attention of one whole sequence in fp64."""
    config = case.backend.config
    q, k, v = (x[b].cpu().double().transpose(0, 1) for x in (case.q, case.k, case.v))
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * config.scale
    if config.logit_soft_cap is not None:
        scores = config.logit_soft_cap * torch.tanh(scores / config.logit_soft_cap)
    ones = torch.ones(scores.shape[-2:], dtype=torch.bool)
    hidden = ones.triu(1)
    if (window := config.sliding_window(0)) is not None:
        hidden = hidden | ones.tril(-window)
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16 if x.element_size() == 2 else torch.int32)


def assert_same_bits(a: Tensor, b: Tensor, case: object = "") -> None:
    assert not a.isnan().any(), case
    assert torch.equal(bits(a), bits(b)), case


def assert_close(case: Served, b: int, result: Tensor) -> None:
    limit = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}[result.dtype]
    exact = reference(case, b)
    torch.testing.assert_close(result.cpu().double(), exact, rtol=0, atol=limit)


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
def test_close_to_fp64(page_size, dtype):
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
def test_head_layouts(heads, dim):
    case = served([70], heads=heads, dim=dim)
    (whole,) = case.attend([(0, 0, 70)])
    assert_close(case, 0, whole)
    for position in (0, 63, 69):
        (row,) = case.attend([(0, position, position + 1)], decodes=1)
        assert_same_bits(row, whole[position : position + 1], position)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decode_and_chunks_equal_prefill(variant, dtype):
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
def test_neighbours_and_order_change_no_bit(variant):
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


def test_pages_and_launches_change_no_bit():
    parts = [(0, 149, 150), (1, 0, 70)]
    expected = served([150, 70]).attend(parts, 1)
    taller = replace(TILING, prefill=Launch(64, 8, 2), decode=Launch(32, 2, 2))
    for changed in (
        served([150, 70], page_size=1),
        served([150, 70], page_size=24),
        served([150, 70], page_size=64),
        served([150, 70], page_size=128),
        served([150, 70], tiling=taller),
        served([150, 70], tiling=replace(TILING, decode_programs=1)),
        served([150, 70], tiling=replace(TILING, flat=True)),
    ):
        for a, b in zip(changed.attend(parts, 1), expected, strict=True):
            assert_same_bits(a, b)


def test_a_cache_too_large_for_int32_changes_no_bit(monkeypatch):
    parts = [(0, 149, 150), (1, 0, 70)]
    expected = served([150, 70]).attend(parts, 1)

    def wide(*arguments):
        return tiling.kernel_arguments(*arguments) | {"WIDE": True}

    monkeypatch.setattr(decode, "kernel_arguments", wide)
    monkeypatch.setattr(prefill, "kernel_arguments", wide)
    for a, b in zip(served([150, 70]).attend(parts, 1), expected, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("variant", [{}, {"window": 40}, {"window": 100, "cap": 3.0}])
@pytest.mark.parametrize("programs", [1, 1 << 12])
def test_the_splits_that_one_program_walks_change_no_bit(variant, programs):
    lengths = [150, 64, 65, 128, 129, 256]
    parts = [(b, n - 1, n) for b, n in enumerate(lengths)]
    prefilled = served(lengths, **variant)
    expected = [prefilled.attend([(b, 0, n)])[0][-1:] for b, n in enumerate(lengths)]
    for serial in (0, 64, 128, 256):
        tiling = replace(TILING, serial=serial, serial_from=1, decode_programs=programs)
        case = served(lengths, tiling=tiling, **variant)
        plan = case.backend.plan(case.batch(parts, len(parts)))
        assert plan.partials is not None
        assert plan.partials.acc.shape[1] == {0: 3, 64: 3, 128: 2, 256: 0}[serial]
        for a, b in zip(case.attend(parts, len(parts)), expected, strict=True):
            assert_same_bits(a, b, serial)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the padding's queries
@pytest.mark.parametrize("variant", [{}, {"window": 40}])
def test_the_grid_of_a_graph_changes_no_bit(variant):
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


def test_the_graphs_share_one_workspace():
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


def test_a_step_larger_than_the_graphs_has_a_workspace_of_its_own():
    case = served([70, 20])
    case.backend.capture(1)
    parts = [(0, 69, 70), (1, 19, 20)]
    plan = case.backend.plan(case.batch(parts, 2))
    assert plan.partials is not None
    assert plan.partials.acc.shape[:2] == (2, 2)
    for a, b in zip(case.attend(parts, 2), served([70, 20]).attend(parts, 2), strict=True):
        assert_same_bits(a, b)


def test_a_plan_is_replayed_with_new_lengths():
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


def test_the_cache_is_only_read():
    case = served([40, 30], page_size=16)
    parts = [(1, 29, 30), (0, 10, 40)]
    cache, q = case.cache(parts), case.queries(parts)
    before = [cache.k.clone(), cache.v.clone()]
    plan = case.backend.plan(case.batch(parts, 1))
    case.backend.run_written(q, cache, plan, torch.empty_like(q))
    for old, new in zip(before, (cache.k, cache.v), strict=True):
        assert torch.equal(bits(old), bits(new))


def test_extreme_scores():
    case = served([130])
    case.q[0] *= 300
    (whole,) = case.attend([(0, 0, 130)])
    exact = reference(case, 0)
    torch.testing.assert_close(whole.cpu().double(), exact, rtol=1e-3, atol=1e-3)
    (last,) = case.attend([(0, 129, 130)], 1)
    assert_same_bits(last, whole[129:])


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


def test_what_cannot_be_served_is_refused(monkeypatch):
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
    odd = torch.zeros(shape, device=DEVICE).repeat(1, 1, 1, 2)[..., ::2]
    with pytest.raises(ValueError, match="contiguous"):
        case.backend.run(
            case.q[0],
            case.k[0],
            case.v[0],
            LayerCache(0, odd, odd),
            case.backend.plan(batch),
            torch.empty_like(case.q[0]),
        )


@pytest.mark.parametrize(
    "sizes", [{"near_split": 128}, {"near_end": 0}, {"near_end": 256}], ids=str
)
def test_splits_that_follow_the_batch_are_caught(sizes):
    """Negative control: splits of other sizes for a larger batch give other bits."""
    small, large = (
        served([250, 140], tiling=tiling) for tiling in (TILING, replace(TILING, **sizes))
    )
    alone = small.attend([(0, 249, 250)], 1)[0]
    together = large.attend([(0, 249, 250), (1, 139, 140)], 2)[0]
    assert not torch.equal(bits(alone), bits(together))
