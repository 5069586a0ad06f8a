"""Which plugins are installed: the entry points, in an order that does not follow ``sys.path``."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

GROUP = "isobit.plugins"
"""The entry-point group of plugins."""

DISTRIBUTION = "isobit"

BUILT_IN = {
    "fa3": "isobit.backends.fa3",
    "flashinfer": "isobit.backends.flashinfer",
    "torch": "isobit.backends.torch",
    "triton": "isobit.backends.triton",
}
"""Isobit's own entry points, as its ``pyproject.toml`` declares them."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plugin that is installed and not loaded yet.

    target: ``"package.module"`` or ``"package.module:attribute"``, what ``load`` imports
    """

    name: str
    distribution: str
    version: str
    target: str
    load: Callable[[], object]


def discover() -> list[Candidate]:
    """Every installed plugin, sorted by entry-point name, then by distribution.

    In a source tree that is not installed, Isobit's own entry points are taken from ``BUILT_IN``.
    """
    found = [_candidate(entry) for entry in entry_points(group=GROUP)]
    if not any(_normal(candidate.distribution) == DISTRIBUTION for candidate in found):
        found += _built_in()
    return sorted(found, key=lambda c: (c.name, _normal(c.distribution), c.target))


def _candidate(entry: EntryPoint) -> Candidate:
    dist = entry.dist
    # Metadata may be damaged; a plugin without a name or version is still a plugin.
    name = (dist.metadata["Name"] if dist else None) or "unknown distribution"
    version = (dist.metadata["Version"] if dist else None) or "unknown version"
    return Candidate(entry.name, name, version, entry.value, entry.load)


def _built_in() -> list[Candidate]:
    from .. import __version__

    entries = [EntryPoint(name, target, GROUP) for name, target in BUILT_IN.items()]
    return [Candidate(e.name, DISTRIBUTION, __version__, e.value, e.load) for e in entries]


def _normal(distribution: str) -> str:
    """A distribution's name as PEP 503 normalises it."""
    return re.sub(r"[-_.]+", "-", distribution).lower()
