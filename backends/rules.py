"""The rules of the compatibility matrix: one pure function, from declared data to all reasons."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from importlib import metadata
from itertools import pairwise

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion, Version

from .capabilities import (
    API_VERSION,
    FEATURES,
    BackendSpec,
    Cell,
    Conditional,
    Refusal,
    Requirements,
    Supported,
    Unsupported,
    dotted,
)

Installed = Callable[[str], str | None]
"""From a distribution's name to its installed version, or ``None``."""

_CUT_FEATURES = ("chunked_prefill", "radix_cache")
_MODEL_FEATURES = ("sliding_window", "logit_soft_cap")


def installed_version(distribution: str) -> str | None:
    """The version of ``distribution`` in this environment, or ``None``."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def refusals(
    requirements: Requirements,
    spec: BackendSpec,
    *,
    installed: Installed = installed_version,
) -> list[Refusal]:
    """Every reason why ``spec`` cannot hold what is asked; empty if it can.

    The order is fixed: API, distributions, device, compute capability, dtype, head_dim,
    page_size, determinism, then the features as ``FEATURES`` lists them.

    :param installed: what is in the environment; the only thing that is looked up.
    """
    return [
        *_api(spec),
        *_distributions(spec, installed),
        *_device(requirements, spec),
        *_compute_capability(requirements, spec),
        *_sizes(requirements, spec),
        *_determinism(requirements, spec),
        *_features(requirements, spec),
    ]


def cell_for(feature: str, requirements: Requirements, spec: BackendSpec) -> Cell:
    """What ``spec`` holds of ``feature`` under these requirements: its own cell, or less.

    Determinism narrows the features that cut a prompt in two (a chunk boundary, the end of a
    cached prefix), and CUDA graphs need a CUDA device.
    """
    declared = spec.capabilities.cell(feature)
    if isinstance(declared, Unsupported):
        return declared
    if feature == "cuda_graph" and requirements.device != "cuda":
        return Unsupported(f"the device is {requirements.device}, where there are no graphs")
    if feature not in _CUT_FEATURES or not requirements.deterministic:
        return declared
    if not spec.capabilities.chunk_invariant:
        return Unsupported(
            f"the bits of {spec.name} depend on where a prompt is cut, and the start-up is "
            "deterministic"
        )
    constraints = [declared.constraint] if isinstance(declared, Conditional) else []
    constraints += _cut_constraints(feature, spec)
    return Conditional("; ".join(constraints)) if constraints else Supported()


def describe_set(values: AbstractSet[object] | None) -> str:
    """A set in a few words: ``8 to 256 in steps of 8``, ``bfloat16, float32``, ``any``."""
    if values is None:
        return "any"
    numbers = sorted(value for value in values if isinstance(value, int))
    steps = {b - a for a, b in pairwise(numbers)}
    if len(numbers) > 3 and len(steps) == 1:
        step = steps.pop()
        return f"{numbers[0]} to {numbers[-1]}" + (f" in steps of {step}" if step > 1 else "")
    words = [str(number) for number in numbers] or sorted(str(value) for value in values)
    return ", ".join(words) or "none"


def _cut_constraints(feature: str, spec: BackendSpec) -> Iterator[str]:
    alignment = spec.capabilities.alignment
    if feature == "chunked_prefill":
        if alignment > 1:
            yield f"every cut at a multiple of {alignment} tokens"
    elif not spec.capabilities.decode_equals_prefill:
        yield f"only prefill-written tokens (rounded to {alignment})"
    elif alignment > 1:
        yield f"matches rounded down to a multiple of {alignment} tokens"


def _api(spec: BackendSpec) -> Iterator[Refusal]:
    if spec.api != API_VERSION:
        yield Refusal(
            "api",
            f"plugin API {API_VERSION}",
            f"plugin API {spec.api}",
            f"Install a release of the plugin, or of Isobit, so that both have plugin API "
            f"{max(spec.api, API_VERSION)}.",
        )


def _distributions(spec: BackendSpec, installed: Installed) -> Iterator[Refusal]:
    for text in spec.requires:
        offered = _lacking(text, installed)
        if offered is not None:
            install = spec.install or f"pip install '{text}'"
            yield Refusal("requires", text, offered, f"Install it: {install}")


def missing_distributions(
    spec: BackendSpec, *, installed: Installed = installed_version
) -> list[str]:
    """What ``spec`` requires and the environment lacks, with what is found instead."""
    found = {text: _lacking(text, installed) for text in spec.requires}
    return [f"{text} ({offered})" for text, offered in found.items() if offered is not None]


def _lacking(text: str, installed: Installed) -> str | None:
    """What is found in place of the requirement ``text``; ``None`` if it is met."""
    try:
        requirement = Requirement(text)
    except InvalidRequirement:
        return "a requirement string that cannot be read"
    if requirement.marker is not None and not requirement.marker.evaluate():
        return None
    version = installed(requirement.name)
    if version is None:
        return f"{requirement.name} is not installed"
    try:
        met = requirement.specifier.contains(Version(version), prereleases=True)
    except InvalidVersion:
        met = not requirement.specifier
    return None if met else f"{requirement.name} {version} is installed"


def _device(requirements: Requirements, spec: BackendSpec) -> Iterator[Refusal]:
    devices = spec.capabilities.devices
    if requirements.device not in devices:
        yield Refusal(
            "device",
            requirements.device,
            describe_set(devices),
            f"Choose a backend that runs on {requirements.device}.",
        )


def _compute_capability(requirements: Requirements, spec: BackendSpec) -> Iterator[Refusal]:
    offers, have = spec.capabilities, requirements.compute_capability
    if requirements.device != "cuda" or offers.serves_gpu(have):
        return
    yield Refusal(
        "compute_capability",
        dotted(have) if have else "a GPU of unknown compute capability",
        offers.gpus,
        "Choose a backend for this GPU, or run on one that is offered.",
    )


def _sizes(requirements: Requirements, spec: BackendSpec) -> Iterator[Refusal]:
    offers = spec.capabilities
    if requirements.dtype not in offers.dtypes:
        yield Refusal(
            "dtype",
            requirements.dtype,
            describe_set(offers.dtypes),
            "Pass a dtype that is offered, or choose another backend.",
        )
    if offers.head_dims is not None and requirements.head_dim not in offers.head_dims:
        yield Refusal(
            "head_dim",
            str(requirements.head_dim),
            describe_set(offers.head_dims),
            "The model fixes its head_dim: choose another backend.",
        )
    if offers.page_sizes is not None and requirements.page_size not in offers.page_sizes:
        yield Refusal(
            "page_size",
            str(requirements.page_size),
            describe_set(offers.page_sizes),
            "Pass a page_size that is offered, or choose another backend.",
        )


def _determinism(requirements: Requirements, spec: BackendSpec) -> Iterator[Refusal]:
    if requirements.deterministic and not spec.capabilities.deterministic:
        yield Refusal(
            "deterministic",
            "bits that do not depend on the batch",
            "no such promise",
            "Choose a deterministic backend, or pass deterministic=False.",
        )


def _features(requirements: Requirements, spec: BackendSpec) -> Iterator[Refusal]:
    for feature, meaning in FEATURES.items():
        cell = cell_for(feature, requirements, spec)
        if requirements.features.get(feature) is not True or not isinstance(cell, Unsupported):
            continue
        if feature in _MODEL_FEATURES:
            remedy = f"The model needs {feature}: choose another backend."
        elif feature == "non_greedy_sampling":
            remedy = "Choose another backend, or ask for greedy requests only."
        else:
            remedy = f"Leave {feature} at auto or turn it off, or choose another backend."
        yield Refusal(feature, meaning, f"unsupported: {cell.reason}", remedy)
