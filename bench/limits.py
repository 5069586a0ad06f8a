"""What a device can do at most, as torch's own copy and matrix product show it in this run."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from ..errors import ConfigError
from .clock import clock_of, median_seconds

_REPEAT = 9


@dataclass(frozen=True, slots=True)
class Limits:
    """Rates that were measured.

    bytes_per_s:  of a copy within the device's memory, bytes read and written both counted
    flops_per_s:  of a square matrix product of random numbers; a multiply and an add are two
    matrix_dtype: of that product
    """

    bytes_per_s: float
    flops_per_s: float
    matrix_dtype: str

    def seconds(self, num_bytes: int, flops: int) -> float:
        """The time that work takes at least: its bytes or its products, whichever take longer."""
        return max(num_bytes / self.bytes_per_s, flops / self.flops_per_s)

    def name(self, num_bytes: int, flops: int) -> str:
        """Which of the two it is: ``"copy"`` or ``"matrix"``."""
        copies = num_bytes / self.bytes_per_s >= flops / self.flops_per_s
        return "copy" if copies else "matrix"

    def as_dict(self) -> dict[str, float | str]:
        return {
            "copy_gb_per_s": self.bytes_per_s / 1e9,
            "matrix_tflop_per_s": self.flops_per_s / 1e12,
            "matrix_dtype": self.matrix_dtype,
        }


@functools.cache
def measure_limits(device: torch.device) -> Limits:
    """Measured once a process: on CUDA a copy of 2 GiB and a bf16 product of 8192; on a
    CPU 256 MiB and fp32 of 1024.

    :raises ConfigError: the device's memory has no room for that beside the engine.
    """
    cuda = device.type == "cuda"
    copied, size, dtype = (2**31, 8192, torch.bfloat16) if cuda else (2**28, 1024, torch.float32)
    try:
        return Limits(_copy_rate(device, copied), _matrix_rate(device, size, dtype), _name(dtype))
    except torch.cuda.OutOfMemoryError as error:
        raise ConfigError(
            "the engine left no room to measure the device's copy, which takes two times 2 GiB. "
            "Lower kv_cache_memory."
        ) from error


def _copy_rate(device: torch.device, size: int) -> float:
    source = torch.ones(size, dtype=torch.uint8, device=device)  # zeros may have no memory yet
    target = torch.empty_like(source)
    return 2 * size / median_seconds(lambda: target.copy_(source), clock_of(device), _REPEAT)


def _matrix_rate(device: torch.device, size: int, dtype: torch.dtype) -> float:
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    seconds = median_seconds(lambda: torch.mm(a, b, out=out), clock_of(device), _REPEAT)
    return 2 * size**3 / seconds


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
