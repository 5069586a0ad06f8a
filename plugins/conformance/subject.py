"""What is judged: a declaration and the class that made it."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from functools import cache

import torch

from ...backends.base import AttentionBackend
from ...backends.capabilities import BackendSpec, dotted
from ...backends.matrix import load_factory
from ...backends.rules import missing_distributions
from ...errors import ConfigError
from ..manager import PluginHost


@dataclass(frozen=True, slots=True)
class Subject:
    """A backend as it was found, and the host that found it: an engine asks the same one."""

    spec: BackendSpec
    factory: type[AttentionBackend]
    distribution: str
    version: str
    host: PluginHost


def find_subject(name: str, host: PluginHost) -> Subject:
    """The backend ``name`` of ``host``, its class imported.

    :raises ConfigError: there is none, or it cannot be imported; with the reason.
    """
    found = host.require(name)
    missing = missing_distributions(found.spec)
    if missing:
        remedy = found.spec.install or "install them"
        raise ConfigError(f"backend {name!r} requires {', '.join(missing)}. To mend it: {remedy}")
    factory = load_factory(found.spec)
    return Subject(found.spec, factory, found.distribution, found.version, host)


def choose_device(spec: BackendSpec, device: str | None = None) -> str:
    """The device to judge on: the one asked for, else CUDA where it is declared and present.

    :raises ConfigError: the device is not declared, or not on this machine.
    """
    declared = spec.capabilities.devices
    if device is not None and device not in declared:
        raise ConfigError(
            f"device {device!r} was asked for, and {spec.name} declares {_listed(declared)}. "
            "Pass one of those."
        )
    here = [d for d in ("cuda", "cpu") if d in declared and why_not_here(d, spec) is None]
    if device is None and here:
        return here[0]
    wanted = device or sorted(declared)[0]
    reason = why_not_here(wanted, spec)
    if reason is not None:
        raise ConfigError(f"{spec.name} cannot be judged on {wanted} here: {reason}.")
    return wanted


def why_not_here(device: str, spec: BackendSpec) -> str | None:
    """Why this machine cannot run the backend on ``device``; ``None`` where it can."""
    if device == "cpu":
        return None
    if device != "cuda":
        return f"the suite knows no device {device!r}"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    offers, found = spec.capabilities, torch.cuda.get_device_capability()
    if not offers.serves_gpu(found):
        return f"it needs compute capability {offers.gpus}, and the device has {dotted(found)}"
    return None


def device_name(device: str) -> str:
    """The device as people call it: the GPU's name, the processor's model."""
    if device == "cuda":
        return _gpu()
    return _processor() or platform.processor() or platform.machine()


@cache
def _gpu() -> str:
    """Asked once, as a GPU that a fault made unusable tells nothing."""
    return torch.cuda.get_device_name()


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            found = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    except OSError:
        return ""
    threads = min(torch.get_num_threads(), os.cpu_count() or 1)
    return f"{found[0].strip()}, {threads} threads" if found else ""


def _listed(names: object) -> str:
    return ", ".join(sorted(names)) if isinstance(names, frozenset | set) else str(names)
