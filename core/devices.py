"""Which device the engine runs on, and what there is to know of it."""

from __future__ import annotations

import platform
from contextlib import AbstractContextManager, nullcontext

import torch

from ..errors import ConfigError

CPU = torch.device("cpu")


def resolve_device(asked: str) -> torch.device:
    """The device for ``"auto"``, ``"cpu"`` or ``"cuda"``; torch's current one of several GPUs.

    :raises ConfigError: ``"cuda"`` where there is none; the message says what is missing.
    """
    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        return CPU
    if not torch.cuda.is_available():
        raise ConfigError(f"device='cuda' was asked for, but {_missing()} Or pass device='cpu'.")
    return torch.device("cuda", torch.cuda.current_device())


def _missing() -> str:
    if torch.version.cuda is None:
        return (
            f"the installed torch {torch.__version__} is built without CUDA. Install a CUDA build "
            "of torch, see https://pytorch.org/get-started."
        )
    return (
        f"torch {torch.__version__} for CUDA {torch.version.cuda} sees no device: there is no "
        "NVIDIA driver, one too old for this build, or CUDA_VISIBLE_DEVICES hides the device. "
        "Check with nvidia-smi."
    )


def compute_capability(device: torch.device) -> tuple[int, int] | None:
    """Of a CUDA device, ``(major, minor)``; None on the CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


def describe_device(device: torch.device) -> str:
    """What is behind it: the processor's architecture, or the GPU's name and capability."""
    capability = compute_capability(device)
    if capability is None:
        return platform.machine()
    major, minor = capability
    return f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"


def current_device(device: torch.device) -> AbstractContextManager[object]:
    """Within the block it is torch's current device: Triton launches there, whatever the thread."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
