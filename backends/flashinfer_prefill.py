"""Prefills by FlashInfer: planned each step, never captured."""

from __future__ import annotations

from itertools import accumulate

from .base import AttentionConfig, Batch
from .flashinfer_pages import on_host, page_lists
from .flashinfer_workspace import workspace
from .flashinfer_wrappers import Wrapper, float_workspace, prefill_wrapper, scoring, windows


class Prefills:
    """The prefill wrappers, one a window.

    Their ``fa3`` kernel is the chunk-invariant one. Where the constraints are lifted FlashInfer
    chooses the kernel by the device, and ``fa2`` may split: the float workspace holds the most
    tiles that it makes, of the largest size.
    """

    def __init__(self, config: AttentionConfig) -> None:
        self._config = config
        self._room = workspace(
            config.num_q_heads, config.num_kv_heads, config.head_dim, config.device
        )
        room = self._room
        most = 0 if config.deterministic else room.split_bytes(room.most_split, 128)
        floats = float_workspace(most, config.device)
        backend = "fa3" if config.deterministic else "auto"
        int_bytes = room.prefill_int_bytes(1, 1)
        self._wrappers = {
            window: prefill_wrapper(floats, int_bytes, backend) for window in windows(config)
        }

    def plan(self, batch: Batch) -> dict[int, Wrapper]:
        """The wrappers by window, planned for the batch's prefills."""
        c, first = self._config, batch.num_decodes
        query_lens = batch.query_lens[first:]
        starts = [0, *accumulate(query_lens)]
        pages = page_lists(batch, first, batch.num_seqs, c.page_size)
        int_bytes = self._room.prefill_int_bytes(starts[-1], len(query_lens))
        for window, wrapper in self._wrappers.items():
            wrapper.plan(
                on_host(starts, c.device),
                pages.lengths.indptr,
                pages.indices,
                pages.lengths.last_page_len,
                c.num_q_heads,
                c.num_kv_heads,
                c.head_dim,
                c.page_size,
                causal=True,
                seq_lens=pages.lengths.kv_lens,
                max_token_per_sequence=max(query_lens),
                int_bytes=int_bytes,
                **scoring(c, window),
            )
        return self._wrappers
