"""The tiled product whose tiles are brought by Hopper's tensor memory accelerator.

Contract: ``matmul.py``'s. A tile is one request of one thread, so no warp spends its time on
addresses; what lies past the ends of x, W and K arrives as zeros.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .launch import interpreted
from .matmul import LINE_BYTES, Tile, depth_ahead, prefetch_weight
from .pdl import let_next_start, overlapping, wait_for_inputs

TMA_TILES = (
    Tile(16, 32, 256, 4, 4),
    Tile(16, 64, 256, 4, 3, swapped=True),
    Tile(32, 64, 128, 4, 4, swapped=True),
    Tile(64, 128, 64, 4, 4, swapped=True),
    Tile(128, 128, 64, 8, 4),
    Tile(128, 256, 64, 8, 4),
    Tile(256, 128, 64, 8, 4),
)
"""For bf16 and fp16 on Hopper."""


@triton.jit(do_not_specialize=["M", "ahead"])
def _matmul_tma(
    x_tiles,
    w_tiles,
    w_ptr,
    out_ptr,
    M,
    N,
    K,
    ahead,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
    SWAPPED: tl.constexpr,
    SPECIALISE: tl.constexpr,
    LINE: tl.constexpr,
    PDL: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    first_m = (pid % tiles_m) * BLOCK_M
    first_n = (pid // tiles_m) * BLOCK_N
    let_next_start(PDL)
    if PDL and not SPECIALISE:  # a loop before its own is more than the compiler can part
        prefetch_weight(w_ptr, pid // tiles_m, first_m == 0, ahead, N, K, BLOCK_N, LINE)
    wait_for_inputs(PDL)
    if SWAPPED:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, K, BLOCK_K, warp_specialize=SPECIALISE):
        x = x_tiles.load([first_m, start])
        w = w_tiles.load([first_n, start])
        if WIDEN:
            x, w = x.to(tl.float32), w.to(tl.float32)
        if SWAPPED:
            acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
        else:
            acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    if SWAPPED:
        acc = tl.trans(acc)
    m = first_m + tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    out_at = out_ptr + m[:, None].to(tl.int64) * N + n[None, :]
    inside = (m[:, None] < M) & (n[None, :] < N)
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=inside)


def matmul_tma(
    x: Tensor, weight: Tensor, out_dtype: torch.dtype, tile: Tile, specialise: bool = False
) -> Tensor:
    """x ``[M, K]``, weight ``[N, K]``, both aligned -> ``[M, N]``; rows of a multiple of 16 bytes.

    :param out_dtype: the inputs' dtype, or fp32 for the accumulators as they are
    :param specialise: some warps bring tiles, the others multiply; wants 4 warps
    """
    rows, depth = x.shape
    columns = weight.shape[0]
    out = torch.empty(rows, columns, dtype=out_dtype, device=x.device)
    overlap = overlapping(x.device)
    if rows and columns:
        _matmul_tma[(triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),)](
            TensorDescriptor.from_tensor(x, [tile.rows, tile.depth]),
            TensorDescriptor.from_tensor(weight, [tile.columns, tile.depth]),
            weight,
            out,
            rows,
            columns,
            depth,
            depth_ahead(weight, tile.columns) if overlap["PDL"] else 0,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.columns,
            BLOCK_K=tile.depth,
            WIDEN=interpreted(),  # it has no bf16 product
            SWAPPED=tile.swapped,
            SPECIALISE=specialise,
            LINE=LINE_BYTES // weight.element_size(),
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,
            **overlap,
        )
    return out
