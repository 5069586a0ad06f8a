"""Paged attention on CUDA devices by the kernels of ``kernels/triton``.

They keep the contract of ``kernels/triton/online_softmax.py``, so a decode step gives the bits of a
prefill and any chunking those of any other. Lengths are read on the device; what the host decides
from them is the launch grid, which changes no bit. A captured step has the grid of the longest
sequence that there may be, and its programs stop at the lengths they find; how many splits one
program walks by itself follows from the number of sequences, which a captured step keeps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..errors import ConfigError
from ..kernels.transfer import to_device
from ..kernels.triton.decode import Partials, allocate_room, attend_decode, partial_slots
from ..kernels.triton.prefill import attend_prefill, prefill_work
from ..kernels.triton.tiling import Scoring, Tiling, default_tiling, hopper_fits
from .base import AttentionBackend, AttentionConfig, Batch, LayerCache


@dataclass(frozen=True, slots=True)
class TritonPlan:
    """One step: the batch, and what each phase needs if it takes part.

    partials: workspace of the decodes
    work:     int32 ``[programs, 2]``, the (sequence, tile of rows) of each prefill program
    """

    batch: Batch
    partials: Partials | None
    work: Tensor | None


class TritonAttention(AttentionBackend):
    """Attention over NHD pages.

    :param tiling: sizes of the kernels; chosen for the device if left out
    :raises ConfigError: the device is no CUDA device, or the scale or the soft cap is not positive
    """

    def __init__(self, config: AttentionConfig, tiling: Tiling | None = None) -> None:
        super().__init__(config)
        if config.device.type != "cuda" and not triton.knobs.runtime.interpret:
            raise ConfigError(
                f"the triton backend runs on a CUDA device, and the device is {config.device}. "
                "Choose another backend, or for tests set TRITON_INTERPRET=1."
            )
        for name, value in (("scale", config.scale), ("soft cap", config.logit_soft_cap)):
            if value is not None and not value > 0:
                raise ConfigError(
                    f"the triton backend wants a positive {name} of the scores, and it is {value}. "
                    "Choose another backend."
                )
        itemsize, head_dim = config.dtype.itemsize, config.head_dim
        self._tiling = tiling or default_tiling(
            head_dim,
            itemsize,
            _shared_memory(config.device),
            hopper_fits(config.device, itemsize, head_dim, config.page_size),
        )
        self._scorings = [
            Scoring(
                scale=config.scale,
                soft_cap=config.logit_soft_cap,
                window=config.sliding_window(layer),
            )
            for layer in range(config.num_layers)
        ]
        self._graph_room: Tensor | None = None
        self._graph_seqs = 0

    def plan(self, batch: Batch) -> TritonPlan:
        partials = self._partials(batch) if batch.num_decodes else None
        work = self._work(batch) if batch.num_decodes < batch.num_seqs else None
        return TritonPlan(batch, partials, work)

    def run_written(self, q: Tensor, layer: LayerCache, plan: TritonPlan, out: Tensor) -> None:
        batch, scoring, tiling = plan.batch, self._scorings[layer.index], self._tiling
        if plan.partials is not None:
            attend_decode(
                q,
                layer.k,
                layer.v,
                batch.num_decodes,
                batch.seq_lens,
                batch.block_table,
                scoring,
                tiling,
                plan.partials,
                out,
            )
        if plan.work is not None:
            attend_prefill(
                q,
                layer.k,
                layer.v,
                plan.work,
                batch.cu_seqlens_q,
                batch.seq_lens,
                batch.block_table,
                scoring,
                tiling,
                out,
            )

    def capture(self, max_num_seqs: int) -> None:
        """Allocate the workspace that recorded steps share, for sequences of any length.

        Bytes: the most that a step of up to ``max_num_seqs`` sequences has of sequences x slots
        (``Partials``), x query heads x (head dim + 2) x 4.
        """
        self._graph_room = self._room(range(1, max_num_seqs + 1), self.config.max_model_len)
        self._graph_seqs = max_num_seqs

    def replay(self, plan: TritonPlan, batch: Batch) -> None:
        """Nothing to refresh: the kernels read the lengths from the batch's tensors."""

    def _partials(self, batch: Batch) -> Partials:
        """The workspace: in that of the graphs for a step that may be recorded."""
        c, decodes = self.config, batch.num_decodes
        room, kv_len = self._graph_room, c.max_model_len
        if room is None or not batch.num_seqs == decodes <= self._graph_seqs:
            kv_len = max(batch.kv_lens[:decodes])
            room = self._room([decodes], kv_len)
        slots = partial_slots(decodes, c.num_kv_heads, kv_len, self._tiling)
        serial = self._tiling.serial_splits(decodes * c.num_kv_heads)
        return Partials.within(room, decodes, slots, c.num_q_heads, c.head_dim, serial)

    def _room(self, sizes: Iterable[int], kv_len: int) -> Tensor:
        """Memory for the workspace of a step of any of these numbers of sequences."""
        c = self.config
        rows = max(n * partial_slots(n, c.num_kv_heads, kv_len, self._tiling) for n in sizes)
        return allocate_room(rows, c.num_q_heads, c.head_dim, c.device)

    def _work(self, batch: Batch) -> Tensor:
        c = self.config
        work = prefill_work(
            batch.query_lens,
            batch.kv_lens,
            batch.num_decodes,
            c.num_q_heads // c.num_kv_heads,
            self._tiling.prefill.rows,
        )
        return to_device(work, torch.int32, c.device)


def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may have; those of an H100 off the card."""
    if device.type != "cuda":
        return 232448
    properties: Any = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)
