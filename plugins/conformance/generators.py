"""Looks whether a global random generator was read or set."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from ...errors import BackendError

_Access = tuple[Callable[[], Any], Callable[[Any], Any], Callable[[], Any]]


@contextmanager
def untouched_generators() -> Iterator[None]:
    """What runs inside must leave the global generators alone; afterwards they are as before.

    :raises BackendError: it did not.
    """
    generators = _generators()
    before = {name: get() for name, (get, _, _) in generators.items()}
    try:
        for _, _, draw in generators.values():
            draw()  # a seed that was set before shows when it is set again
        drawn = {name: pickle.dumps(get()) for name, (get, _, _) in generators.items()}
        yield
        now = {name: pickle.dumps(get()) for name, (get, _, _) in generators.items()}
    finally:
        for name, (_, put, _) in generators.items():
            put(before[name])
    changed = [name for name in generators if drawn[name] != now[name]]
    if changed:
        raise BackendError(f"the global generator of {', '.join(changed)} was read or set")


def _generators() -> dict[str, _Access]:
    """How each is read, set and drawn from."""
    found: dict[str, _Access] = {
        "random": (random.getstate, random.setstate, random.random),
        "NumPy": (np.random.get_state, np.random.set_state, np.random.random),
        "torch": (
            lambda: torch.get_rng_state().numpy(),
            lambda state: torch.set_rng_state(torch.from_numpy(state)),
            lambda: torch.rand(1),
        ),
    }
    if torch.cuda.is_available():
        found["torch.cuda"] = (
            lambda: torch.cuda.get_rng_state().numpy(),
            lambda state: torch.cuda.set_rng_state(torch.from_numpy(state)),
            lambda: torch.rand(1, device="cuda"),
        )
    return found
