from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from isobit.kernels.attention import write_kv
from isobit.kernels.kernel_set import KernelSet
from isobit.kernels.native import library

EDGES = [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 200]


@dataclass
class Paged:
    """Sequences of given lengths in shuffled pages; everything else in the cache is NaN."""

    kernels: KernelSet
    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    k_cache: Tensor
    v_cache: Tensor
    table: Tensor

    def attend(self, parts: list[tuple[int, int, int]]) -> list[Tensor]:
        """parts: (sequence, first position, end) -> each part's rows."""
        out = torch.full_like(torch.cat([self.q[b][a:e] for b, a, e in parts]), torch.nan)
        lens = [end - first for _, first, end in parts]
        self.kernels.paged_attention(
            torch.cat([self.q[b][first:end] for b, first, end in parts]),
            self.k_cache,
            self.v_cache,
            self.table[[b for b, _, _ in parts]],
            torch.tensor([0, *lens], dtype=torch.int32).cumsum(0, dtype=torch.int32),
            torch.tensor([end for _, _, end in parts], dtype=torch.int32),
            self.q[0].shape[-1] ** -0.5,
            out,
        )
        return list(out.split(lens))


def paged(
    kernels: KernelSet,
    lengths: list[int],
    *,
    heads: tuple[int, int] = (6, 2),
    dim: int = 32,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Paged:
    generator = torch.Generator().manual_seed(sum(lengths) + page_size + dim)
    num_q_heads, num_kv_heads = heads
    pages = [-(-length // page_size) for length in lengths]
    order = torch.randperm(sum(pages) + 2, generator=generator, dtype=torch.int32)
    # Entries past the last page point out of the cache: reading one would crash.
    table = torch.full((len(lengths), max(pages) + 1), 2**30, dtype=torch.int32)
    shape = (sum(pages) + 2, page_size, num_kv_heads, dim)
    k_cache, v_cache = (torch.full(shape, torch.nan, dtype=dtype) for _ in range(2))
    q, k, v = (
        [torch.randn(n, h, dim, generator=generator).to(dtype) for n in lengths]
        for h in (num_q_heads, num_kv_heads, num_kv_heads)
    )
    for b, length in enumerate(lengths):
        own = order[sum(pages[:b]) : sum(pages[: b + 1])]
        table[b, : pages[b]] = own
        slots = (own.long()[:, None] * page_size + torch.arange(page_size)).flatten()[:length]
        write_kv(k[b], v[b], k_cache, v_cache, slots)
    return Paged(kernels, q, k, v, k_cache, v_cache, table)


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full causal attention of one sequence in fp64."""
    group = q.shape[1] // k.shape[1]
    q64, k64, v64 = (t.double().transpose(0, 1) for t in (q, k, v))
    k64, v64 = k64.repeat_interleave(group, 0), v64.repeat_interleave(group, 0)
    scores = q64 @ k64.transpose(1, 2) * q.shape[-1] ** -0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(future, -torch.inf).softmax(-1) @ v64).transpose(0, 1)


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16 if x.element_size() == 2 else torch.int32)


def assert_same_bits(a: Tensor, b: Tensor, case: object = "") -> None:
    assert not a.isnan().any(), case
    assert torch.equal(bits(a), bits(b)), case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page_size", [1, 3, 16, 64, 256])
def test_close_to_fp64(kernels: KernelSet, page_size, dtype):
    case = paged(kernels, EDGES, page_size=page_size, dtype=dtype)
    results = case.attend([(b, 0, n) for b, n in enumerate(EDGES)])
    limit = 3e-6 if dtype == torch.float32 else 2e-2
    for b, result in enumerate(results):
        exact = reference(case.q[b], case.k[b], case.v[b])
        torch.testing.assert_close(result.double(), exact, rtol=0, atol=limit)


@pytest.mark.parametrize(
    ("heads", "dim"),
    [((1, 1), 8), ((4, 4), 64), ((9, 3), 64), ((16, 1), 24), ((14, 2), 40), ((4, 2), 256)],
)
def test_head_layouts(kernels: KernelSet, heads, dim):
    case = paged(kernels, [70], heads=heads, dim=dim)
    (whole,) = case.attend([(0, 0, 70)])
    exact = reference(case.q[0], case.k[0], case.v[0])
    torch.testing.assert_close(whole.double(), exact, rtol=0, atol=3e-6)
    for position in (0, 63, 64, 69):
        (row,) = case.attend([(0, position, position + 1)])
        assert_same_bits(row, whole[position : position + 1], position)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("page_size", [1, 3, 16, 64, 256])
def test_decode_and_chunks_equal_prefill(kernels: KernelSet, page_size, dtype):
    case = paged(kernels, [200], page_size=page_size, dtype=dtype)
    (whole,) = case.attend([(0, 0, 200)])
    for cuts in ([1, 64], [63], [64, 128], [65, 130], [7, 8, 9, 199], [100]):
        edges = [0, *cuts, 200]
        parts = [case.attend([(0, a, b)])[0] for a, b in pairwise(edges)]
        assert_same_bits(torch.cat(parts), whole, cuts)
    for position in [n - 1 for n in EDGES]:
        (row,) = case.attend([(0, position, position + 1)])
        assert_same_bits(row, whole[position : position + 1], position)


def test_neighbours_order_and_threads_change_no_bit(kernels: KernelSet):
    lengths = [200, 1, 64, 65, 130]
    case = paged(kernels, lengths)
    alone = [case.attend([(b, 0, n)])[0] for b, n in enumerate(lengths)]
    parts = [(4, 129, 130), (0, 150, 200), (1, 0, 1), (3, 0, 65), (2, 63, 64), (0, 64, 150)]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for batch in (parts, parts[::-1], parts[1:4]):
            for (b, first, end), result in zip(batch, case.attend(batch), strict=True):
                assert_same_bits(result, alone[b][first:end], (threads, b, first))


def test_long_prompt_in_many_tasks(native: KernelSet):
    case = paged(native, [700], heads=(9, 3), dim=64)
    (whole,) = case.attend([(0, 0, 700)])
    exact = reference(case.q[0], case.k[0], case.v[0])
    torch.testing.assert_close(whole.double(), exact, rtol=0, atol=3e-6)
    rows = torch.cat([case.attend([(0, p, p + 1)])[0] for p in range(0, 700, 23)])
    assert_same_bits(rows, whole[::23])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_instruction_set_gives_the_same_bits(native: KernelSet, isa, dtype):
    case = paged(native, [150, 3], heads=(9, 3), dim=40, dtype=dtype)
    here = case.attend([(0, 0, 150), (1, 2, 3)])
    library.set_isa(None)
    for a, b in zip(here, case.attend([(0, 0, 150), (1, 2, 3)]), strict=True):
        assert_same_bits(a, b)


def test_later_positions_are_never_touched(native: KernelSet):
    """A NaN in a token's own step reaches that position and the later ones only."""
    case = paged(native, [100])
    (clean,) = case.attend([(0, 0, 100)])
    page, offset = int(case.table[0, 70 // 16]), 70 % 16
    case.k_cache[page, offset] = torch.nan
    case.v_cache[page, offset] = torch.nan
    (poisoned,) = case.attend([(0, 0, 100)])
    assert_same_bits(poisoned[:70], clean[:70])
    assert poisoned[70:].isnan().all()


def test_extreme_scores(kernels: KernelSet):
    case = paged(kernels, [130])
    case.q[0] *= 300
    (whole,) = case.attend([(0, 0, 130)])
    exact = reference(case.q[0], case.k[0], case.v[0])
    torch.testing.assert_close(whole.double(), exact, rtol=1e-3, atol=1e-3)
    (last,) = case.attend([(0, 129, 130)])
    assert_same_bits(last, whole[129:])


def test_caches_of_odd_strides_are_refused(native: KernelSet):
    case = paged(native, [20])
    case.k_cache = case.k_cache.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="contiguous"):
        case.attend([(0, 0, 20)])


def test_the_comparison_can_fail():
    """Negative control: the same terms added in tiles of another size have other bits."""
    generator = torch.Generator().manual_seed(0)
    weighted = torch.randn(128, 32, generator=generator)
    tiles = [weighted.view(-1, n, 32).sum(1).sum(0) for n in (16, 64)]
    assert not torch.equal(bits(tiles[0]), bits(tiles[1]))
