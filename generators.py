"""Keeps the user's global random generators as they are, whatever an import does to them."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def kept_generators() -> Iterator[None]:
    """Put Python's, NumPy's and torch's global generators back when the block ends.

    Some versions of transformers draw from Python's generator when they are imported. A library
    that is not loaded when the block begins has no state that a user could have set.
    """
    python = random.getstate()
    numpy = sys.modules.get("numpy")
    torch = sys.modules.get("torch")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    torch_state = torch.get_rng_state() if torch is not None else None
    try:
        yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
        if torch is not None:
            torch.set_rng_state(torch_state)
