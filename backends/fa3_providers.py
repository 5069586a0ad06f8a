"""Finds a FlashAttention 3 library, whoever built it, and gives its kernel one calling convention.

Three packages bring one. None of them is imported, as that would run much else of it: the file of
its extension is found beside the package and loaded, which registers the operator ``fwd`` in a
namespace of its own. The builds differ in their arguments; a call is made up from the names in the
operator's schema, and a build that wants what is not known here is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import ConfigError
from .rules import Installed, installed_version


@dataclass(frozen=True, slots=True)
class Provider:
    """A package that may bring FlashAttention 3.

    package:       the top-level package, in whose folder the extension lies
    pattern:       the extension's file
    namespace:     of ``torch.ops``, where loading the file registers ``fwd``
    distributions: the names under which the package is installed
    """

    package: str
    pattern: str
    namespace: str
    distributions: tuple[str, ...]


PROVIDERS = (
    Provider("flash_attn_3", "_C*.so", "flash_attn_3", ("flash-attn-3",)),
    Provider("vllm", "vllm_flash_attn/_vllm_fa3_C*.so", "_vllm_fa3_C", ("vllm",)),
    Provider("sgl_kernel", "flash_ops*.so", "sgl_kernel", ("sglang-kernel", "sgl-kernel")),
)
"""In the order in which they are looked for: upstream's own build, vLLM's, SGLang's."""

_GIVEN = (
    *("q", "k", "v", "out", "cu_seqlens_q", "seqused_k", "max_seqlen_q", "max_seqlen_k"),
    *("page_table", "softmax_scale", "is_causal", "window_size_left", "window_size_right"),
    *("softcap", "num_splits"),
)
"""The arguments that every call gives; all builds have them, by these names."""

_NEUTRAL: Mapping[str, object] = MappingProxyType(
    {
        "attention_chunk": 0,
        "is_rotary_interleaved": False,
        "sm_margin": 0,
        "cp_world_size": 1,
        "cp_rank": 0,
        "only_qv": False,
    }
)
"""Values that ask for nothing, for arguments of some builds that have no default."""


@dataclass(frozen=True, slots=True)
class Library:
    """An extension file that was found, not loaded yet; ``version`` is its distribution's."""

    provider: Provider
    file: Path
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"{self.distribution} {self.version} ({self.file.name})"


@dataclass(frozen=True, slots=True)
class Kernel:
    """A loaded library's ``fwd``, called by the names of ``_GIVEN``."""

    library: str
    operator: Callable[..., object]
    template: tuple[object, ...]
    places: Mapping[str, int]

    def __call__(self, **given: object) -> None:
        """Attend, and write ``out``.

        :raises KeyError: an argument is missing or unknown.
        """
        arguments = list(self.template)
        for name in _GIVEN:
            arguments[self.places[name]] = given.pop(name)
        if given:
            raise KeyError(f"unknown arguments {sorted(given)}")
        self.operator(*arguments)


def find_library(installed: Installed = installed_version) -> Library | None:
    """The first installed library, or None. Nothing is imported or loaded.

    :param installed: the version of a distribution in the environment, or None.
    """
    for provider in PROVIDERS:
        for folder in _folders(provider.package):
            for file in sorted(folder.glob(provider.pattern)):
                return Library(provider, file, *_origin(provider, installed))
    return None


def install_line(installed: Installed = installed_version) -> str:
    """What a user types to get a library for the torch that is installed."""
    # A release is built for one torch, and recent ones require it: so pip picks one by torch.
    torch = (installed("torch") or "").partition("+")[0]
    return "pip install sglang-kernel" + (f" 'torch=={torch}'" if torch else "")


@cache
def load_kernel() -> Kernel:
    """The kernel of the first installed library, loaded once a process.

    :raises ConfigError: there is none, it does not load, or its arguments are not known here.
    """
    library = find_library()
    if library is None:
        names = ", ".join(provider.package for provider in PROVIDERS)
        raise ConfigError(
            f"wanted a FlashAttention 3 library, and none of {names} is installed with one. "
            f"Install one: {install_line()}"
        )
    import torch

    load_extension: Any = torch.ops.load_library
    try:
        load_extension(str(library.file))
        operator = getattr(torch.ops, library.provider.namespace).fwd.default
    except (OSError, RuntimeError, AttributeError) as error:
        cause = error.__cause__ or error  # torch's own error does not say what is missing
        first_line = str(cause).partition("\n")[0]
        raise ConfigError(
            f"the FlashAttention 3 library of {library} cannot be loaded: "
            f"{type(cause).__name__}: {first_line}. It must be built for the installed torch "
            f"{torch.__version__} and CUDA {torch.version.cuda or '(there is none)'}: "
            f"{install_line()}"
        ) from error
    return bind(operator, str(library))


def bind(operator: Any, library: str) -> Kernel:
    """The operator with a value for every argument that a call does not give.

    :param operator: an overload of ``torch.ops``, whose schema names its arguments
    :raises ConfigError: it lacks an argument, or wants one that is not known here.
    """
    arguments = operator._schema.arguments
    places = {argument.name: place for place, argument in enumerate(arguments)}
    lacking = [name for name in _GIVEN if name not in places]
    unknown = [a.name for a in arguments if a.name not in _GIVEN and not _can_be_left(a)]
    if lacking or unknown:
        reasons = [f"it has no {', '.join(lacking)}"] if lacking else []
        reasons += [f"it wants {', '.join(unknown)}"] if unknown else []
        raise ConfigError(
            f"{library} is a FlashAttention 3 that Isobit does not know: {'; '.join(reasons)}. "
            f"Install another version: {install_line()}"
        )
    return Kernel(library, operator, tuple(_left(argument) for argument in arguments), places)


def _can_be_left(argument: Any) -> bool:
    return (
        argument.name in _NEUTRAL
        or argument.has_default_value()
        or argument.type.kind() == "OptionalType"
    )


def _left(argument: Any) -> object:
    """What an argument is where the call does not give it."""
    if argument.name in _NEUTRAL:
        return _NEUTRAL[argument.name]
    return argument.default_value if argument.has_default_value() else None


def _folders(package: str) -> list[Path]:
    """Where the package lies, if it is installed; finding a top-level package runs none of it."""
    try:
        spec = find_spec(package)
    except ValueError:  # a module of that name was made by hand
        return []
    return [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]


def _origin(provider: Provider, installed: Installed) -> tuple[str, str]:
    for distribution in provider.distributions:
        version = installed(distribution)
        if version is not None:
            return distribution, version
    return provider.package, "of unknown version"
