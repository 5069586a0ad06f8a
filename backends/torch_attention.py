"""The embedded backend: paged attention by the kernels of ``kernels/attention.py``.

On a CPU those are C or torch; on CUDA torch, a tile at a time, which is right and slow.

It keeps the attention contract of that file, so a decode step gives the bits of a prefill and
any chunking those of any other.
"""

from __future__ import annotations

from torch import Tensor

from ..kernels.dispatch import load_kernels
from .base import AttentionBackend, AttentionConfig, Batch, LayerCache


class TorchAttention(AttentionBackend):
    """Attention over NHD pages; the plan is the batch itself, for its index tensors suffice."""

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__(config)
        self._kernels = load_kernels(config.kernels, config.device)

    def plan(self, batch: Batch) -> Batch:
        return batch

    def run_written(self, q: Tensor, layer: LayerCache, plan: Batch, out: Tensor) -> None:
        self._kernels.paged_attention(
            q,
            layer.k,
            layer.v,
            plan.block_table,
            plan.cu_seqlens_q,
            plan.seq_lens,
            self.config.scale,
            out,
        )
