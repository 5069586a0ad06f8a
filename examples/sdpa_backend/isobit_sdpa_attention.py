"""Paged attention by ``torch.nn.functional.scaled_dot_product_attention``.

Torch chooses a kernel, and with it an order of addition, by the shapes of a call. So the shapes
here follow from absolute positions alone: a sequence is cut into tiles of ``TILE`` positions, and
the tile that starts at position ``s`` is always one call of the same shape,

    [Hk, G, TILE, D] queries  x  [Hk, G, s + TILE - first, D] keys,  G = Hq / Hk,

where ``first`` is 0, or under a sliding window the start of the tile that ``s`` sees back to.
Queries that are not of this step and positions not yet written are zeros. A row does not add up
other rows, and a masked key adds zero; so a row has the same bits alone in its tile (a decode
step), with some of it (a chunk) and with all of it (a prefill), whatever else is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from isobit.plugins import AttentionBackend, AttentionConfig, Batch, LayerCache

TILE = {"cpu": 16, "cuda": 64}
"""Rows of a call. More makes prefill faster and decoding, which uses one of them, slower."""

KERNEL = {"cpu": SDPBackend.FLASH_ATTENTION, "cuda": SDPBackend.EFFICIENT_ATTENTION}
"""Pinned, so that a release of torch that prefers another fails rather than changes bits. On CUDA
FlashAttention takes no mask, and cuDNN's kernel chooses its plan at run time."""

WIDENED = {"cpu"}
"""Devices where the calls are in float32. On the CPU torch rearranges half-precision keys or not by
the number of threads, which must change no bit; float32 is no slower there."""


@dataclass(frozen=True, slots=True)
class Sequence:
    """One sequence of a step.

    rows:   its rows in the packed tensors
    first:  position of its first row
    length: its positions written so far, this step's included
    slots:  int64 ``[tiles * TILE]`` by position; slot 0 past ``length``, where there is none
    """

    rows: slice
    first: int
    length: int
    slots: Tensor


class SdpaAttention(AttentionBackend):
    """Attention in tiles of fixed shape at absolute positions, over keys gathered from pages."""

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__(config)
        self._tile = TILE[config.device.type]
        self._kernel = KERNEL[config.device.type]
        self._dtype = torch.float32 if config.device.type in WIDENED else config.dtype
        windows = {config.sliding_window(layer) for layer in range(config.num_layers)}
        self._masks = {window: self._mask(window) for window in windows}

    def plan(self, batch: Batch) -> tuple[Tensor, list[Sequence]]:
        """The slots to write, and where each sequence's positions lie in the cache."""
        offsets = torch.arange(self.config.page_size, device=self.config.device)
        sequences = []
        ends = accumulate(batch.query_lens)
        for pages, new, length, end in zip(
            batch.block_table.long(), batch.query_lens, batch.kv_lens, ends, strict=True
        ):
            needed = pages[: -(-length // self.config.page_size)]
            slots = (needed[:, None] * self.config.page_size + offsets).flatten()[:length]
            slots = pad(slots, (0, -length % self._tile))
            sequences.append(Sequence(slice(end - new, end), length - new, length, slots))
        return batch.slot_mapping, sequences

    def run(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layer: LayerCache,
        plan: tuple[Tensor, list[Sequence]],
        out: Tensor,
    ) -> None:
        slot_mapping, sequences = plan
        for cache, new in ((layer.k, k), (layer.v, v)):
            cache.flatten(0, 1).index_copy_(0, slot_mapping, new)
        window = self.config.sliding_window(layer.index)
        with sdpa_kernel(self._kernel):
            for sequence in sequences:
                keys, values = (self._gather(cache, sequence) for cache in (layer.k, layer.v))
                queries = q[sequence.rows].to(self._dtype)
                out[sequence.rows] = self._attend(queries, keys, values, sequence, window)

    def _attend(
        self, q: Tensor, keys: Tensor, values: Tensor, sequence: Sequence, window: int | None
    ) -> Tensor:
        """q ``[n, Hq, D]``, keys and values ``[tiles * TILE, Hk, D]`` -> ``[n, Hq, D]``."""
        begin = sequence.first // self._tile * self._tile
        lead = sequence.first - begin
        padded = pad(q, (0, 0, 0, 0, lead, -sequence.length % self._tile))
        tiles = []
        for start in range(begin, len(keys), self._tile):
            end = start + self._tile
            seen = 0 if window is None else max(0, start - window + 1) // self._tile * self._tile
            rows = padded[start - begin : end - begin]
            tiles.append(self._call(rows, keys[seen:end], values[seen:end], window))
        return torch.cat(tiles)[lead : lead + len(q)]

    def _call(self, q: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
        """One tile: q ``[TILE, Hq, D]`` -> the same, over keys that end where the tile ends."""
        grouped = (len(q), self.config.num_kv_heads, -1, self.config.head_dim)
        heads = q.view(grouped).permute(1, 2, 0, 3)
        shared = (-1, heads.shape[1], -1, -1)
        result = scaled_dot_product_attention(
            heads,
            keys.transpose(0, 1)[:, None].expand(shared),
            values.transpose(0, 1)[:, None].expand(shared),
            attn_mask=self._masks[window][:, -len(keys) :],
            scale=self.config.scale,
        )
        return result.permute(2, 0, 1, 3).flatten(1, 2)

    def _gather(self, cache: Tensor, sequence: Sequence) -> Tensor:
        """The sequence's positions ``[tiles * TILE, Hk, D]``; zeros where nothing was written."""
        gathered = cache.flatten(0, 1)[sequence.slots].to(self._dtype)
        gathered[sequence.length :] = 0
        return gathered

    def _mask(self, window: int | None) -> Tensor:
        """``[TILE, longest]``, added to scores: row i of a tile against keys up to the tile's end.

        Counted from that end a tile's mask is the same at every position: its right-hand columns.
        """
        tile = self._tile
        longest = -(-self.config.max_model_len // tile) * tile
        if window is not None:
            longest = min(longest, -(-(window - 1) // tile) * tile + tile)
        device = self.config.device
        rows = torch.arange(longest - tile, longest, device=device)[:, None]
        columns = torch.arange(longest, device=device)
        hidden = columns > rows
        if window is not None:
            hidden |= columns <= rows - window
        mask = torch.zeros(tile, longest, dtype=self._dtype, device=device)
        return mask.masked_fill_(hidden, -torch.inf)
