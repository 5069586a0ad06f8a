"""How the attention kernels are launched: what is of the contract, and what is free."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import triton
from torch import Tensor

from .launch import hopper

KV_TILE = 64
NEAR_SPLIT = 256
NEAR_END = 4096
SPLIT = 1024
_SCRATCH = 4096
_LOG2E = math.log2(math.e)


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel's shape on the card; it changes no bit.

    rows: query rows of a tile, a power of two from 16 up except in ``HOPPER_PREFILL``; a row is a
        (token, head of the group)
    """

    rows: int
    warps: int
    stages: int


HOPPER_PREFILL = {64: Launch(192, 16, 4), 128: Launch(192, 16, 2)}
"""By head dim: ``prefill_hopper.py``'s launch. Only the stages are free."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """``kv_tile``, ``near_split``, ``near_end`` and ``split`` are of the contract, as is said in
    ``online_softmax.py``: positions, powers of two. The rest changes no bit.

    hopper: whether ``prefill_hopper.py`` computes prefills; ``prefill`` is ``HOPPER_PREFILL`` then
    flat: whether one loop of any other prefill walks the tiles of all splits; under a window it
        always does
    serial: positions that one program walks by itself in a decode step that fills the card without
        more of them; a split starts there
    serial_from: (sequence, KV head) pairs from which on a decode step fills the card
    decode_programs: how many programs a decode step should start at most, where one sequence's
        splits can be spread over several
    """

    kv_tile: int = KV_TILE
    near_split: int = NEAR_SPLIT
    near_end: int = NEAR_END
    split: int = SPLIT
    prefill: Launch = field(default=Launch(128, 8, 3))
    hopper: bool = False
    flat: bool = False
    decode: Launch = field(default=Launch(16, 4, 3))
    serial: int = 2048
    serial_from: int = 128
    decode_programs: int = 4096

    def splits(self, kv_len: int) -> int:
        """How many splits ``kv_len`` positions reach into."""
        near = -(-min(kv_len, self.near_end) // self.near_split)
        return near - (-max(kv_len - self.near_end, 0) // self.split)

    def serial_splits(self, pairs: int) -> int:
        """How many splits, the first ones, one program walks in a decode step of ``pairs``."""
        return max(1, self.splits(self.serial)) if pairs >= self.serial_from else 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """As ``AttentionConfig`` has them; ``scale`` and ``soft_cap`` are positive."""

    scale: float
    soft_cap: float | None = None
    window: int | None = None


def default_tiling(
    head_dim: int, itemsize: int, shared_memory: int, hopper: bool = False
) -> Tiling:
    """The tiling for rows of ``head_dim`` values of ``itemsize`` bytes.

    :param shared_memory: bytes that one program may have
    :param hopper: whether ``prefill_hopper.py`` can compute the prefills
    """
    row = padded(head_dim) * itemsize
    if itemsize == 4:
        # Multiplied without tensor cores, by code that grows with the tile.
        warps = 16 if row > 512 else 8
        prefill = decode = [Launch(16, warps, 2), Launch(16, warps, 1)]
    else:
        rows = 128 if row <= 256 else 64
        half = rows // 2
        prefill = [Launch(rows, 8, 3), Launch(rows, 8, 2), Launch(half, 4, 2), Launch(half, 4, 1)]
        decode = [Launch(16, 4, 3), Launch(16, 4, 2), Launch(16, 4, 1)]

    def first(choices: list[Launch]) -> Launch:
        for choice in choices:
            tiles = choice.rows + 2 * KV_TILE * choice.stages
            if row * tiles + _SCRATCH <= shared_memory:
                return choice
        return choices[-1]

    launch = HOPPER_PREFILL[head_dim] if hopper else first(prefill)
    return Tiling(prefill=launch, hopper=hopper, decode=first(decode))


def in_gluon() -> bool:
    """Whether this Triton compiles ``prefill_hopper.py``: Gluon's names change with its version."""
    return (3, 6) <= tuple(map(int, triton.__version__.split(".")[:2])) <= (3, 9)


def hopper_fits(device: torch.device, itemsize: int, head_dim: int, page_size: int) -> bool:
    """Whether ``prefill_hopper.py`` can compute the prefills; otherwise ``prefill.py`` does."""
    return (
        hopper(device)
        and in_gluon()
        and itemsize == 2
        and head_dim in HOPPER_PREFILL
        and page_size % 8 == 0
    )


def padded(size: int) -> int:
    """The least power of two from 16 up that holds ``size``."""
    return max(16, 1 << (size - 1).bit_length())


def kernel_arguments(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, scoring: Scoring, tiling: Tiling
) -> dict[str, int | float | bool]:
    """The arguments that prefill and decode share.

    :raises ValueError: caches whose pages are not contiguous, or of unequal strides
    """
    _, page_size, num_kv_heads, head_dim = k_cache.shape
    inner = (num_kv_heads * head_dim, head_dim, 1)
    if k_cache.stride()[1:] != inner or v_cache.stride() != k_cache.stride():
        raise ValueError(
            "attention wants k_cache and v_cache of equal strides whose pages are contiguous; got "
            f"strides {k_cache.stride()} and {v_cache.stride()}"
        )
    cap, scale = scoring.soft_cap, scoring.scale
    return {
        "page_stride": k_cache.stride(0),
        "factor": (scale if cap is None else cap) * _LOG2E,
        "cap_factor": 0.0 if cap is None else 2 * _LOG2E * scale / cap,
        "BLOCK_N": tiling.kv_tile,
        "BLOCK_D": padded(head_dim),
        "HEAD_DIM": head_dim,
        "NUM_KV_HEADS": num_kv_heads,
        "GROUP": q.shape[1] // num_kv_heads,
        "PAGE": page_size,
        "WIDE": k_cache.shape[0] * k_cache.stride(0) >= 1 << 31,
        "NEAR_SPLIT": tiling.near_split,
        "NEAR_END": tiling.near_end,
        "SPLIT": tiling.split,
        "WINDOW": scoring.window or 0,
        "SOFT_CAP": cap is not None,
        "enable_fp_fusion": False,
    }
