"""Which device the engine runs on, and what there is to know of it."""

from __future__ import annotations

import platform
import re
from collections.abc import Callable
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
    device = torch.device("cuda", torch.cuda.current_device())
    _check_served(device)
    return device


def _missing() -> str:
    if torch.version.cuda is None:
        return (
            f"the installed torch {torch.__version__} is built without CUDA. Install a CUDA build "
            "of torch, see https://pytorch.org/get-started."
        )
    return (
        f"torch {torch.__version__} for CUDA {torch.version.cuda} sees no device: {no_cuda()} "
        "There is no NVIDIA driver, one too old for this build, or CUDA_VISIBLE_DEVICES hides the "
        "device. Check with nvidia-smi."
    )


def no_cuda() -> str:
    """Why a CUDA build of torch finds no device, in torch's own words; else nothing."""
    if torch.version.cuda is None or torch.cuda.is_available():
        return ""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        return f"{str(error).strip().rstrip('.')}."
    return "torch gives no reason."


def _check_served(device: torch.device) -> None:
    """Refuse a GPU that the installed torch has no kernels for, before they fail one by one.

    :raises ConfigError: it is older than the oldest one that torch was built for.
    """
    built = [re.match(r"sm_(\d+)", arch) for arch in torch.cuda.get_arch_list()]
    oldest = min((int(match[1]) for match in built if match), default=0)
    major, minor = compute_capability(device) or (0, 0)
    if 10 * major + minor < oldest:
        raise ConfigError(
            f"{describe_device(device)} is too old for torch {torch.__version__} for CUDA "
            f"{torch.version.cuda}, which starts at {oldest // 10}.{oldest % 10}. Install a build "
            "of torch for this GPU, or pass device='cpu'."
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


def stream_of(device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    """Makes blocks in which work goes to the stream that is the device's current one now."""
    if device.type != "cuda":
        return nullcontext
    stream = torch.cuda.current_stream(device)
    return lambda: torch.cuda.stream(stream)
