"""The tiled product ``x @ W^T``.

Contract (bf16, fp16): one fp32 accumulator per output, from zero, walks K in ascending order;
inside one tensor-core instruction the hardware's own order holds. K is never split, and what a
tile's size is changes no bit: the tail of K is filled with zeros. Which operand of a product a tile
of W is changes none either.

Contract (fp32): that of ``kernels/linear.py``, native. K is cut into blocks of 64; in each, one
fp32 accumulator from zero takes ``fma(x[t, k], w[n, k], acc)`` for k ascending; the blocks' sums
are added to a total, ascending, from zero. Nothing is rounded to TF32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import interpreted


@dataclass(frozen=True, slots=True)
class Tile:
    """Rows, columns and depth of a tile; warps that share it; loads in flight.

    swapped: whether the product is ``W @ x^T``, for which Hopper's instructions take few rows of x,
        and W straight from shared memory; it wants 64 columns or more
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    swapped: bool = False

    def __str__(self) -> str:
        size = f"{self.rows}x{self.columns}x{self.depth}"
        return f"triton {size} w{self.warps} s{self.stages}{' swapped' * self.swapped}"


CANONICAL = Tile(16, 32, 128, 4, 3)
"""The tile that every other candidate for bf16 and fp16 is compared with, and that runs where
nothing is tuned."""

FLOAT_BLOCK = 64
"""The blocks of the fp32 contract; ``K_BLOCK`` in ``kernels/native/common.h`` says the same."""

FLOAT_CANONICAL = Tile(16, 32, FLOAT_BLOCK, 4, 3)
"""The canonical tile for fp32. All tiles for fp32 are as deep as a block."""

HALF_TILES = (
    Tile(16, 16, 256, 4, 4),
    Tile(16, 32, 64, 4, 6),
    Tile(16, 32, 256, 4, 4),
    Tile(16, 32, 512, 4, 3),
    Tile(16, 64, 128, 4, 5),
    Tile(32, 32, 256, 4, 3),
    Tile(32, 64, 64, 4, 5),
    Tile(64, 32, 128, 4, 4),
    Tile(64, 64, 64, 4, 5),
    Tile(128, 64, 64, 4, 4),
    Tile(128, 128, 64, 8, 3),
    Tile(128, 256, 64, 8, 3),
)
"""For bf16 and fp16; each fits into the shared memory of Ampere and later data-centre GPUs."""

SWAPPED_TILES = (
    Tile(16, 64, 64, 4, 8, swapped=True),
    Tile(16, 64, 128, 4, 4, swapped=True),
    Tile(16, 64, 256, 4, 5, swapped=True),
    Tile(16, 128, 64, 4, 4, swapped=True),
    Tile(32, 64, 128, 4, 4, swapped=True),
)
"""For bf16 and fp16 on Hopper."""

FLOAT_TILES = (
    Tile(16, 64, FLOAT_BLOCK, 4, 3),
    Tile(32, 64, FLOAT_BLOCK, 4, 2),
    Tile(64, 64, FLOAT_BLOCK, 8, 2),
)
"""For fp32."""


@triton.jit(do_not_specialize=["M"])
def _matmul(
    x_ptr,
    w_ptr,
    out_ptr,
    M,
    N,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE_K: tl.constexpr,
    WIDEN: tl.constexpr,
    SWAPPED: tl.constexpr,
    IN_BLOCKS: tl.constexpr,
):
    # Programs of the same columns are neighbours, so that W is read from memory once.
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    m = (pid % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (pid // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # 64-bit: a vocabulary's weight has more than 2^31 elements in large models.
    x_at = x_ptr + m[:, None].to(tl.int64) * K + k[None, :]
    w_at = w_ptr + n[None, :].to(tl.int64) * K + k[:, None]
    m_in, n_in = m[:, None] < M, n[None, :] < N
    if SWAPPED:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        if WHOLE_K:
            x = tl.load(x_at, mask=m_in, other=0.0)
            w = tl.load(w_at, mask=n_in, other=0.0)
        else:
            x = tl.load(x_at, mask=m_in & (k[None, :] < K - start), other=0.0)
            w = tl.load(w_at, mask=n_in & (k[:, None] < K - start), other=0.0)
        if WIDEN:
            x, w = x.to(tl.float32), w.to(tl.float32)
        if SWAPPED:
            acc = tl.dot(tl.trans(w), tl.trans(x), acc, input_precision="ieee")
        elif IN_BLOCKS:
            # The negated sum is subtracted: of ``acc + tl.dot`` the compiler makes one accumulator.
            acc -= tl.dot(-x, w, input_precision="ieee")
        else:
            acc = tl.dot(x, w, acc, input_precision="ieee")
        x_at += BLOCK_K
        w_at += BLOCK_K
    if SWAPPED:
        acc = tl.trans(acc)
    out_at = out_ptr + m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=m_in & n_in)


def canonical_tile(dtype: torch.dtype) -> Tile:
    """The tile whose bits are the contract's, for inputs of ``dtype``."""
    return FLOAT_CANONICAL if dtype == torch.float32 else CANONICAL


def matmul(
    x: Tensor,
    weight: Tensor,
    out_dtype: torch.dtype,
    tile: Tile | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x ``[M, K]``, weight ``[N, K]``, both aligned (``launch.aligned``) -> ``[M, N]``.

    :param tile: of those for the inputs' dtype; by default the canonical one
    :param out_dtype: the inputs' dtype, or fp32 for the accumulators as they are
    :param out: contiguous, aligned, in ``out_dtype``: where to put it, instead of somewhere new
    """
    rows, depth = x.shape
    columns = weight.shape[0]
    tile = tile or canonical_tile(x.dtype)
    if out is None:
        out = torch.empty(rows, columns, dtype=out_dtype, device=x.device)
    if rows and columns:
        _matmul[(triton.cdiv(rows, tile.rows) * triton.cdiv(columns, tile.columns),)](
            x,
            weight,
            out,
            rows,
            columns,
            depth,
            BLOCK_M=tile.rows,
            BLOCK_N=tile.columns,
            BLOCK_K=tile.depth,
            WHOLE_K=depth % tile.depth == 0,
            WIDEN=interpreted(),  # it has no bf16 product
            SWAPPED=tile.swapped,
            IN_BLOCKS=x.dtype == torch.float32,
            num_warps=tile.warps,
            num_stages=tile.stages,
            enable_fp_fusion=True,  # in fp32 every step of a sum is one fma
        )
    return out
