"""Attributes of living objects, replaced for the length of a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def replaced(owner: object, name: str, value: object) -> Iterator[None]:
    """``owner.name`` is ``value`` until the block is left; then it is what it was.

    What the class gives, such as a method, shows again rather than being pinned to the object.
    """
    own = vars(owner)
    before = own.get(name)
    was_own = name in own
    setattr(owner, name, value)
    try:
        yield
    finally:
        if was_own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)
