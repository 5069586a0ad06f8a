"""How the ways to compute a product are judged, chosen and remembered."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs the package triton")


from isobit.errors import ConfigError, EngineError
from isobit.kernels.triton.candidates import (
    BUCKETS,
    SwappedCandidate,
    TileCandidate,
    bucket_of,
    canonical,
)
from isobit.kernels.triton.choices import ChoiceFile, Chooser
from isobit.kernels.triton.matmul import CANONICAL, SWAPPED_TILES
from isobit.kernels.triton.trials import (
    Problem,
    Trial,
    cancelling,
    random_rows,
    trials,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Make = Callable[[int, int, torch.dtype], Tensor]
Alone = Callable[[Callable[[Tensor], Tensor], Tensor], bool]


HALVES = (slice(0, 150), slice(150, 300))


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

    def __call__(
        self, x: Tensor, weight: Tensor, out_dtype: torch.dtype, bucket: int, out: Tensor | None
    ) -> Tensor:
        return canonical(x, weight, out_dtype, out)


PROBLEM = Problem(40, 300, torch.float32, torch.float32, 4)


@pytest.fixture
def small_weight(weight_of: Make) -> Tensor:
    """A weight of the problem's."""
    return weight_of(40, 300, torch.float32)


def chooser_of(path: Path, names: Sequence[str], times: dict[str, float]) -> Chooser:
    """One over candidates of these names; the sound ones take these milliseconds."""
    offered = [Faulty() if name == "faulty" else Named(name) for name in names]
    queue = iter(times.values())  # a choice that is not timed needs none
    return Chooser(ChoiceFile(path), lambda run: next(queue), lambda dtype, bucket: offered)


def test_an_unfit_candidate_is_no_fault(small_weight: Tensor, tmp_path: Path) -> None:
    offered = [SwappedCandidate(SWAPPED_TILES[0]), Named("fast")]
    chooser = Chooser(ChoiceFile(tmp_path / "c"), lambda run: 1.0, lambda dtype, bucket: offered)
    if DEVICE.type == "cpu":
        assert chooser.choose(PROBLEM, small_weight).name == "fast"
        assert not chooser.demoted


def test_the_fastest_sound_candidate_is_taken(
    small_weight: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("slow", "faulty", "fast")
    chooser = chooser_of(tmp_path / "c.json", names, {"slow": 2.0, "fast": 1.0})
    with caplog.at_level(logging.WARNING):
        assert chooser.choose(PROBLEM, small_weight).name == "fast"
    assert chooser.demoted == {"faulty": ["N40 K300 float32->float32 M4, 3 rows"]}
    assert "faulty: other bits for N40 K300 float32->float32 M4, 3 rows" in caplog.text
    assert chooser.report() == [
        "faulty, of other bits for 1 products, first N40 K300 float32->float32 M4, 3 rows"
    ]
    assert chooser.choose(PROBLEM, small_weight).name == "fast"  # without another judgement
    assert json.loads((tmp_path / "c.json").read_text()) == {str(PROBLEM): "fast"}


def test_a_remembered_choice_is_checked_and_not_timed(small_weight: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    ChoiceFile(path).put(PROBLEM, "slow")
    assert chooser_of(path, ("slow", "fast"), {}).choose(PROBLEM, small_weight).name == "slow"
    ChoiceFile(path).put(PROBLEM, "faulty")
    again = chooser_of(path, ("faulty", "fast"), {"fast": 1.0})
    assert again.choose(PROBLEM, small_weight).name == "fast"
    assert again.demoted
    assert ChoiceFile(path).get(PROBLEM) == "fast"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"N40": "gone"}'])
def test_a_damaged_file_is_made_again(small_weight: Tensor, tmp_path: Path, content: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(content)
    assert chooser_of(path, ("fast",), {"fast": 1.0}).choose(PROBLEM, small_weight).name == "fast"
    assert ChoiceFile(path).get(PROBLEM) == "fast"


def test_errors(small_weight: Tensor, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="set ISOBIT_CACHE"):
        ChoiceFile(tmp_path / "file" / "c.json").put(PROBLEM, "fast")
    with pytest.raises(EngineError, match="canonical"):
        chooser_of(tmp_path / "c.json", ("faulty",), {}).choose(PROBLEM, small_weight)


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
def test_random_sums_hide_another_order(
    weight_of: Make, dtype: torch.dtype, other: Faulty | Descending
) -> None:
    """Why the trials have sums that cancel: of those with outliers alone, few outputs show it."""
    problem = Problem(40, 300, dtype, dtype, 16)
    x, weight = random_rows(problem, DEVICE), weight_of(40, 300, dtype)
    assert share_of_others(x, weight, other) < 0.1
    columns = (weight[n : n + 4].contiguous() for n in range(0, 40, 4))
    let_through = [Trial(x, few, rounded(x, few), 1).passed(other, 1) for few in columns]
    assert any(let_through)


def test_trials_cover_both_results_and_the_buckets_rows(weight_of: Make) -> None:
    problem = Problem(5, 40, torch.bfloat16, torch.bfloat16, 16)
    found = [trial.expected.dtype for trial in trials(problem, weight_of(5, 40, torch.bfloat16))]
    assert found == [torch.bfloat16, torch.float32] * 2
    assert problem.row_counts() == [9, 12, 16]
    assert Problem(5, 40, torch.bfloat16, torch.bfloat16, 1).row_counts() == [1]


def test_a_library_that_turns_batch_variant_is_replaced(
    rows_of: Make, weight_of: Make, alone_as_in_batches: Alone, tmp_path: Path
) -> None:
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
