"""Steps with a prefill, replayed in pieces: the model between two attention calls is captured.

Attention is launched as in any step, under the step's own plan, so backends know nothing of this.
A step is filled up to the next captured number of tokens with rows on the null page. That changes
no bit: a row's bits depend on that row alone, and attention does not see the rows too many. What
they find as its output is zeros or an earlier step's; what becomes of it nobody reads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends.base import AttentionConfig, Batch
from ..backends.recording import Recorded, memory_pool, recording, warm_up
from .graphs import free_memory

Heads = tuple[Tensor, ...]
"""What a layer gives attention, each ``[T, heads, head_dim]``: q, k and v, or q alone where the
engine writes the other two."""

Model = Callable[[Tensor, Tensor, Tensor, Callable[..., Tensor]], Tensor]
"""``(token_ids, positions, slot_mapping, attend)`` -> hidden states ``[T, hidden_size]``, where
``attend(layer, *heads)`` gives a layer's ``[T, q_heads, head_dim]``."""

_COPIED = ("token_ids", "positions", "slot_mapping")
"""What of a batch the model is given, in its order."""
_SMALLEST = 16


def piece_sizes(most: int) -> list[int]:
    """The captured numbers of tokens up to ``most``, which is the last: 16, 32, 64, …"""
    sizes = [_SMALLEST]
    while sizes[-1] < most:
        sizes.append(2 * sizes[-1])
    return [*sizes[:-1], most]


@dataclass(frozen=True, slots=True)
class _Captured:
    """One size. Piece ``i`` ends with the heads of layer ``i``, the last with the final norm."""

    pieces: Sequence[Recorded]
    heads: Sequence[Heads]
    hidden: Tensor


class PiecewiseGraphs:
    """The pieces of every size, over shared input tensors and one pool of memory.

    :param config: what the attention backend was made for
    :param model: what to capture; between the calls of ``attend`` it must not wait for the device
    :param sizes: numbers of tokens, ascending
    :raises BackendError: the model cannot be captured.

    ``seconds`` and ``memory`` (bytes of a GPU) are what capturing took.
    """

    def __init__(self, config: AttentionConfig, model: Model, sizes: Sequence[int]) -> None:
        began, free = time.perf_counter(), free_memory(config.device)
        self._device = config.device
        self.sizes = tuple(sizes)
        most = self.sizes[-1]
        # A tensor each: a kernel may be compiled differently for one that begins at an odd address.
        self._inputs = {
            name: torch.zeros(most, dtype=torch.int64, device=config.device) for name in _COPIED
        }
        shape = (most, config.num_q_heads, config.head_dim)
        self._out = torch.zeros(shape, dtype=config.dtype, device=config.device)
        self._captured = self._capture(model)
        self.seconds = time.perf_counter() - began
        self.memory = free - free_memory(config.device)

    def holds(self, batch: Batch) -> bool:
        """Whether the batch has a prefill and at most as many tokens as the largest size."""
        return batch.num_decodes < batch.num_seqs and batch.num_tokens <= self.sizes[-1]

    def replay(self, batch: Batch, attend: Callable[[int, Heads, Tensor], None]) -> Tensor:
        """Hidden states ``[T, hidden_size]`` of a batch that ``holds``; valid until the next.

        :param attend: ``(layer, heads, out)`` of the batch's rows; fills ``out``.
        """
        tokens = batch.num_tokens
        size = next(size for size in self.sizes if size >= tokens)
        for name, rows in self._inputs.items():
            rows[:tokens].copy_(getattr(batch, name))
            rows[tokens:size].zero_()
        captured, out = self._captured[size], self._out[:tokens]
        captured.pieces[0].replay()
        for layer, heads in enumerate(captured.heads):
            attend(layer, tuple(rows[:tokens] for rows in heads), out)
            captured.pieces[layer + 1].replay()
        return captured.hidden[:tokens]

    @torch.inference_mode()
    def _capture(self, model: Model) -> dict[int, _Captured]:
        """Largest first: what a smaller one needs only for a while finds room in its memory.

        The heads and hidden states of every size stay, so they take memory a size.
        """
        pool = memory_pool(self._device)
        return {size: self._capture_one(size, model, pool) for size in reversed(self.sizes)}

    def _capture_one(self, size: int, model: Model, pool: Any) -> _Captured:
        token_ids, positions, slot_mapping = (rows[:size] for rows in self._inputs.values())
        out, found = self._out[:size], list[Heads]()

        def work() -> None:
            model(token_ids, positions, slot_mapping, lambda layer, *heads: out)

        def cut(layer: int, *heads: Tensor) -> Tensor:
            found.append(heads)
            under_way.cut()
            return out

        warm_up(work, self._device)  # compiles kernels
        with recording(self._device, pool) as under_way:
            hidden = model(token_ids, positions, slot_mapping, cut)
        return _Captured(under_way.pieces, found, hidden)
