"""The tiled product and how its candidates are judged; in Triton's interpreter without a GPU."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs the package triton")

from triton.runtime import interpreter

from isobit.errors import ConfigError, EngineError
from isobit.kernels.triton import candidates as ways
from isobit.kernels.triton import linear as linears
from isobit.kernels.triton.candidates import (
    BUCKETS,
    CublasLt,
    SwappedCandidate,
    TileCandidate,
    UnfitError,
    bucket_of,
    candidates,
    canonical,
    pieces,
)
from isobit.kernels.triton.choices import ChoiceFile, Chooser
from isobit.kernels.triton.linear import TritonLinear, chooser
from isobit.kernels.triton.matmul import (
    CANONICAL,
    FLOAT_TILES,
    HALF_TILES,
    SWAPPED_TILES,
    Tile,
    matmul,
)
from isobit.kernels.triton.trials import (
    Problem,
    Trial,
    cancelling,
    random_rows,
    same_bits,
    trials,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = (1, 2, 3, 15, 16, 17, 33)


@pytest.fixture(autouse=True)
def _ascending_dot(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter leaves ``tl.dot`` to NumPy's BLAS, whose order depends on a row's place in
    the tile; here it keeps the contract that the hardware is measured to keep."""

    def create_dot(self: object, a, b, d, input_precision, max_num_imprecise_acc):  # type: ignore[no-untyped-def]
        total = d.data
        for k in range(a.data.shape[1]):
            total = total + a.data[:, k, None].astype("f4") * b.data[k].astype("f4")
        return interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a GPU, choices are made anew and leave the user's file alone."""
    monkeypatch.setenv("ISOBIT_CACHE", str(tmp_path / "cache"))
    chooser.cache_clear()


def rows_of(count: int, depth: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(count, depth, generator=torch.Generator().manual_seed(count))
    x[:, 5::97] *= 100
    return x.to(DEVICE, dtype)


def weight_of(columns: int, depth: int, dtype: torch.dtype) -> Tensor:
    weight = torch.randn(columns, depth, generator=torch.Generator().manual_seed(columns))
    return weight.to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "depth"), [(1, 1), (40, 130), (33, 64), (70, 300)])
def test_close_to_fp64(columns: int, depth: int, dtype: torch.dtype) -> None:
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


def alone_as_in_batches(product: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    alone = torch.cat([product(x[i : i + 1]) for i in range(len(x))])
    return all(same_bits(product(x[:count]), alone[:count]) for count in ROWS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_its_bits_in_every_batch(dtype: torch.dtype) -> None:
    linear = TritonLinear(weight_of(40, 300, dtype))
    x = rows_of(33, 300, dtype)
    assert alone_as_in_batches(linear.accumulators, x)
    assert alone_as_in_batches(linear, x)


def test_a_split_by_the_batch_is_caught() -> None:
    weight, x = weight_of(40, 300, torch.float32), rows_of(33, 300, torch.float32)

    def split_if_few(x: Tensor) -> Tensor:
        if x.shape[0] > 8:
            return canonical(x, weight, torch.float32)
        halves = ((x[:, part].contiguous(), weight[:, part].contiguous()) for part in HALVES)
        low, high = (canonical(a, b, torch.float32) for a, b in halves)
        return low + high

    assert not alone_as_in_batches(split_if_few, x)


HALVES = (slice(0, 150), slice(150, 300))


@pytest.mark.parametrize(
    "tile", [CANONICAL, *HALF_TILES[:6], HALF_TILES[8], *SWAPPED_TILES[:3], *FLOAT_TILES], ids=str
)
def test_every_tile_is_the_same_product(tile: Tile) -> None:
    dtype = torch.float32 if tile in FLOAT_TILES else torch.bfloat16
    weight, x = weight_of(90, 600, dtype), rows_of(37, 600, dtype)
    result = matmul(x, weight, torch.float32, tile)
    assert same_bits(result, canonical(x, weight, torch.float32))


def test_a_candidate_says_what_it_is_not_for(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = weight_of(8, 16, torch.bfloat16), rows_of(2, 16, torch.bfloat16)
    way = SwappedCandidate(SWAPPED_TILES[0])
    monkeypatch.setattr(ways, "hopper", lambda device: True)
    assert way(x, weight, torch.float32, 2, None).any()
    monkeypatch.setattr(ways, "hopper", lambda device: False)
    with pytest.raises(UnfitError):
        way(x, weight, torch.float32, 2, None)


def test_an_unfit_candidate_is_no_fault(tmp_path: Path) -> None:
    offered = [SwappedCandidate(SWAPPED_TILES[0]), Named("fast")]
    chooser = Chooser(ChoiceFile(tmp_path / "c"), lambda run: 1.0, lambda dtype, bucket: offered)
    if DEVICE.type == "cpu":
        assert chooser.choose(PROBLEM, WEIGHT).name == "fast"
        assert not chooser.demoted


@pytest.mark.parametrize("dtype", DTYPES)
def test_candidates_are_of_a_buckets_size_and_named_apart(dtype: torch.dtype) -> None:
    for bucket in BUCKETS:
        offered = candidates(dtype, bucket)
        names = [candidate.name for candidate in offered]
        assert len(set(names)) == len(names)
        assert names[0] == str(CANONICAL)
        for candidate in offered[1:]:
            rows = bucket if isinstance(candidate, CublasLt) else candidate.tile.rows
            assert rows <= max(16, bucket)
            assert dtype == torch.float32 or rows >= min(bucket // 8, 128)
        assert len(offered) >= 2


def test_pieces_of_a_large_batch_have_its_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "pieces", lambda rows: [4, 4, rows - 8])
    weight, x = weight_of(8, 64, torch.bfloat16), rows_of(11, 64, torch.bfloat16)
    pieces = TritonLinear(weight).accumulators(x)
    assert same_bits(pieces, canonical(x, weight, torch.float32))
    monkeypatch.setattr(linears, "canonical", lambda x, w, d, out: out.zero_())
    assert not same_bits(TritonLinear(weight).accumulators(x), pieces)


def test_views_and_a_batch_in_pieces() -> None:
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


def test_everything_that_may_come_is_chosen_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_cublaslt_only_sees_whole_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
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


class Faulty:
    """Adds K in two halves: another order."""

    name = "faulty"

    def __call__(
        self, x: Tensor, weight: Tensor, out_dtype: torch.dtype, bucket: int, out: Tensor | None
    ) -> Tensor:
        halves = ((x[:, part].contiguous(), weight[:, part].contiguous()) for part in HALVES)
        low, high = (canonical(a, b, torch.float32) for a, b in halves)
        return placed(low + high, out_dtype, out)


def placed(result: Tensor, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    return result.to(dtype) if out is None else out.copy_(result)


class Named(TileCandidate):
    """The canonical tile under another name."""

    def __init__(self, name: str) -> None:
        super().__init__(CANONICAL)
        self.name = name


PROBLEM = Problem(40, 300, torch.float32, torch.float32, 4)
WEIGHT = weight_of(40, 300, torch.float32)


def chooser_of(path: Path, names: Sequence[str], times: dict[str, float]) -> Chooser:
    """One over candidates of these names; the sound ones take these milliseconds."""
    offered = [Faulty() if name == "faulty" else Named(name) for name in names]
    queue = iter(times.values())  # a choice that is not timed needs none
    return Chooser(ChoiceFile(path), lambda run: next(queue), lambda dtype, bucket: offered)


def test_the_fastest_sound_candidate_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("slow", "faulty", "fast")
    chooser = chooser_of(tmp_path / "c.json", names, {"slow": 2.0, "fast": 1.0})
    with caplog.at_level(logging.WARNING):
        assert chooser.choose(PROBLEM, WEIGHT).name == "fast"
    assert chooser.demoted == {"faulty": ["N40 K300 float32->float32 M4, 3 rows"]}
    assert "faulty: other bits for N40 K300 float32->float32 M4, 3 rows" in caplog.text
    assert chooser.report() == [
        "faulty, of other bits for 1 products, first N40 K300 float32->float32 M4, 3 rows"
    ]
    assert chooser.choose(PROBLEM, WEIGHT).name == "fast"  # without another judgement
    assert json.loads((tmp_path / "c.json").read_text()) == {str(PROBLEM): "fast"}


def test_a_remembered_choice_is_checked_and_not_timed(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    ChoiceFile(path).put(PROBLEM, "slow")
    assert chooser_of(path, ("slow", "fast"), {}).choose(PROBLEM, WEIGHT).name == "slow"
    ChoiceFile(path).put(PROBLEM, "faulty")
    again = chooser_of(path, ("faulty", "fast"), {"fast": 1.0})
    assert again.choose(PROBLEM, WEIGHT).name == "fast"
    assert again.demoted
    assert ChoiceFile(path).get(PROBLEM) == "fast"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"N40": "gone"}'])
def test_a_damaged_file_is_made_again(tmp_path: Path, content: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(content)
    assert chooser_of(path, ("fast",), {"fast": 1.0}).choose(PROBLEM, WEIGHT).name == "fast"
    assert ChoiceFile(path).get(PROBLEM) == "fast"


def test_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="set ISOBIT_CACHE"):
        ChoiceFile(tmp_path / "file" / "c.json").put(PROBLEM, "fast")
    with pytest.raises(EngineError, match="canonical"):
        chooser_of(tmp_path / "c.json", ("faulty",), {}).choose(PROBLEM, WEIGHT)


class Descending:
    """Walks K's blocks from the last to the first, into one accumulator."""

    name = "descending"

    def __call__(
        self, x: Tensor, weight: Tensor, out_dtype: torch.dtype, bucket: int, out: Tensor | None
    ) -> Tensor:
        total = torch.zeros(len(x), len(weight), device=x.device)
        for start in reversed(range(0, x.shape[1], 16)):
            part = slice(start, start + 16)
            for k in range(*part.indices(x.shape[1])):
                total = total + x[:, k, None].float() * weight[None, :, k].float()
        return placed(total, out_dtype, out)


class Variant(TileCandidate):
    """The canonical tile for one row, two halves of K for more: what a library might do."""

    def __init__(self) -> None:
        super().__init__(CANONICAL)
        self.name = "variant"

    def __call__(
        self, x: Tensor, weight: Tensor, out_dtype: torch.dtype, bucket: int, out: Tensor | None
    ) -> Tensor:
        way = super().__call__ if bucket == 1 else Faulty()
        return way(x, weight, out_dtype, bucket, out)


ORDERS = [Faulty(), Descending()]


def rounded(x: Tensor, weight: Tensor) -> Tensor:
    """The canonical result, rounded to nearest in the interpreter too."""
    return canonical(x, weight, torch.float32).to(x.dtype)


def share_of_others(x: Tensor, weight: Tensor, other: Faulty | Descending) -> float:
    """How many rounded outputs tell the other order from the canonical one."""
    result = other(x, weight, x.dtype, len(x), None)
    return result.ne(rounded(x, weight)).double().mean().item()


@pytest.mark.parametrize("other", ORDERS, ids=lambda other: other.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_that_cancel_show_another_order(
    dtype: torch.dtype, other: Faulty | Descending
) -> None:
    problem = Problem(40, 300, dtype, dtype, 16)
    x, weight = cancelling(problem, DEVICE)
    assert (x.double() @ weight.double().T).abs().max() < 1e-9
    assert share_of_others(x, weight, other) > 0.9
    few = Problem(4, 300, dtype, dtype, 1)  # four outputs are enough
    x, weight = cancelling(few, DEVICE)
    assert not Trial(x, weight, rounded(x, weight), 1).passed(other, 1)


@pytest.mark.parametrize("other", ORDERS, ids=lambda other: other.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_random_sums_hide_another_order(dtype: torch.dtype, other: Faulty | Descending) -> None:
    """Why the trials have sums that cancel: of those with outliers alone, few outputs show it."""
    problem = Problem(40, 300, dtype, dtype, 16)
    x, weight = random_rows(problem, DEVICE), weight_of(40, 300, dtype)
    assert share_of_others(x, weight, other) < 0.1
    columns = (weight[n : n + 4].contiguous() for n in range(0, 40, 4))
    let_through = [Trial(x, few, rounded(x, few), 1).passed(other, 1) for few in columns]
    assert any(let_through)


def test_trials_cover_both_results_and_the_buckets_rows() -> None:
    problem = Problem(5, 40, torch.bfloat16, torch.bfloat16, 16)
    found = [trial.expected.dtype for trial in trials(problem, weight_of(5, 40, torch.bfloat16))]
    assert found == [torch.bfloat16, torch.float32] * 2
    assert problem.row_counts() == [9, 12, 16]
    assert Problem(5, 40, torch.bfloat16, torch.bfloat16, 1).row_counts() == [1]


def test_a_library_that_turns_batch_variant_is_replaced(tmp_path: Path) -> None:
    """Its kernels were fine when the choice was remembered, and changed since."""
    weight, x = weight_of(40, 300, torch.bfloat16), rows_of(33, 300, torch.bfloat16)
    path, dtype = tmp_path / "c.json", torch.bfloat16
    buckets = [bucket for bucket in BUCKETS if bucket <= 64]
    for bucket in buckets:
        ChoiceFile(path).put(Problem(40, 300, dtype, dtype, bucket), "variant")
    offered = [Variant(), Named("sound")]
    chooser = Chooser(ChoiceFile(path), lambda run: 1.0, lambda dtype, bucket: offered)

    def chosen(x: Tensor) -> Tensor:
        bucket = bucket_of(len(x))
        way = chooser.choose(Problem(40, 300, dtype, dtype, bucket), weight)
        return way(x, weight, dtype, bucket, None)

    assert alone_as_in_batches(chosen, x)
    assert not alone_as_in_batches(
        lambda x: Variant()(x, weight, dtype, bucket_of(len(x)), None), x
    )
    (line,) = chooser.report()
    assert line.startswith("variant, of other bits for ")
    names = [ChoiceFile(path).get(Problem(40, 300, dtype, dtype, bucket)) for bucket in buckets]
    assert names[0] == "variant"
    assert "sound" in names
    offered.pop()
    alone = Chooser(ChoiceFile(path), lambda run: 1.0, lambda dtype, bucket: offered)
    with pytest.raises(EngineError, match="canonical"):
        alone.choose(Problem(40, 300, dtype, dtype, 4), weight)


def test_the_judge_sees_outliers() -> None:
    x = random_rows(PROBLEM, DEVICE).abs()
    assert x.shape == (4, 300)
    assert x[:, 5::97].mean() > 30 * x.mean(dim=0).median()


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_a_graph_needs_its_choice_before() -> None:
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
