"""Isobit: LLM inference that returns the same bits for the same request.

Importing this package imports neither torch nor a kernel library; names load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .generators import kept_generators

if TYPE_CHECKING:
    from .core.async_llm import AsyncLLM
    from .core.llm import LLM
    from .core.outputs import CompletionOutput, RequestOutput, ScoreOutput, StreamChunk
    from .core.stats import Stats
    from .sampling.params import SamplingParams

__version__ = "0.1.0"

_LAZY = {
    "LLM": "core.llm",
    "AsyncLLM": "core.async_llm",
    "CompletionOutput": "core.outputs",
    "RequestOutput": "core.outputs",
    "ScoreOutput": "core.outputs",
    "Stats": "core.stats",
    "StreamChunk": "core.outputs",
    "SamplingParams": "sampling.params",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "RequestOutput",
    "SamplingParams",
    "ScoreOutput",
    "Stats",
    "StreamChunk",
]


def __getattr__(name: str) -> object:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with kept_generators():
        return getattr(importlib.import_module(f".{module}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
