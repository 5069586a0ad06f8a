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
def _log_totals(
    maxima_ptr, sums_ptr, high_ptr, log_total_ptr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, WIDTH)
    sums = tl.load(sums_ptr + row * WIDTH + i, mask=i < BLOCKS, other=0.0)
    total = tl.full((1,), 0.0, tl.float64) + tl.sum(sums).to(tl.float64)
    tl.store(log_total_ptr + row + tl.arange(0, 1), log_f64(total).to(tl.float32))
    tl.store(high_ptr + row, highest_of(maxima_ptr, row, WIDTH))


def log_normalisers(logits: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 ``[R, V]`` -> each row's maximum and the logarithm of its sum, fp32 ``[R]`` both."""
    logits = aligned(logits)
    rows, vocab = logits.shape
    high, log_total = logits.new_empty(2, rows)
    if logits.numel():
        programs, maxima = grid(rows, vocab), block_maxima(logits)
        sums = torch.empty_like(maxima)
        _sums[programs](logits, maxima, sums, num_warps=4, **sizes(vocab), **NO_FMA)
        _log_totals[(rows,)](
            maxima,
            sums,
            high,
            log_total,
            BLOCKS=programs[1],
            WIDTH=maxima.shape[1],
            num_warps=4,
            **NO_FMA,
        )
    return high, log_total


def log_softmax(logits: Tensor) -> Tensor:
    """fp32 ``[R, V]`` -> fp32 ``[R, V]``."""
    high, log_total = log_normalisers(logits)
    return (logits - high.unsqueeze(1)) - log_total.unsqueeze(1)
