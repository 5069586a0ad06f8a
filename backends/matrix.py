"""Choosing a backend by the compatibility matrix, and resolving what was left open.

A backend that was asked for by name is taken or refused with all reasons; ``"auto"`` walks a
fixed order. Nothing that was asked for is overridden.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..errors import ConfigError
from .capabilities import (
    FEATURES,
    BackendSpec,
    Conditional,
    Refusal,
    Requirements,
    Supported,
    Unsupported,
)
from .pair import parts_of
from .rules import Installed, cell_for, installed_version, refusals

if TYPE_CHECKING:
    from ..plugins.manager import PluginHost, RegisteredBackend
    from .base import AttentionBackend

AUTO_ORDER = ("triton", "fa3", "flashinfer", "torch")
"""The order in which ``"auto"`` tries backends; those not listed follow by name."""


@dataclass(frozen=True, slots=True)
class Resolved:
    """Whether a feature is on, and why."""

    value: bool
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The backend that was taken.

    rejected: by name, why ``"auto"`` took none of the others
    features: every feature of the requirements, resolved
    """

    spec: BackendSpec
    distribution: str
    version: str
    rejected: Mapping[str, str]
    features: Mapping[str, Resolved]


class BackendRefusedError(ConfigError):
    """The backend that was asked for, or with ``"auto"`` every one, cannot hold what was asked.

    :param refusals: every reason that the rules and the plugins gave.
    """

    def __init__(self, message: str, refusals: tuple[Refusal, ...]) -> None:
        super().__init__(message)
        self.refusals = refusals


def select_backend(
    name: str,
    requirements: Requirements,
    host: PluginHost,
    *,
    installed: Installed = installed_version,
    probe: Callable[[BackendSpec], object] = lambda spec: None,
) -> Selection:
    """The backend ``name``, or with ``"auto"`` the first of the order that holds what is asked.

    :param probe: called before ``"auto"`` takes a backend, which its ``ConfigError`` prevents.
    :raises BackendRefusedError: the named backend cannot, with all reasons and who else could; or
        with ``"auto"`` none can, with the reasons of each.
    :raises ConfigError: no such backend, or its plugin is broken.
    """
    if name == "auto":
        return _select_auto(requirements, host, installed, probe)
    backend = host.require(name)
    reasons = objections(requirements, backend.spec, host, installed=installed)
    if reasons:
        able = [
            other.spec.name
            for other in host.backends().values()
            if not objections(requirements, other.spec, host, installed=installed)
        ]
        raise BackendRefusedError(
            f"attention backend {name!r} cannot serve what was asked:"
            + _listed(reasons)
            + f"\nBackends that could: {', '.join(able) or 'none'}.",
            tuple(reasons),
        )
    return _selection(backend, requirements, {})


def objections(
    requirements: Requirements,
    spec: BackendSpec,
    host: PluginHost,
    *,
    installed: Installed = installed_version,
) -> list[Refusal]:
    """All reasons against ``spec``: what the rules refuse, then what the plugins veto.

    Of a pair the plugins are asked for the pair and for each of the two, as a check looks for the
    name of its own backend.
    """
    features = {
        name: resolved.value for name, resolved in resolve_features(requirements, spec).items()
    }
    resolved = replace(requirements, features=features)
    vetoes = [veto for one in (spec, *parts_of(spec)) for veto in host.check(resolved, one)]
    return refusals(requirements, spec, installed=installed) + list(dict.fromkeys(vetoes))


def resolve_features(requirements: Requirements, spec: BackendSpec) -> dict[str, Resolved]:
    """Turn each feature of the requirements on or off; one that is asked for stays on."""
    return {
        feature: _resolve(feature, requirements, spec)
        for feature in FEATURES
        if feature in requirements.features
    }


def load_factory(spec: BackendSpec) -> type[AttentionBackend]:
    """Import the backend's class and let it load its kernel library, which only now may load.

    :raises ConfigError: the factory cannot be imported, is no complete ``AttentionBackend``, or
        its library cannot be loaded.
    """
    from .base import AttentionBackend

    for part in parts_of(spec):
        load_factory(part)  # so that what is wrong is said of the one that it is wrong with
    prefix = f"attention backend {spec.name!r}: its factory {spec.factory!r}"
    module_name, colon, class_name = spec.factory.partition(":")
    if not (module_name and colon and class_name):
        raise ConfigError(f"{prefix} is not of the form 'package.module:Class'. Mend the plugin.")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        remedy = spec.install or "mend or reinstall the plugin"
        raise ConfigError(
            f"{prefix} cannot be imported: {type(error).__name__}: {error}. To mend it: {remedy}"
        ) from error
    factory = getattr(module, class_name, None)
    if factory is None:
        raise ConfigError(f"{prefix}: {module_name} has no {class_name}. Mend the plugin.")
    if not (inspect.isclass(factory) and issubclass(factory, AttentionBackend)):
        raise ConfigError(f"{prefix} is no subclass of AttentionBackend. Mend the plugin.")
    written = spec.capabilities.engine_writes_kv
    shape, calls = "kv_cache_shape", {"run_written" if written else "run"}
    if not isinstance(spec.capabilities.cell("cuda_graph"), Unsupported):
        calls |= {"capture", "replay"}
    inherited = {n for n in (shape, *calls) if getattr(factory, n) is getattr(AttentionBackend, n)}
    missing = sorted(factory.__abstractmethods__ | (inherited - {shape}))
    if missing:
        raise ConfigError(f"{prefix} does not implement {', '.join(missing)}. Mend the plugin.")
    if written and shape not in inherited:
        raise ConfigError(
            f"{prefix} has a kv_cache_shape of its own, and declares engine_writes_kv: the engine "
            "writes one layout only. Mend the plugin."
        )
    _load_library(factory, spec)
    return factory


def _load_library(factory: type[AttentionBackend], spec: BackendSpec) -> None:
    try:
        factory.load()
    except ConfigError:
        raise
    except Exception as error:
        remedy = spec.install or "mend or reinstall what it needs"
        raise ConfigError(
            f"attention backend {spec.name!r} cannot load its library: {type(error).__name__}: "
            f"{error}. To mend it: {remedy}"
        ) from error


def _select_auto(
    requirements: Requirements,
    host: PluginHost,
    installed: Installed,
    probe: Callable[[BackendSpec], object],
) -> Selection:
    taken: RegisteredBackend | None = None
    rejected: dict[str, str] = {}
    refused: list[Refusal] = []
    for name in _auto_names(host):
        backend = host.backends().get(name)
        if backend is None:
            reason = host.unavailable(name)
            if reason is not None:
                rejected[name] = f"{reason}."
        elif backend.spec.unproved:
            rejected[name] = f"{backend.spec.unproved}: it is taken by name only."
        elif reasons := objections(requirements, backend.spec, host, installed=installed):
            rejected[name] = " ".join(map(str, reasons))
            refused += reasons
        elif taken is not None:
            rejected[name] = f"could serve, but comes after {taken.spec.name} in the order."
        elif objection := _broken(probe, backend.spec):
            rejected[name] = objection
        else:
            taken = backend
    if taken is not None:
        return _selection(taken, requirements, rejected)
    tried = "".join(f"\n- {name}: {reason}" for name, reason in rejected.items())
    problems = "".join(f"\n- {problem}" for problem in host.problems())
    raise BackendRefusedError(
        "no attention backend can serve what was asked."
        + (tried or " None is installed.")
        + (f"\nProblems with plugins:{problems}" if problems else ""),
        tuple(refused),
    )


def _broken(probe: Callable[[BackendSpec], object], spec: BackendSpec) -> str:
    """Why the backend cannot be used although it could serve; empty where it can."""
    try:
        probe(spec)
    except ConfigError as error:
        return str(error)
    return ""


def _auto_names(host: PluginHost) -> list[str]:
    others = sorted({*host.backends(), *host.contested()} - set(AUTO_ORDER))
    return [*AUTO_ORDER, *others]


def _selection(
    backend: RegisteredBackend, requirements: Requirements, rejected: Mapping[str, str]
) -> Selection:
    return Selection(
        spec=backend.spec,
        distribution=backend.distribution,
        version=backend.version,
        rejected=rejected,
        features=resolve_features(requirements, backend.spec),
    )


def _resolve(feature: str, requirements: Requirements, spec: BackendSpec) -> Resolved:
    asked = requirements.features[feature]
    if asked is False:
        return Resolved(False, "not asked for")
    prefix = "asked for" if asked else "auto"
    match cell_for(feature, requirements, spec):
        case Supported():
            return Resolved(True, f"{prefix}: supported")
        case Conditional(constraint):
            return Resolved(True, f"{prefix}: {constraint}")
        case Unsupported(reason):
            return Resolved(asked is True, f"{prefix}: {reason}")


def _listed(reasons: list[Refusal]) -> str:
    return "".join(f"\n- {reason}" for reason in reasons)
