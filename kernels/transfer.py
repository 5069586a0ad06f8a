"""Copies between host and device for which the host does not wait."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT = 256  # bytes


def to_device(
    values: Sequence[float] | Sequence[Sequence[int]] | NDArray[Any],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """A tensor of the values; the host does not wait for the copy."""
    on_host = torch.tensor(values, dtype=dtype)
    if device.type == "cuda":
        # Torch reuses pinned memory only once the copies that read it are done.
        on_host = on_host.pin_memory()
    return on_host.to(device, non_blocking=True)


def parts_to_device(
    parts: Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """One tensor a part, all out of one buffer and one copy.

    Each begins at a multiple of 256 bytes, as kernels may be compiled differently for other
    alignments.
    """
    step = _ALIGNMENT // dtype.itemsize
    joined: list[float] = []
    starts = []
    for part in parts:
        starts.append(len(joined))
        joined += part
        joined += [0] * (-len(part) % step)
    buffer = to_device(joined, dtype, device)
    return [buffer[at : at + len(part)] for at, part in zip(starts, parts, strict=True)]


class HostCopy:
    """A tensor's copy on the host, under way from now on. The tensor must not be changed."""

    def __init__(self, source: Tensor) -> None:
        self._done: torch.cuda.Event | None = None
        self._copy = source
        if source.is_cuda:
            self._copy = torch.empty_like(source, device="cpu", pin_memory=True)
            self._copy.copy_(source, non_blocking=True)
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record(torch.cuda.current_stream(source.device))

    def read(self) -> Tensor:
        """The copy; waits until it is there."""
        if self._done is not None:
            self._done.synchronize()
        return self._copy
