"""Log-probabilities over the vocabulary; ``kernels/logits.py`` has the formula.

Contract: the exact maximum; ``e^(x[v] - max)`` added within each block of 2048 ids by one
``tl.sum``, the blocks' sums by another: each has an order that is compiled from its length. The
logarithm in fp64, rounded to fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementary import NO_FMA, exp_f32, log_f64
from .launch import aligned
from .vocab import block_maxima, grid, highest_of, sizes


@triton.jit
def _sums(
    x_ptr, maxima_ptr, sums_ptr, VOCAB: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr
):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * VOCAB + ids, mask=ids < VOCAB, other=float("-inf"))
    total = tl.sum(exp_f32(x - highest_of(maxima_ptr, row, WIDTH)))
    tl.store(sums_ptr + row * WIDTH + block, total)


@triton.jit
def _subtract(
    x_ptr,
    maxima_ptr,
    sums_ptr,
    out_ptr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, WIDTH)
    sums = tl.load(sums_ptr + row * WIDTH + i, mask=i < tl.num_programs(1), other=0.0)
    total = tl.full((1,), 0.0, tl.float64) + tl.sum(sums).to(tl.float64)
    log_total = log_f64(total).to(tl.float32)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * VOCAB + ids, mask=ids < VOCAB, other=0.0)
    shifted = x - highest_of(maxima_ptr, row, WIDTH)
    tl.store(out_ptr + row * VOCAB + ids, shifted - log_total, mask=ids < VOCAB)


def log_softmax(logits: Tensor) -> Tensor:
    """fp32 ``[R, V]`` -> fp32 ``[R, V]``."""
    logits = aligned(logits)
    out = torch.empty_like(logits)
    maxima = block_maxima(logits)
    sums = torch.empty_like(maxima)
    if out.numel():
        programs, constants = grid(*out.shape), sizes(out.shape[1]) | NO_FMA
        _sums[programs](logits, maxima, sums, num_warps=4, **constants)
        _subtract[programs](logits, maxima, sums, out, num_warps=4, **constants)
    return out
