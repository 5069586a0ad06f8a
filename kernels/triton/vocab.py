"""How the kernels over the vocabulary share a row: blocks at fixed ids, one program each."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .elementary import NO_FMA

BLOCK = 2048
"""Tokens of a program."""


def sizes(vocab: int) -> dict[str, int]:
    """What every such kernel is compiled for; WIDTH holds a value of each of a row's programs."""
    width = triton.next_power_of_2(triton.cdiv(vocab, BLOCK))
    return {"VOCAB": vocab, "BLOCK": BLOCK, "WIDTH": width}


def grid(rows: int, vocab: int) -> tuple[int, int]:
    """(rows, programs a row)."""
    return rows, triton.cdiv(vocab, BLOCK)


@triton.jit
def _maxima(x_ptr, out_ptr, VOCAB: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * VOCAB + ids, mask=ids < VOCAB, other=float("-inf"))
    tl.store(out_ptr + row * WIDTH + block, tl.max(x))
    if block == 0:  # the places that no program has
        i = tl.arange(0, WIDTH)
        tl.store(out_ptr + row * WIDTH + i, float("-inf"), mask=i >= tl.num_programs(1))


def block_maxima(x: Tensor) -> Tensor:
    """fp32 ``[R, V]``, aligned -> fp32 ``[R, WIDTH]``, -inf past the last block.

    A NaN may be passed over.
    """
    rows, vocab = x.shape
    out = x.new_empty(rows, sizes(vocab)["WIDTH"])
    if x.numel():
        _maxima[grid(rows, vocab)](x, out, num_warps=4, **sizes(vocab), **NO_FMA)
    return out


@triton.jit
def highest_of(maxima_ptr, row, WIDTH: tl.constexpr):
    """A row's maximum, out of those of its blocks."""
    return tl.max(tl.load(maxima_ptr + row * WIDTH + tl.arange(0, WIDTH)))
