"""The phases of a start: how long each takes, and what to lower where memory runs out in one.

A step, which comes after the start, is here for the second of these alone.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import ConfigError, DeviceMemoryError
from .step import Step

WEIGHTS, KERNELS, STEP, KV_CACHE, GRAPHS = PHASES = (
    "weights",
    "kernels",
    "largest step",
    "KV cache",
    "graphs",
)
"""Reading or drawing the weights; packing them, compiling, choosing and checking the kernels; a
step of the largest size, to see what it takes; making the backend and its cache; capturing."""

OTHER = "other"
"""What is in no phase: configuration, plugins, tokenizer."""

_REMEDIES = {
    WEIGHTS: "Choose a smaller model or dtype='bfloat16'",
    KERNELS: "Choose a smaller model or dtype='bfloat16'",
    STEP: "Lower max_num_batched_tokens or max_num_seqs",
    KV_CACHE: "Lower kv_cache_memory or gpu_memory_utilization",
    GRAPHS: "Lower cuda_graph_max_bs, cuda_graph_max_tokens, max_model_len, "
    "gpu_memory_utilization or kv_cache_memory, or pass cuda_graph=False",
}


class Phases:
    """A stopwatch. On a GPU a phase ends when the device has done what it was given."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began = time.perf_counter()
        self._seconds = dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the block's time to a phase.

        :raises ConfigError: the GPU's memory ran out; the message says in which phase, and what to
            lower.
        """
        began = time.perf_counter()
        with explained_shortage(phase):
            yield
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        self._seconds[phase] += time.perf_counter() - began

    def seconds(self) -> dict[str, float]:
        """Of every phase, and of what is in none."""
        total = time.perf_counter() - self._began
        return self._seconds | {OTHER: total - sum(self._seconds.values())}


@contextmanager
def explained_shortage(phase: str) -> Iterator[None]:
    """Turn a GPU's shortage of memory within the block into an error that says what to lower.

    :raises ConfigError: the device's memory ran out.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"the GPU's memory ran out at start-up, phase {phase!r}: {_what_was_wanted(error)}. "
            f"{_REMEDIES[phase]}, or free what other processes hold."
        ) from error


@contextmanager
def explained_step(step: Step) -> Iterator[None]:
    """The same for a step.

    :raises DeviceMemoryError: the device's memory ran out.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise DeviceMemoryError(
            f"the GPU's memory ran out in a step of {step.num_tokens} tokens of {len(step.seqs)} "
            f"requests: {_what_was_wanted(error)}. It was not computed; the engine can be used "
            "again. Start it with a lower gpu_memory_utilization, kv_cache_memory, "
            "max_num_batched_tokens or max_num_seqs, or free what other processes hold."
        ) from error


def _what_was_wanted(error: torch.OutOfMemoryError) -> str:
    """The first sentences of torch's message: the rest is about its allocator."""
    return str(error).partition(". GPU")[0]
