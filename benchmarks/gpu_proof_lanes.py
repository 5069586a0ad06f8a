"""Configurations of ``gpu_proof.py`` side by side, as many as the memory holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Condition
from typing import Any

from gpu_proof_table import Configuration

LARGE = 50.0
"""GiB: one configuration of more than that at a time."""


class Room:
    """Memory that is shared out: ``take`` waits until there is enough of it."""

    def __init__(self, total: float) -> None:
        self.total = self._left = total
        self._changed = Condition()

    def take(self, amount: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: amount <= self._left)
            self._left -= amount

    def give_back(self, amount: float) -> None:
        with self._changed:
            self._left += amount
            self._changed.notify_all()


def side_by_side(
    chosen: Sequence[Configuration],
    work: Callable[[Configuration], dict[str, Any]],
    memory: float,
    jobs: int,
) -> list[dict[str, Any]]:
    """``work`` on all, up to ``jobs`` at a time: the large ones in turn, and others that fit."""
    room = Room(memory)
    large = [c for c in chosen if c.memory > LARGE]
    kept = min(memory, max((c.memory for c in large), default=0.0))
    room.take(kept)

    def in_turn() -> list[dict[str, Any]]:
        try:
            return [work(c) for c in large]
        finally:
            room.give_back(kept)

    def beside(configuration: Configuration) -> dict[str, Any]:
        amount = min(configuration.memory, room.total)
        room.take(amount)
        try:
            return work(configuration)
        finally:
            room.give_back(amount)

    others = [c for c in chosen if c not in large]
    beside_it = max(1, jobs - bool(large))
    with ThreadPoolExecutor(1) as lane, ThreadPoolExecutor(beside_it) as lanes:
        first, rest = lane.submit(in_turn), lanes.map(beside, others)
        return [*first.result(), *rest]
