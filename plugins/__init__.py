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
    from ..kernels.threads import one_thread

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
    "one_thread",
]

_NEED_TORCH = {
    "AttentionBackend": "..backends.base",
    "AttentionConfig": "..backends.base",
    "Batch": "..backends.base",
    "LayerCache": "..backends.base",
    "one_thread": "..kernels.threads",
}


def __getattr__(name: str) -> object:
    module = _NEED_TORCH.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(module, __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_NEED_TORCH])
