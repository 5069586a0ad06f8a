"""What every launch has in common: where kernels can run, and operands of one alignment.

Triton compiles a variant of a kernel for pointers that are multiples of 16 bytes, and a library may
choose its algorithm by alignment. Another variant may add in another order, so every operand is
aligned before it is handed over, and row counts are never specialised on.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from importlib import metadata

import torch
from packaging.version import Version
from torch import Tensor

OLDEST_TRITON = "3.5"
OLDEST_GPU = (8, 0)
"""Compute capability."""

ALIGNMENT = 256
"""Bytes; the coarsest that torch tells cuBLASLt about, and less than its allocator gives."""


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU. It truncates to bf16."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable_reason(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on tensors of ``device``; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; run: pip install triton"
    if old := _too_old_triton():
        return (
            f"triton {old} is installed, and at least {OLDEST_TRITON} is wanted; run: pip install "
            f"'triton>={OLDEST_TRITON}'"
        )
    if device.type == "cpu":
        if interpreted():
            return None
        return (
            "it runs on CUDA devices; on the CPU only in Triton's interpreter, TRITON_INTERPRET=1"
        )
    if device.type != "cuda":
        return f"it runs on CUDA devices, and the device is {device}"
    return _too_old_gpu(device)


def _too_old_triton() -> str | None:
    """The installed version where it is below the oldest; None where it will do or says nothing."""
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None  # a copy without metadata
    return version if Version(version) < Version(OLDEST_TRITON) else None


def _too_old_gpu(device: torch.device) -> str | None:
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) >= OLDEST_GPU:
        return None
    wanted = ".".join(map(str, OLDEST_GPU))
    return f"the GPU has compute capability {major}.{minor}, and at least {wanted} is wanted"


@functools.cache
def hopper(device: torch.device) -> bool:
    """Whether a device is of compute capability 9: what that brought is used there, where it was
    tried, and not on later ones."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def aligned(x: Tensor) -> Tensor:
    """``x``, or a copy of it, contiguous and starting at a multiple of ``ALIGNMENT`` bytes.

    Off the GPU there are no variants, and a contiguous tensor is returned as it is.
    """
    x = x.contiguous()
    return x.clone() if x.is_cuda and x.data_ptr() % ALIGNMENT else x
