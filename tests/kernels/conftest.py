from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from isobit.kernels.dispatch import PROVIDERS, load_kernels, unavailable_reason
from isobit.kernels.kernel_set import KernelSet
from isobit.kernels.native import library


@pytest.fixture(params=PROVIDERS)
def kernels(request: pytest.FixtureRequest) -> KernelSet:
    reason = unavailable_reason(request.param)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return load_kernels(request.param)


@pytest.fixture
def native() -> KernelSet:
    reason = unavailable_reason("native")
    if reason is not None:
        pytest.skip(f"native: {reason}")
    return load_kernels("native")


@pytest.fixture(params=["avx512", "avx2", "neon"])
def isa(request: pytest.FixtureRequest, native: KernelSet) -> Iterator[str]:
    """Every instruction set of this CPU, in force for the test."""
    if not library.set_isa(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    library.set_isa(None)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(20261121)


@pytest.fixture(autouse=True)
def _threads_restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
