"""Decodes by FlashInfer, in ordinary and in captured steps."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .base import AttentionConfig, Batch
from .flashinfer_pages import flat_pages, last_page_len, lengths_on_host, num_pages, page_lists
from .flashinfer_workspace import workspace
from .flashinfer_wrappers import Wrapper, decode_wrapper, float_workspace, scoring, windows

_ORDINARY_SEQS = 256
"""Decodes that a step beside prefills has room for before its room must grow."""


class Decodes(Protocol):
    """A way to decode."""

    def plan(self, batch: Batch) -> dict[int, Wrapper]:
        """The wrappers by window, planned for the batch's decodes.

        A step that may be recorded is planned into the same wrappers and addresses every time, so
        that planning it again refreshes what a recorded step reads.
        """

    def capture(self, max_num_seqs: int) -> None:
        """Allocate what recorded steps of up to so many sequences read."""


class UnsplitDecodes:
    """Decodes that are never split, so that no bit depends on the batch.

    Such a plan says only which tile belongs to which sequence: it depends on the number of
    sequences alone, and is made once for each. What changes from step to step, pages and lengths,
    the kernel reads from tensors that are refreshed on the device. Captured steps use plans of the
    ordinary kind: FlashInfer's own for graphs launch more tiles than they list, which then read
    what an older plan left (flashinfer-ai/flashinfer issue 4002).
    """

    def __init__(self, config: AttentionConfig) -> None:
        self._config = config
        self._captured: _Room | None = None
        self._ordinary = _Room(config, _ORDINARY_SEQS)

    def plan(self, batch: Batch) -> dict[int, Wrapper]:
        decodes = batch.num_decodes
        room = self._captured
        if room is None or not batch.num_seqs == decodes <= room.most_seqs:
            room = self._grown(decodes)
        return room.plan(batch)

    def capture(self, max_num_seqs: int) -> None:
        self._captured = _Room(self._config, max_num_seqs)

    def _grown(self, decodes: int) -> _Room:
        """The room of ordinary steps, twice as large as needed where it was too small."""
        if decodes > self._ordinary.most_seqs:
            self._ordinary = _Room(self._config, 2 * decodes)
        return self._ordinary


class _Room:
    """The tensors that unsplit decodes read, and the wrappers planned on them.

    One step at a time uses it, in the order of the stream. It takes 4 bytes a page of ``most_seqs``
    sequences of ``max_model_len`` tokens.
    """

    def __init__(self, config: AttentionConfig, most_seqs: int) -> None:
        def ones(size: int) -> Tensor:
            return torch.ones(size, dtype=torch.int32, device=config.device)

        self.most_seqs = most_seqs
        self._config = config
        self._indptr = ones(most_seqs + 1)
        self._last_page_len = ones(most_seqs)
        self._indices = ones(most_seqs * num_pages(config.max_model_len, config.page_size))
        self._floats = float_workspace(0, config.device)
        self._wrappers: dict[int, dict[int, Wrapper]] = {}

    def plan(self, batch: Batch) -> dict[int, Wrapper]:
        """Refresh the tensors; plan where so many sequences are met for the first time."""
        n, page_size = batch.num_decodes, self._config.page_size
        seq_lens = batch.seq_lens[:n]
        total = sum(num_pages(length, page_size) for length in batch.kv_lens[:n])
        indptr, indices = flat_pages(batch.block_table[:n], seq_lens, page_size, total)
        self._indptr[: n + 1].copy_(indptr)
        self._indices[:total].copy_(indices)
        self._last_page_len[:n].copy_(last_page_len(seq_lens, page_size))
        if n not in self._wrappers:
            self._wrappers[n] = self._planned(batch)
        return self._wrappers[n]

    def _planned(self, batch: Batch) -> dict[int, Wrapper]:
        """Wrappers on this room's tensors.

        The plan gets the lengths from the host: those on the device it would wait for.
        """
        c, n = self._config, batch.num_decodes
        room = workspace(c.num_q_heads, c.num_kv_heads, c.head_dim, c.device)
        lengths = lengths_on_host(batch.kv_lens[:n], c.page_size, c.device)
        wrappers = {}
        for window in windows(c):
            wrapper = decode_wrapper(self._floats, room.decode_int_bytes(n))
            wrapper.plan(
                lengths.indptr,
                self._indices,
                lengths.last_page_len,
                c.num_q_heads,
                c.num_kv_heads,
                c.head_dim,
                c.page_size,
                seq_lens=lengths.kv_lens,
                disable_split_kv=True,
                **scoring(c, window),
            )
            wrapper.read_lengths_from(self._indptr[: n + 1], self._last_page_len[:n])
            wrappers[window] = wrapper
        return wrappers


class SplitDecodes:
    """Decodes that FlashInfer splits as it likes, for engines whose constraints are lifted.

    Every step is planned on the host. Captured steps have wrappers of their own, one a number of
    sequences and window, which FlashInfer plans for graphs; one list of pages serves them all, as
    every replay writes it anew.
    """

    def __init__(self, config: AttentionConfig) -> None:
        self._config = config
        self._room = workspace(
            config.num_q_heads, config.num_kv_heads, config.head_dim, config.device
        )
        room = self._room
        tile = room.tile(room.group)
        floats = float_workspace(room.split_bytes(room.most_split, tile), config.device)
        self._ordinary = {
            window: decode_wrapper(floats, room.decode_int_bytes(1)) for window in windows(config)
        }
        self._captured: dict[int, dict[int, Wrapper]] = {}
        self._most_seqs = 0
        self._indices = torch.empty(0, dtype=torch.int32, device=config.device)
        self._floats = floats

    def plan(self, batch: Batch) -> dict[int, Wrapper]:
        c, n = self._config, batch.num_decodes
        wrappers = self._ordinary
        if batch.num_seqs == n <= self._most_seqs:
            if n not in self._captured:
                self._captured[n] = self._for_graphs(n)
            wrappers = self._captured[n]
        pages = page_lists(batch, 0, n, c.page_size)
        for window, wrapper in wrappers.items():
            wrapper.plan(
                pages.lengths.indptr,
                pages.indices,
                pages.lengths.last_page_len,
                c.num_q_heads,
                c.num_kv_heads,
                c.head_dim,
                c.page_size,
                seq_lens=pages.lengths.kv_lens,
                int_bytes=self._room.decode_int_bytes(n),
                **scoring(c, window),
            )
        return wrappers

    def capture(self, max_num_seqs: int) -> None:
        """The float workspace that recorded steps share is that of the largest: it stays fixed."""
        room = self._room
        tile = room.tile(room.group)
        num_bytes = room.split_bytes(room.decode_tiles(max_num_seqs), tile)
        self._floats = float_workspace(num_bytes, self._config.device)
        self._most_seqs = max_num_seqs
        c = self._config
        most_pages = max_num_seqs * num_pages(c.max_model_len, c.page_size)
        self._indices = torch.zeros(most_pages, dtype=torch.int32, device=c.device)

    def _for_graphs(self, num_seqs: int) -> dict[int, Wrapper]:
        c = self._config

        def zeros(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int32, device=c.device)

        return {
            window: decode_wrapper(
                self._floats,
                self._room.decode_int_bytes(num_seqs),
                use_cuda_graph=True,
                paged_kv_indptr_buffer=zeros(num_seqs + 1),
                paged_kv_indices_buffer=self._indices,
                paged_kv_last_page_len_buffer=zeros(num_seqs),
            )
            for window in windows(c)
        }
