"""Products under Triton's interpreter, or on a GPU where there is one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs the package triton")

from triton.runtime import interpreter

from isobit.kernels.triton.linear import chooser
from isobit.kernels.triton.trials import same_bits

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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


@pytest.fixture
def rows_of() -> Callable[[int, int, torch.dtype], Tensor]:
    """``(count, depth, dtype)`` -> rows ``[count, depth]`` with outliers in some columns."""

    def make(count: int, depth: int, dtype: torch.dtype) -> Tensor:
        x = torch.randn(count, depth, generator=torch.Generator().manual_seed(count))
        x[:, 5::97] *= 100
        return x.to(DEVICE, dtype)

    return make


@pytest.fixture
def weight_of() -> Callable[[int, int, torch.dtype], Tensor]:
    """``(columns, depth, dtype)`` -> a weight ``[columns, depth]``."""

    def make(columns: int, depth: int, dtype: torch.dtype) -> Tensor:
        weight = torch.randn(columns, depth, generator=torch.Generator().manual_seed(columns))
        return weight.to(DEVICE, dtype)

    return make


@pytest.fixture
def alone_as_in_batches() -> Callable[[Callable[[Tensor], Tensor], Tensor], bool]:
    """Whether a product gives every row the same bits alone and in batches of several sizes."""

    def holds(product: Callable[[Tensor], Tensor], x: Tensor) -> bool:
        alone = torch.cat([product(x[i : i + 1]) for i in range(len(x))])
        return all(same_bits(product(x[:count]), alone[:count]) for count in ROWS)

    return holds
