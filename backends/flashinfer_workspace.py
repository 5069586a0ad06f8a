"""How much workspace FlashInfer 0.6.14 plans with, in bytes, by the formulas of its planner.

The ``fa2`` kernels take tiles of packed query rows (rows times query heads a KV head). A split of
the KV length gives each tile partial results in fp32: they lie in the float workspace, which
nothing else uses. The int workspace lists the tiles. The ``fa3`` kernels never split.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_ALIGNED = 16
_LISTS = 16  # more than the lists that any plan has, each aligned
_SM90_ROWS = 128  # rows of the lowest fa3 tile
_SM90_PER_HEAD = 4096  # above so many tiles a head, one list serves all heads
_SM90_LISTS = 7


@dataclass(frozen=True, slots=True)
class Workspace:
    """The sizes for one model on one device.

    num_sms: multiprocessors of the device
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    num_sms: int

    @property
    def group(self) -> int:
        """Query heads a KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def most_split(self) -> int:
        """The most tiles that a plan makes by splitting: two for each multiprocessor."""
        return 2 * self.num_sms // self.num_kv_heads

    def tile(self, packed_rows: int) -> int:
        """Packed rows of an ``fa2`` tile, for so many packed rows a sequence."""
        if packed_rows > 64 and self.head_dim < 256:
            return 128
        return 64 if packed_rows > 16 else 16

    def decode_tiles(self, num_seqs: int) -> int:
        """Tiles that a captured decode launches, split or not."""
        tile = self.tile(self.group)
        unsplit = -(-num_seqs * self.group // tile) + num_seqs - 1
        return max(self.most_split, unsplit)

    def split_bytes(self, tiles: int, tile: int) -> int:
        """Float workspace of so many tiles: a row of values and its log-sum-exp each."""
        rows = self.num_q_heads * tiles * tile
        return 4 * rows * (self.head_dim + 1) + 2 * _ALIGNED

    def decode_int_bytes(self, num_seqs: int) -> int:
        """Int workspace of a decode of so many sequences, captured or not."""
        tiles = max(self.decode_tiles(num_seqs), num_seqs * -(-self.group // self.tile(self.group)))
        return self._fa2_int_bytes(tiles, num_seqs, num_seqs)

    def prefill_int_bytes(self, rows: int, num_seqs: int) -> int:
        """Int workspace of a prefill by either kernel."""
        tiles = self.most_split + -(-rows * self.group // 16) + num_seqs
        per_head = -(-rows // _SM90_ROWS) + num_seqs
        works = max(per_head, min(per_head, _SM90_PER_HEAD) * self.num_q_heads)
        sm90 = 4 * (_SM90_LISTS * works + self.num_sms + 1) + _LISTS * _ALIGNED
        return max(sm90, self._fa2_int_bytes(tiles, rows, num_seqs))

    def _fa2_int_bytes(self, tiles: int, rows: int, num_seqs: int) -> int:
        """Three numbers and a flag a tile, one a sequence and one a row."""
        return 13 * tiles + 4 * (num_seqs + rows + 4) + _LISTS * _ALIGNED


def workspace(
    num_q_heads: int, num_kv_heads: int, head_dim: int, device: torch.device
) -> Workspace:
    """The sizes on ``device``; off a CUDA device those of an H200."""
    num_sms = 132
    if device.type == "cuda":
        num_sms = torch.cuda.get_device_properties(device).multi_processor_count
    return Workspace(num_q_heads, num_kv_heads, head_dim, num_sms)
