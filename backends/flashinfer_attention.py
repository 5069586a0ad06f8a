"""Paged attention on CUDA devices by FlashInfer's kernels.

Order of reduction, as read in FlashInfer 0.6.14, where bits are to be equal:

- A prefill runs FlashInfer's ``fa3`` kernel. Its tiles are of fixed size, lie at absolute KV
  positions, and are never split; a tile past a row's own position changes nothing. So the bits of a
  row depend on its position alone, wherever the prompt was cut.
- A decode runs the ``fa2`` kernel on tensor cores, with no split of the KV length. Its query tile
  holds the heads of one KV head and so depends on the model alone. The bits differ from the
  prefill's: the cache hands out no page that a decode wrote.

The ``fa2`` prefill is not used: its query tile follows the batch. A fixed split size is not used
for decodes: the splits of long contexts do not fit the grid of a captured step, and a step must
give the same bits captured and not.

Where the constraints are lifted, FlashInfer chooses kernels and splits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import AttentionBackend, AttentionConfig, Batch, LayerCache
from .flashinfer_decode import Decodes, SplitDecodes, UnsplitDecodes
from .flashinfer_prefill import Prefills
from .flashinfer_wrappers import Wrapper, building, window_left


@dataclass(frozen=True, slots=True)
class FlashInferPlan:
    """One step.

    num_decodes: rows of the decodes, the first ones
    decodes, prefills: by ``window_left``, the planned wrapper of each phase; empty where the phase
        takes no part
    """

    num_decodes: int
    decodes: dict[int, Wrapper]
    prefills: dict[int, Wrapper]


class FlashInferAttention(AttentionBackend):
    """Attention over NHD pages; a mixed step is a decode and a prefill.

    :raises ConfigError: FlashInfer's kernels cannot be built or loaded.
    """

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__(config)
        self._prefills = Prefills(config)
        self._decodes: Decodes = (
            UnsplitDecodes(config) if config.deterministic else SplitDecodes(config)
        )
        with building():
            self.plan(_one_of_each(config.device))

    def plan(self, batch: Batch) -> FlashInferPlan:
        n = batch.num_decodes
        return FlashInferPlan(
            num_decodes=n,
            decodes=self._decodes.plan(batch) if n else {},
            prefills=self._prefills.plan(batch) if n < batch.num_seqs else {},
        )

    def run_written(self, q: Tensor, layer: LayerCache, plan: FlashInferPlan, out: Tensor) -> None:
        n, window = plan.num_decodes, window_left(self.config, layer.index)
        if plan.decodes:
            plan.decodes[window].run(q[:n], layer, out[:n])
        if plan.prefills:
            plan.prefills[window].run(q[n:], layer, out[n:])

    def capture(self, max_num_seqs: int) -> None:
        """Allocate what recorded steps read at fixed addresses."""
        self._decodes.capture(max_num_seqs)

    def replay(self, plan: FlashInferPlan, batch: Batch) -> None:
        self._decodes.plan(batch)


def _one_of_each(device: torch.device) -> Batch:
    """A decode and a prefill of one token on the null page, to have the kernels built."""
    long = torch.zeros(2, dtype=torch.int64, device=device)
    return Batch(
        token_ids=long,
        positions=long,
        slot_mapping=long,
        cu_seqlens_q=torch.arange(3, dtype=torch.int32, device=device),
        seq_lens=torch.ones(2, dtype=torch.int32, device=device),
        block_table=torch.zeros(2, 1, dtype=torch.int32, device=device),
        query_lens=[1, 1],
        kv_lens=[1, 1],
        num_decodes=1,
    )
