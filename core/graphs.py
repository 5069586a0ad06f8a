"""Decode steps captured once at start-up and replayed: CUDA graphs, and on the CPU their tapes.

A graph covers a step from the embedding to the final norm; logits and sampling come after it. A
step is filled up to the next captured size with padding on the null page. That changes no bit: a
row's bits depend on its own sequence alone. A graph keeps the weights and kernels of its capture.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..backends.base import AttentionBackend, Batch, first_decodes
from ..backends.recording import Recorded, memory_pool, record, warm_up
from .blaming import blaming

Compute = Callable[[Batch, Any], Tensor]
"""(batch, the backend's plan of it) -> hidden states ``[T, hidden_size]``."""

_COPIED = ("token_ids", "positions", "slot_mapping", "seq_lens")
_DENSE = 8  # sizes are powers of two up to here, then its multiples


def graph_sizes(most: int) -> list[int]:
    """The captured sizes up to ``most``, which is the last: 1, 2, 4, 8, 16, 24, 32, …"""
    sizes = [size for size in (1, 2, 4, *range(_DENSE, most, _DENSE)) if size < most]
    return [*sizes, most]


@dataclass(frozen=True, slots=True)
class _Graph:
    batch: Batch
    plan: Any
    recorded: Recorded


class DecodeGraphs:
    """One graph a size, over shared input and output tensors and one pool of memory.

    :param compute: the step to capture; it must not wait for the device
    :param sizes: numbers of sequences, ascending
    :raises BackendError: the backend cannot be captured, or a call of it raised an error.

    ``seconds`` and ``memory`` (bytes of a GPU) are what capturing took.
    """

    def __init__(
        self,
        backend: AttentionBackend,
        compute: Compute,
        sizes: Sequence[int],
        hidden_size: int,
    ) -> None:
        began, free = time.perf_counter(), free_memory(backend.config.device)
        config = backend.config
        self._backend = backend
        self._device = config.device
        self.sizes = tuple(sizes)
        most = self.sizes[-1]
        max_pages = -(-config.max_model_len // config.page_size)

        def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=config.device)

        self._static = Batch(
            token_ids=zeros(torch.int64, most),
            positions=zeros(torch.int64, most),
            slot_mapping=zeros(torch.int64, most),
            cu_seqlens_q=torch.arange(most + 1, dtype=torch.int32, device=config.device),
            seq_lens=zeros(torch.int32, most) + 1,
            block_table=zeros(torch.int32, most, max_pages),
            query_lens=[1] * most,
            kv_lens=[1] * most,
            num_decodes=most,
        )
        self._hidden = zeros(config.dtype, most, hidden_size)
        self._graphs = self._capture(compute)
        self.seconds = time.perf_counter() - began
        self.memory = free - free_memory(config.device)

    def padding(self, num_seqs: int) -> int | None:
        """Sequences that a decode step lacks to the next captured size; None where it is larger."""
        return next((size - num_seqs for size in self.sizes if size >= num_seqs), None)

    def holds(self, batch: Batch) -> bool:
        """Whether the batch is a decode step of a captured size."""
        return batch.num_decodes == batch.num_seqs and batch.num_seqs in self._graphs

    def replay(self, batch: Batch) -> Tensor:
        """Hidden states ``[B, hidden_size]`` of a batch that ``holds``; valid until the next."""
        graph = self._graphs[batch.num_seqs]
        for name in _COPIED:
            getattr(graph.batch, name).copy_(getattr(batch, name))
        width = batch.block_table.shape[1]
        graph.batch.block_table[:, :width].copy_(batch.block_table)
        graph.batch.block_table[:, width:].zero_()
        now = replace(graph.batch, query_lens=batch.query_lens, kv_lens=batch.kv_lens)
        self._backend.replay(graph.plan, now)
        graph.recorded.replay()
        return self._hidden[: batch.num_seqs]

    @torch.inference_mode()
    def _capture(self, compute: Compute) -> dict[int, _Graph]:
        """Largest first, so that the smaller ones find room in its memory.

        Until the first replay every input is padding.
        """
        with self._blaming("capture"):
            self._backend.capture(self.sizes[-1])
        pool = memory_pool(self._device)
        return {size: self._capture_one(size, compute, pool) for size in reversed(self.sizes)}

    def _capture_one(self, size: int, compute: Compute, pool: Any) -> _Graph:
        batch = first_decodes(self._static, size)
        with self._blaming("plan"):
            plan = self._backend.plan(batch)

        def work() -> None:
            self._hidden[:size].copy_(compute(batch, plan))

        for _ in range(2):  # compiles kernels and chooses the linears' candidates
            warm_up(work, self._device)
        return _Graph(batch, plan, record(work, self._device, pool))

    def _blaming(self, call: str) -> AbstractContextManager[None]:
        return blaming(type(self._backend).__name__, call)


def free_memory(device: torch.device) -> int:
    """Bytes that a GPU has left, what torch's allocator keeps in stock apart."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info(device)[0])
