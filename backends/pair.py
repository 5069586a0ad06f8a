"""A pair of backends, one for prefills and one for decodes, declared as one.

``prefill=NAME,decode=NAME`` names a pair wherever a backend's name is asked for. What the two
declare is joined into one ``BackendSpec`` of data, and by that the matrix judges the pair as it
judges any backend; ``pair_attention.py`` runs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TypeVar

from ..errors import ConfigError
from .capabilities import (
    API_VERSION,
    FEATURES,
    BackendSpec,
    Capabilities,
    Cell,
    Conditional,
    Supported,
    Unsupported,
    did_you_mean,
)
from .rules import describe_set

PHASES = ("prefill", "decode")
FACTORY_MODULE = "isobit.backends.pair_attention"

Value = TypeVar("Value")
_Gpus = tuple[tuple[int, int] | None, tuple[int, int] | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSpec(BackendSpec):
    """The joint declaration of two backends."""

    prefill: BackendSpec
    decode: BackendSpec


def parts_of(spec: BackendSpec) -> tuple[BackendSpec, ...]:
    """The two of a pair, the prefill's first; none of any other backend."""
    return (spec.prefill, spec.decode) if isinstance(spec, PairSpec) else ()


def parse_pair(text: str) -> tuple[str, str] | None:
    """The names for prefill and decode, given in any order; ``None`` of a single name.

    :raises ConfigError: a phase is missing, unknown or named twice, or both name one backend.
    """
    if "=" not in text:
        return None
    names: dict[str, str] = {}
    for part in text.split(","):
        phase, _, name = (word.strip() for word in part.partition("="))
        if phase not in PHASES:
            raise _misread(text, f"{phase!r} is no phase.{did_you_mean(phase, PHASES)}")
        if phase in names:
            raise _misread(text, f"it names two backends for {phase}.")
        names[phase] = name
    missing = [phase for phase in PHASES if not names.get(phase)]
    if missing:
        raise _misread(text, f"it names no backend for {' and '.join(missing)}.")
    prefill, decode = (names[phase] for phase in PHASES)
    if prefill == decode:
        raise ConfigError(
            f"attention backend {text!r} was asked for: wanted two backends, and both phases name "
            f"{prefill!r}. Pass {prefill!r} alone: by itself it may promise more than a pair."
        )
    return prefill, decode


def _misread(text: str, problem: str) -> ConfigError:
    return ConfigError(
        f"attention backend {text!r} was asked for: {problem} Pass a backend's name, or "
        "prefill=NAME,decode=NAME."
    )


def join(prefill: BackendSpec, decode: BackendSpec) -> PairSpec:
    """What holds of both phases together.

    Both must offer a dtype, a device, a size, and hold a feature; but only prefills are cut into
    chunks, and only decodes are captured. Two kernels give two sets of bits, so a decode never
    stands for a prefill. ``"auto"`` takes no pair.

    :raises ConfigError: there is nothing that both could serve, or one writes its own KV cache;
        with all reasons.
    """
    problems = list(_problems(prefill, decode))
    if problems:
        raise ConfigError(
            f"attention backends {prefill.name!r} and {decode.name!r} cannot be a pair:"
            + "".join(f"\n- {problem}." for problem in problems)
            + "\nPass two that agree, or one backend for both phases."
        )
    p, d = prefill.capabilities, decode.capabilities
    devices = _devices(p, d)
    lowest, highest = _gpus(p, d) if "cuda" in devices else (None, None)
    holders = {"cuda_graph": (decode,), "chunked_prefill": (prefill,)}
    both = (prefill, decode)
    unproved = [f"{spec.name}: {spec.unproved}" for spec in both if spec.unproved]
    return PairSpec(
        name=f"prefill={prefill.name},decode={decode.name}",
        api=API_VERSION,  # a host admits no other
        factory=f"{FACTORY_MODULE}:{prefill.factory},{decode.factory}",
        capabilities=Capabilities(
            dtypes=p.dtypes & d.dtypes,
            devices=devices,
            head_dims=_shared(p.head_dims, d.head_dims),
            page_sizes=_shared(p.page_sizes, d.page_sizes),
            compute_capability=lowest,
            highest_compute_capability=highest,
            features={f: _cell(f, *holders.get(f, both)) for f in FEATURES},
            deterministic=p.deterministic and d.deterministic,
            chunk_invariant=p.chunk_invariant,
            alignment=p.alignment,
            decode_equals_prefill=False,
            engine_writes_kv=True,
        ),
        requires=tuple(dict.fromkeys(prefill.requires + decode.requires)),
        also_requires=_joined("; ", prefill.also_requires, decode.also_requires),
        install=_joined(" && ", *map(_install, both)),
        self_check=prefill.self_check or decode.self_check,
        unproved="; ".join(["a pair is taken by name only", *unproved]),
        prefill=prefill,
        decode=decode,
    )


def _problems(prefill: BackendSpec, decode: BackendSpec) -> Iterator[str]:
    """Why no start-up at all could have this pair."""
    p, d = prefill.capabilities, decode.capabilities
    for name in ("devices", "dtypes", "head_dims", "page_sizes"):
        one, other = getattr(p, name), getattr(d, name)
        shared = _shared(one, other)
        if shared is not None and not shared:
            offers = f"offers {describe_set(one)}, {decode.name} {describe_set(other)}"
            yield f"{name}: {prefill.name} {offers}"
    if "cuda" in _devices(p, d) and _disjoint(*_gpus(p, d)):
        yield f"compute_capability: {prefill.name} offers {p.gpus}, {decode.name} {d.gpus}"
    for spec in (prefill, decode):
        if not spec.capabilities.engine_writes_kv:
            yield (
                f"engine_writes_kv: {spec.name} writes its KV cache itself, in a form of its own "
                "that another backend cannot read"
            )


def _shared(
    one: AbstractSet[Value] | None, other: AbstractSet[Value] | None
) -> AbstractSet[Value] | None:
    """What is in both sets, where ``None`` is any value."""
    if one is None or other is None:
        return other if one is None else one
    return one & other


def _devices(p: Capabilities, d: Capabilities) -> AbstractSet[str]:
    """What both offer; of CPU and GPU the CPU alone where they serve no GPU together."""
    both = p.devices & d.devices
    return both - {"cuda"} if "cpu" in both and _disjoint(*_gpus(p, d)) else both


def _disjoint(lowest: tuple[int, int] | None, highest: tuple[int, int] | None) -> bool:
    return lowest is not None and highest is not None and lowest > highest


def _gpus(p: Capabilities, d: Capabilities) -> _Gpus:
    """The lowest and the highest compute capability that both serve."""
    lowest = [c.compute_capability for c in (p, d) if c.compute_capability]
    highest = [c.highest_compute_capability for c in (p, d) if c.highest_compute_capability]
    return max(lowest, default=None), min(highest, default=None)


def _cell(feature: str, *specs: BackendSpec) -> Cell:
    """What all hold of a feature; what one lacks or conditions is said with its name."""
    cells = {spec.name: spec.capabilities.cell(feature) for spec in specs}
    lacking = [f"{n}: {cell.reason}" for n, cell in cells.items() if isinstance(cell, Unsupported)]
    if lacking:
        return Unsupported("; ".join(lacking))
    limits = [
        f"{n}: {cell.constraint}" for n, cell in cells.items() if isinstance(cell, Conditional)
    ]
    return Conditional("; ".join(limits)) if limits else Supported()


def _install(spec: BackendSpec) -> str:
    """The line that installs what a backend requires; empty where it requires nothing."""
    quoted = " ".join(f"'{text}'" for text in spec.requires)
    return spec.install or (f"pip install {quoted}" if quoted else "")


def _joined(separator: str, *texts: str) -> str:
    return separator.join(dict.fromkeys(filter(None, texts)))
