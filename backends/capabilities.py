"""The compatibility matrix: what a backend declares, what a start-up asks, and what is refused.

Everything here is data and pure functions. Absent means unsupported.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from types import MappingProxyType

from ..errors import ConfigError

API_VERSION = 1
"""Version of the contract: of ``base.py``, the hooks and the declarations in this file.

It rises by one whenever a backend that kept the old contract could fail under the new one; a new
field with a default, a new feature or a new hook leaves it as it is. Another ``api`` is refused
with both numbers.
"""

FEATURES: Mapping[str, str] = MappingProxyType(
    {
        "cuda_graph": "CUDA-graph capture and replay",
        "chunked_prefill": "a prompt computed in several steps",
        "radix_cache": "prefixes reused from earlier requests",
        "non_greedy_sampling": "temperature above 0",
        "sliding_window": "layers that see only the last tokens",
        "logit_soft_cap": "scores passed through a tanh cap",
    }
)
"""Every feature that a backend can declare or a start-up can ask for, with its meaning."""


FLAGS = ("deterministic", "chunk_invariant", "decode_equals_prefill", "engine_writes_kv")
"""The fields of ``Capabilities`` that are true or false."""


@dataclass(frozen=True, slots=True)
class Supported:
    """The feature holds without condition."""


@dataclass(frozen=True, slots=True)
class Conditional:
    """The feature holds under ``constraint``, a sentence for people.

    The constraint itself is enforced by the declarations it follows from (``chunk_invariant``,
    ``alignment``, ``decode_equals_prefill``) or by an ``isobit_check`` of the plugin.
    """

    constraint: str


@dataclass(frozen=True, slots=True)
class Unsupported:
    """The feature does not hold, for ``reason``."""

    reason: str


Cell = Supported | Conditional | Unsupported


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a backend can hold. A claim is judged by the conformance suite.

    dtypes:            names as torch spells them, ``"float32"``, ``"bfloat16"``, …
    head_dims:         a set, or ``None`` for any
    page_sizes:        a set, or ``None`` for any
    devices:           device types, ``"cpu"`` and ``"cuda"``
    compute_capability: lowest CUDA compute capability served, as ``(major, minor)``
    highest_compute_capability: the highest one served; ``None`` for any from the lowest up
    features:          cells by name from ``FEATURES``
    deterministic:     its bits do not depend on neighbours, order or launch geometry
    chunk_invariant:   a prompt's bits do not depend on where it was cut into chunks, provided
                       every cut is a multiple of ``alignment`` tokens
    alignment:         where a prompt may be cut and a reused prefix may end: multiples of this
    decode_equals_prefill: a decode step gives the bits that a prefill gives for that position
    engine_writes_kv:  the engine writes K and V into the cache, and calls ``run_written``;
                       otherwise the backend writes them, in ``run``

    :raises ConfigError: a feature that does not exist, or a value of the wrong type.
    """

    dtypes: AbstractSet[str]
    devices: AbstractSet[str]
    head_dims: AbstractSet[int] | None = None
    page_sizes: AbstractSet[int] | None = None
    compute_capability: tuple[int, int] | None = None
    highest_compute_capability: tuple[int, int] | None = None
    features: Mapping[str, Cell] = field(default_factory=dict)
    deterministic: bool = False
    chunk_invariant: bool = False
    alignment: int = 1
    decode_equals_prefill: bool = False
    engine_writes_kv: bool = False

    def __post_init__(self) -> None:
        for name in ("dtypes", "devices", "head_dims", "page_sizes"):
            _freeze_set(self, name)
        _check_features(self.features)
        for feature, cell in self.features.items():
            _check_type(f"the cell of {feature}", cell, (Supported, Conditional, Unsupported))
        object.__setattr__(self, "features", dict(self.features))
        if self.alignment < 1:
            raise ConfigError(f"alignment is a number of tokens from 1 up, not {self.alignment}.")

    def cell(self, feature: str) -> Cell:
        """The declared cell, or ``Unsupported`` where nothing is declared."""
        return self.features.get(feature, Unsupported("not declared"))

    def serves_gpu(self, have: tuple[int, int] | None) -> bool:
        """Whether GPUs of this compute capability are served; an unknown one only if all are."""
        lowest, highest = self.compute_capability, self.highest_compute_capability
        if have is None:
            return lowest is None and highest is None
        return (lowest or have) <= have <= (highest or have)

    @property
    def gpus(self) -> str:
        """The compute capabilities served: ``8.0 and up``, ``9.0``, or an empty string for any."""
        lowest, highest = self.compute_capability, self.highest_compute_capability
        if highest is None:
            return f"{dotted(lowest)} and up" if lowest else ""
        if lowest is None:
            return f"up to {dotted(highest)}"
        return dotted(lowest) if lowest == highest else f"{dotted(lowest)} to {dotted(highest)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendSpec:
    """A backend as its plugin declares it. Pure data: making one imports no kernel library.

    name:     what a user passes as ``attention_backend``; ``"auto"`` is taken
    api:      the ``API_VERSION`` that it was written for
    factory:  ``"package.module:Class"``, imported only when the backend is chosen
    capabilities: what it can hold
    requires: distributions that must be installed, as requirement strings
    also_requires: what else must be installed, in words, where no requirement string can say it;
        an ``isobit_check`` of the plugin enforces it
    install:  the line a user types to get them
    self_check: whether the backend must prove its declaration at every deterministic start-up,
        because a library that Isobit does not pin chooses its kernels
    unproved: why ``"auto"`` passes it over, and the proved matrix leaves it out: what nobody has
        shown yet; empty once it is proved

    :raises ConfigError: a value of the wrong type, or the name ``"auto"``.
    """

    name: str
    api: int
    factory: str
    capabilities: Capabilities
    requires: tuple[str, ...] = ()
    also_requires: str = ""
    install: str = ""
    self_check: bool = False
    unproved: str = ""

    def __post_init__(self) -> None:
        for name in ("name", "factory", "also_requires", "install", "unproved"):
            _check_type(name, getattr(self, name), (str,))
        _check_type("api", self.api, (int,))
        _check_type("capabilities", self.capabilities, (Capabilities,))
        _check_type("requires", self.requires, (tuple,))
        _check_type("self_check", self.self_check, (bool,))
        if not self.name or self.name == "auto":
            raise ConfigError(f"a backend cannot be named {self.name!r}. Choose another name.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirements:
    """What a start-up asks of its attention backend.

    dtype:     a name as torch spells it, ``"bfloat16"``
    head_dim:  of the model
    page_size: in tokens
    device:    a device type, ``"cpu"`` or ``"cuda"``
    compute_capability: of the CUDA device, as ``(major, minor)``; ``None`` elsewhere
    deterministic: whether the bits may depend on nothing but the request
    features:  True = asked for, False = ruled out, None = left to the backend (``"auto"``)

    :raises ConfigError: a feature that does not exist.
    """

    dtype: str
    head_dim: int
    page_size: int
    device: str
    compute_capability: tuple[int, int] | None
    deterministic: bool
    features: Mapping[str, bool | None]

    def __post_init__(self) -> None:
        _check_features(self.features)
        object.__setattr__(self, "features", dict(self.features))


@dataclass(frozen=True, slots=True)
class Refusal:
    """One reason why a backend cannot serve what was asked.

    rule:    what was broken, in a word: ``"dtype"``, ``"page_size"``, a feature's name, …
    wanted:  what the start-up asks
    offered: what the backend holds instead
    remedy:  a sentence: what the user can do
    """

    rule: str
    wanted: str
    offered: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.rule}: wanted {self.wanted}, offered {self.offered}. {self.remedy}"


def dotted(compute_capability: tuple[int, int]) -> str:
    """``9.0`` of ``(9, 0)``."""
    return f"{compute_capability[0]}.{compute_capability[1]}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the nearest known name, or an empty string."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def _check_features(features: Mapping[str, object]) -> None:
    for name in features:
        if name not in FEATURES:
            raise ConfigError(
                f"{name!r} is no feature; there are {', '.join(FEATURES)}."
                + did_you_mean(name, FEATURES)
            )


def _check_type(name: str, value: object, allowed: tuple[type, ...]) -> None:
    if not isinstance(value, allowed):
        wanted = " or ".join(t.__name__ for t in allowed)
        raise ConfigError(f"{name} must be {wanted}, not {value!r}.")


def _freeze_set(owner: object, name: str) -> None:
    value = getattr(owner, name)
    if value is not None:
        _check_type(name, value, (AbstractSet,))
        object.__setattr__(owner, name, frozenset(value))
