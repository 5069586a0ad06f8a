"""Finds stop strings in text that arrives piece by piece."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class StopMatch(NamedTuple):
    """``text[start:end]`` is the stop string ``stop``."""

    start: int
    end: int
    stop: str


def find_stop(text: str, stops: Sequence[str], end_after: int) -> StopMatch | None:
    """The first match that ends after position ``end_after``.

    "First" is the one that ends first, and of those the longest: that depends on the text alone,
    not on how it was cut into tokens.
    """
    found: list[StopMatch] = []
    for stop in stops:
        start = text.find(stop, max(0, end_after + 1 - len(stop)))
        if start >= 0:
            found.append(StopMatch(start, start + len(stop), stop))
    return min(found, key=lambda match: (match.end, match.start), default=None)


def held_back(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that could still grow into a stop string."""
    for length in range(min(len(text), max(map(len, stops), default=1) - 1), 0, -1):
        tail = text[-length:]
        if any(len(stop) > length and stop.startswith(tail) for stop in stops):
            return length
    return 0
