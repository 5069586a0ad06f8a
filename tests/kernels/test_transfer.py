"""Copies to a device and back, without a wait on either side."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from isobit.kernels.transfer import HostCopy, parts_to_device, to_device

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("values", [[3, -(2**62), 5], [], np.arange(7)])
def test_values_arrive(values: list[int]) -> None:
    there = to_device(values, torch.int64, DEVICE)
    assert there.device.type == DEVICE.type
    assert there.dtype == torch.int64
    assert there.tolist() == list(values)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64])
def test_parts_are_apart_and_aligned(dtype: torch.dtype) -> None:
    parts = [[*range(n)] for n in (0, 1, 32, 33, 0, 7)]
    there = parts_to_device(parts, dtype, DEVICE)
    assert [part.tolist() for part in there] == parts
    starts = [part.data_ptr() for part in there if len(part)]
    assert all((start - starts[0]) % 256 == 0 for start in starts)


def test_a_copy_is_read() -> None:
    source = torch.randn(5, 3, device=DEVICE)
    copy = HostCopy(source)
    assert torch.equal(copy.read(), source.cpu())
    assert copy.read().device.type == "cpu"
