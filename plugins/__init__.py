"""What the author of a plugin imports. Importing this does not import torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ..backends.capabilities import (
    API_VERSION,
    BackendSpec,
    Capabilities,
    Conditional,
    Refusal,
    Requirements,
    Supported,
    Unsupported,
)
from .hookspecs import hookimpl

if TYPE_CHECKING:
    from ..backends.base import AttentionBackend, AttentionConfig, Batch, LayerCache

__all__ = [
    "API_VERSION",
    "AttentionBackend",
    "AttentionConfig",
    "BackendSpec",
    "Batch",
    "Capabilities",
    "Conditional",
    "LayerCache",
    "Refusal",
    "Requirements",
    "Supported",
    "Unsupported",
    "hookimpl",
]

_NEED_TORCH = {"AttentionBackend", "AttentionConfig", "Batch", "LayerCache"}


def __getattr__(name: str) -> object:
    if name not in _NEED_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("..backends.base", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_NEED_TORCH])
