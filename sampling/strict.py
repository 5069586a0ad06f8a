"""A class decorator: an unknown keyword is refused with the closest valid name."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Iterable
from typing import Any, TypeVar

from ..errors import UnknownParameterError

T = TypeVar("T")


def refuse_names(owner: str, given: Iterable[str], valid: Iterable[str]) -> None:
    """Raise if a name in ``given`` is not in ``valid``.

    :raises UnknownParameterError: naming every unknown parameter and the closest valid name.
    """
    names = list(valid)
    unknown = [name for name in given if name not in names]
    if not unknown:
        return
    parts = []
    for name in unknown:
        close = difflib.get_close_matches(name, names, n=1)
        parts.append(f"{name!r}" + (f" (did you mean {close[0]!r}?)" if close else ""))
    raise UnknownParameterError(
        f"{owner} has no parameter {', '.join(parts)}. Valid parameters: {', '.join(names)}."
    )


def refuse_unknown(cls: type[T]) -> type[T]:
    """Make ``cls(misspelt=…)`` raise ``UnknownParameterError``; the signature stays the same.

    Put it above ``@dataclass``. The error is a ``TypeError`` too, as Python's own would be.
    """
    original = cls.__init__
    names = [name for name in inspect.signature(original).parameters if name != "self"]

    @functools.wraps(original)
    def __init__(self: T, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        refuse_names(cls.__name__, kwargs, names)
        original(self, *args, **kwargs)

    cls.__init__ = __init__  # type: ignore[method-assign, assignment]
    return cls
