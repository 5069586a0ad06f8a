"""Paged attention on Hopper by FlashAttention 3: decodes and prefills in one launch.

The kernel walks the KV tiles of a row from the last to the first, into one accumulator. A row's
bits follow from its position and the tile's length alone, provided that

- the sequence is not split: ``num_splits`` is 1. Its automatic choice, which is made where
  determinism is off, follows the batch;
- the tile's length is always the same. The kernel chooses it from the head_dim, and at head_dim 64
  from ``max_seqlen_q``. So that is a constant, but at head_dim 128: all tiles there have one
  length, and small steps take flatter ones;
- no layer has a window. Under one the last bit of some rows follows where the prompt was cut, as
  seen on an H200: windows are not declared.

Lengths and pages are read on the device, so a captured step needs no refreshing. Within a page of
up to 64 tokens the kernel leaves out what lies behind a sequence's end.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import AttentionBackend, AttentionConfig, Batch, LayerCache
from .fa3_providers import load_kernel

LONG_QUERY = 4096
"""A ``max_seqlen_q`` beyond which no choice of the kernel depends on it."""

_ONE_TILE_LENGTH = {128}
"""Head dims whose tile length does not follow ``max_seqlen_q``."""


@dataclass(frozen=True, slots=True)
class FlashPlan:
    """One step: the batch, and the ``max_seqlen_q`` that all its layers are launched with."""

    batch: Batch
    max_seqlen_q: int


class FlashAttention3(AttentionBackend):
    """Attention over NHD pages.

    :raises ConfigError: no library can be loaded
    """

    @classmethod
    def load(cls) -> None:
        load_kernel()

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__(config)
        self._kernel = load_kernel()
        self._constants = {
            "softmax_scale": config.scale,
            "is_causal": True,
            "window_size_left": -1,  # none
            "window_size_right": 0,
            "softcap": 0.0,  # none
            "num_splits": 1 if config.deterministic else 0,
        }

    @classmethod
    def library(cls) -> str:
        return load_kernel().library

    def plan(self, batch: Batch) -> FlashPlan:
        return FlashPlan(batch, self._max_seqlen_q(batch))

    def run_written(self, q: Tensor, layer: LayerCache, plan: FlashPlan, out: Tensor) -> None:
        batch = plan.batch
        self._kernel(
            q=q,
            k=layer.k,
            v=layer.v,
            out=out,
            cu_seqlens_q=batch.cu_seqlens_q,
            seqused_k=batch.seq_lens,
            page_table=batch.block_table,
            max_seqlen_q=plan.max_seqlen_q,
            max_seqlen_k=self.config.max_model_len,
            **self._constants,
        )

    def capture(self, max_num_seqs: int) -> None:
        """Nothing to allocate: what a launch needs it takes from the memory of the graphs."""

    def replay(self, plan: FlashPlan, batch: Batch) -> None:
        """Nothing to refresh: the kernel reads the lengths from the batch's tensors."""

    def _max_seqlen_q(self, batch: Batch) -> int:
        c = self.config
        if c.deterministic and c.head_dim not in _ONE_TILE_LENGTH:
            return max(LONG_QUERY, c.max_model_len)
        return max(batch.query_lens)
