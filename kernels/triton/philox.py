"""Gumbel noise; contract and bits of ``kernels/philox.py``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementary import NO_FMA, log_f64

_BLOCK = 256

ROUGH = tl.constexpr(0.09375)
"""More than any error of ``rough_gumbel_of``, which is 0.075 at most."""


@triton.jit
def noise_words(seed, choice, position, counter):
    """Four uint32 blocks: the generator's words for the vocabulary ids ``4 counter + 0 … 3``."""
    zero = tl.zeros(counter.shape, tl.uint32)
    return tl.philox(
        seed.to(tl.uint64, bitcast=True),
        counter.to(tl.uint32),
        zero + position.to(tl.uint32),
        zero + choice.to(tl.uint32),
        zero,
    )


@triton.jit
def gumbel_of(word):
    """``-ln(-ln u)`` with ``u = (word + 0.5) 2^-32``, in fp64, rounded to fp32."""
    uniform = (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10
    return -log_f64(-log_f64(uniform)).to(tl.float32)


@triton.jit
def _rough_log(x):
    """ln x within 0.031 for positive, normal fp32: its bits are nearly linear in it."""
    bits = x.to(tl.int32, bitcast=True) - 0x3F800000
    return (bits.to(tl.float32) * 1.1920928955078125e-07 + 0.043) * 0.6931471805599453


@triton.jit
def rough_gumbel_of(word):
    """``gumbel_of`` within ``ROUGH``, in fp32, without a call.

    ``-ln u`` is taken of ``t = 1 - u`` by the first terms of its series where u is over a half.
    """
    t = ((~word).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    u = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    series = t * (1.0 + t * (0.5 + t * (0.3333333333333333 + t * 0.25)))
    return -_rough_log(tl.where(t < 0.5, series, -_rough_log(u)))


@triton.jit
def _gumbel(
    seeds_ptr, choices_ptr, positions_ptr, out_ptr, VOCAB: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    counter = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    w0, w1, w2, w3 = noise_words(
        tl.load(seeds_ptr + row), tl.load(choices_ptr + row), tl.load(positions_ptr + row), counter
    )
    ids = counter * 4
    to = out_ptr + row * VOCAB + ids
    tl.store(to, gumbel_of(w0), mask=ids < VOCAB)
    tl.store(to + 1, gumbel_of(w1), mask=ids + 1 < VOCAB)
    tl.store(to + 2, gumbel_of(w2), mask=ids + 2 < VOCAB)
    tl.store(to + 3, gumbel_of(w3), mask=ids + 3 < VOCAB)


def gumbel(seeds: Tensor, choices: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """seeds, choices, positions: int64 ``[R]`` -> fp32 ``[R, vocab_size]``."""
    seeds, choices, positions = (t.long().contiguous() for t in (seeds, choices, positions))
    rows = seeds.shape[0]
    out = torch.empty(rows, vocab_size, device=seeds.device)
    if out.numel():
        _gumbel[(rows, triton.cdiv(vocab_size, 4 * _BLOCK))](
            seeds, choices, positions, out, VOCAB=vocab_size, BLOCK=_BLOCK, num_warps=4, **NO_FMA
        )
    return out
