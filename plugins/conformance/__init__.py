"""The conformance suite: proves what an attention backend declares.

``pytest --pyargs isobit.plugins.conformance --attention-backend=NAME``, or
``isobit plugins test NAME``. Importing this imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .again import repeat
    from .scenario import Geometry, Piece, Run, Sequence, Trial

__all__ = ["Geometry", "Piece", "Run", "Sequence", "Trial", "repeat"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{'again' if name == 'repeat' else 'scenario'}", __name__)
    return getattr(module, name)
