"""The tiled product, its tiles and its batches; in Triton's interpreter without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs the package triton")


from isobit.errors import EngineError
from isobit.kernels.linear import NativeLinear
from isobit.kernels.triton import candidates as ways
from isobit.kernels.triton import linear as linears
from isobit.kernels.triton.candidates import (
    BUCKETS,
    CublasLt,
    SwappedCandidate,
    UnfitError,
    bucket_of,
    candidates,
    canonical,
    pieces,
)
from isobit.kernels.triton.linear import TritonLinear
from isobit.kernels.triton.matmul import (
    CANONICAL,
    FLOAT_BLOCK,
    FLOAT_CANONICAL,
    FLOAT_TILES,
    HALF_TILES,
    SWAPPED_TILES,
    Tile,
    canonical_tile,
    matmul,
)
from isobit.kernels.triton.trials import same_bits

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Make = Callable[[int, int, torch.dtype], Tensor]
Alone = Callable[[Callable[[Tensor], Tensor], Tensor], bool]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "depth"), [(1, 1), (40, 130), (33, 64), (70, 300)])
def test_close_to_fp64(
    rows_of: Make, weight_of: Make, columns: int, depth: int, dtype: torch.dtype
) -> None:
    weight, x = weight_of(columns, depth, dtype), rows_of(18, depth, dtype)
    linear = TritonLinear(weight)
    exact = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    sums = linear.accumulators(x)
    assert sums.dtype == torch.float32
    assert ((sums.double() - exact).abs() <= size * 1e-6).all()
    out = linear(x)
    assert out.dtype == dtype
    step = {torch.float32: 2e-7, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    assert ((out.double() - exact).abs() <= size * 1e-6 + exact.abs() * step + 1e-7).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_its_bits_in_every_batch(
    rows_of: Make, weight_of: Make, alone_as_in_batches: Alone, dtype: torch.dtype
) -> None:
    linear = TritonLinear(weight_of(40, 300, dtype))
    x = rows_of(33, 300, dtype)
    assert alone_as_in_batches(linear.accumulators, x)
    assert alone_as_in_batches(linear, x)


def test_a_split_by_the_batch_is_caught(
    rows_of: Make, weight_of: Make, alone_as_in_batches: Alone
) -> None:
    weight, x = weight_of(40, 300, torch.float32), rows_of(33, 300, torch.float32)

    k_halves = (slice(0, 150), slice(150, 300))

    def split_if_few(x: Tensor) -> Tensor:
        if x.shape[0] > 8:
            return canonical(x, weight, torch.float32)
        halves = ((x[:, part].contiguous(), weight[:, part].contiguous()) for part in k_halves)
        low, high = (canonical(a, b, torch.float32) for a, b in halves)
        return low + high

    assert not alone_as_in_batches(split_if_few, x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter rounds each product")
@pytest.mark.parametrize("depth", [5, 64, 576, 1536, 1601])
def test_products_in_fp32_have_the_bits_of_the_cpu(
    rows_of: Make, weight_of: Make, depth: int
) -> None:
    weight, x = weight_of(90, depth, torch.float32), rows_of(37, depth, torch.float32)
    expected = NativeLinear(weight.cpu()).accumulators(x.cpu())
    for tile in (FLOAT_CANONICAL, *FLOAT_TILES):
        assert tile.depth == FLOAT_BLOCK
        assert same_bits(matmul(x, weight, torch.float32, tile).cpu(), expected)
    other_blocks = matmul(x, weight, torch.float32, CANONICAL).cpu()
    assert same_bits(other_blocks, expected) == (depth <= FLOAT_BLOCK)


@pytest.mark.parametrize("depth", [64, 65, 600])
def test_products_in_fp32_are_summed_in_blocks(rows_of: Make, weight_of: Make, depth: int) -> None:
    weight, x = weight_of(20, depth, torch.float32), rows_of(5, depth, torch.float32)
    total = torch.zeros(5, 20, device=x.device)
    for a, b in zip(x.split(FLOAT_BLOCK, 1), weight.split(FLOAT_BLOCK, 1), strict=True):
        total += canonical(a.contiguous(), b.contiguous(), torch.float32)
    assert same_bits(canonical(x, weight, torch.float32), total)
    whole, first = x.double() @ weight.double().t(), matmul(x, weight, torch.float32)
    assert (first - whole).abs().max() < 1e-4 * whole.abs().max()


@pytest.mark.parametrize(
    "tile", [CANONICAL, *HALF_TILES[:6], HALF_TILES[8], *SWAPPED_TILES[:3], *FLOAT_TILES], ids=str
)
def test_every_tile_is_the_same_product(rows_of: Make, weight_of: Make, tile: Tile) -> None:
    dtype = torch.float32 if tile in FLOAT_TILES else torch.bfloat16
    weight, x = weight_of(90, 600, dtype), rows_of(37, 600, dtype)
    result = matmul(x, weight, torch.float32, tile)
    assert same_bits(result, canonical(x, weight, torch.float32))


def test_a_candidate_says_what_it_is_not_for(
    rows_of: Make, weight_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, x = weight_of(8, 16, torch.bfloat16), rows_of(2, 16, torch.bfloat16)
    way = SwappedCandidate(SWAPPED_TILES[0])
    monkeypatch.setattr(ways, "hopper", lambda device: True)
    assert way(x, weight, torch.float32, 2, None).any()
    monkeypatch.setattr(ways, "hopper", lambda device: False)
    with pytest.raises(UnfitError):
        way(x, weight, torch.float32, 2, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_candidates_are_of_a_buckets_size_and_named_apart(dtype: torch.dtype) -> None:
    for bucket in BUCKETS:
        offered = candidates(dtype, bucket)
        names = [candidate.name for candidate in offered]
        assert len(set(names)) == len(names)
        assert names[0] == str(canonical_tile(dtype))
        for candidate in offered[1:]:
            rows = bucket if isinstance(candidate, CublasLt) else candidate.tile.rows
            assert rows <= max(16, bucket)
            assert dtype == torch.float32 or rows >= min(bucket // 8, 128)
        assert len(offered) >= 2


def test_pieces_of_a_large_batch_have_its_bits(
    rows_of: Make, weight_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linears, "pieces", lambda rows: [4, 4, rows - 8])
    weight, x = weight_of(8, 64, torch.bfloat16), rows_of(11, 64, torch.bfloat16)
    pieces = TritonLinear(weight).accumulators(x)
    assert same_bits(pieces, canonical(x, weight, torch.float32))
    monkeypatch.setattr(TritonLinear, "_bucket", lambda self, x, dtype, out: out.zero_())
    assert not same_bits(TritonLinear(weight).accumulators(x), pieces)


def test_views_and_a_batch_in_pieces(rows_of: Make, weight_of: Make) -> None:
    weight = weight_of(8, 16, torch.float16)
    linear = TritonLinear(weight)
    x = rows_of(2048 + 3, 32, torch.float16)
    wide = linear.accumulators(x[:, 3:19])
    assert same_bits(wide[-4:], linear.accumulators(x[-4:, 3:19].clone()))
    assert linear(x[:0, :16]).shape == (0, 8)


def test_large_batches_are_cut_into_whole_buckets() -> None:
    assert pieces(0) == []
    assert pieces(2047) == [2047]
    assert pieces(5000) == [4096, 904]
    assert pieces(23_000) == [8192, 8192, 4096, 2048, 472]


def test_everything_that_may_come_is_chosen_ahead(
    weight_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[tuple[int, int, int, bool]] = []

    def tune(self: TritonLinear, rows: int, *, accumulators: bool = False) -> None:
        chosen.append((self.out_features, self.in_features, rows, accumulators))

    monkeypatch.setattr(TritonLinear, "tune", tune)
    monkeypatch.setattr(TritonLinear, "on_gpu", True)
    weights = [weight_of(8, 16, torch.bfloat16), weight_of(8, 32, torch.bfloat16)]
    layers = [TritonLinear(weight) for weight in weights * 3]
    linears.prepare(layers, TritonLinear(weight_of(40, 16, torch.bfloat16)), 5000, 20)
    assert len(set(chosen)) == len(chosen)
    for depth in (16, 32):
        rows = {rows for *shape, rows, sums in chosen if shape == [8, depth] and not sums}
        assert rows == {bucket for bucket in BUCKETS if bucket <= 4096}
        met = {bucket_of(piece) for batch in range(1, 5001) for piece in pieces(batch)}
        assert rows == met
    assert {rows for *shape, rows, sums in chosen if shape == [40, 16] and sums} == {
        *(1, 2, 4, 8, 16, 32)
    }


def test_buckets_hold_their_rows() -> None:
    assert [bucket_of(rows) for rows in (1, 3, 16, 17, 2048)] == [1, 4, 16, 32, 2048]


def test_the_switches_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    switches, libraries = torch.backends.cuda.matmul, ["default"]

    def preferred_blas_library(name: str | None = None) -> str:
        """torch without CUDA refuses to set it."""
        libraries.extend([name] if name else [])
        return libraries[-1]

    monkeypatch.setattr(torch.backends.cuda, "preferred_blas_library", preferred_blas_library)
    before = switches.allow_bf16_reduced_precision_reduction
    switches.allow_bf16_reduced_precision_reduction = (True, True)
    try:
        with ways.one_accumulator():
            assert libraries[-1] == "cublaslt"
            assert not switches.allow_bf16_reduced_precision_reduction
            assert not switches.allow_bf16_reduced_precision_reduction_split_k
        assert libraries[-1] == "default"
        assert switches.allow_bf16_reduced_precision_reduction
        assert switches.allow_bf16_reduced_precision_reduction_split_k
    finally:
        switches.allow_bf16_reduced_precision_reduction = before


def test_cublaslt_only_sees_whole_buckets(
    rows_of: Make, weight_of: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    mm = torch.mm

    def watched(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
        seen.append(x.shape[0])
        return mm(x, weight, **options)

    monkeypatch.setattr(torch, "mm", watched)
    if DEVICE.type == "cpu":
        monkeypatch.setattr(ways, "one_accumulator", nullcontext)
    weight, x = weight_of(8, 32, torch.float32), rows_of(8, 32, torch.float32)
    for rows in (5, 8):
        given = torch.full((rows, 8), torch.nan, device=DEVICE)
        for out in (None, given):
            result = CublasLt()(x[:rows], weight, torch.float32, 8, out)
            assert result.shape == (rows, 8)
            torch.testing.assert_close(result, x[:rows] @ weight.T)
        torch.testing.assert_close(given, result)
    assert seen == [8] * 4


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_a_graph_needs_its_choice_before(rows_of: Make, weight_of: Make) -> None:
    linear = TritonLinear(weight_of(256, 512, torch.bfloat16))
    x = rows_of(5, 512, torch.bfloat16)
    with (
        pytest.raises(EngineError, match="before its capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        linear(x)
    linear.tune(5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = linear(x)
    graph.replay()
    assert same_bits(out, linear(x))
