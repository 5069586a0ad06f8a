"""Gumbel noise from the counter-based generator Philox 4x32-10 (Salmon et al., SC'11).

Contract: elementwise and stateless. key = the 64-bit seed (low word, high word; a negative seed is
taken in two's complement), counter = ``(vocab_id >> 2, position, choice, 0)``, and word
``vocab_id & 3`` of the output is used. ``u = (word + 0.5) * 2^-32`` lies strictly inside (0, 1);
the noise is ``-ln(-ln u)`` in fp64, rounded to fp32, always finite. The logarithm uses no fma, so
both providers give the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .elementary import log_f64
from .native.library import library

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox_4x32_10(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """The generator on 32-bit words held in int64 tensors, which broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = (k0 + _KEY_STEPS[0]) & _MASK
        k1 = (k1 + _KEY_STEPS[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low word of a 32 x 32-bit product, by halves of b: int64 never overflows."""
    by_low = a * (b & 0xFFFF)
    by_high = a * (b >> 16)
    high = (by_high + (by_low >> 16)) >> 16
    low = (((by_high & 0xFFFF) << 16) + by_low) & _MASK
    return high, low


def gumbel_torch(seeds: Tensor, choices: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """seeds, choices, positions: int64 ``[R]`` -> fp32 ``[R, vocab_size]``."""
    blocks = torch.arange(-(-vocab_size // 4), device=seeds.device).unsqueeze(0)
    seeds, choices, positions = (t.unsqueeze(1) for t in (seeds, choices, positions))
    counter = (blocks, positions & _MASK, choices & _MASK, torch.zeros_like(blocks))
    words = philox_4x32_10(counter, (seeds & _MASK, (seeds >> 32) & _MASK))
    word = torch.stack(words, dim=-1).flatten(1)[:, :vocab_size]
    uniform = (word.double() + 0.5) * 2.0**-32
    return -log_f64(-log_f64(uniform)).float()


def gumbel_native(seeds: Tensor, choices: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """seeds, choices, positions: int64 ``[R]`` -> fp32 ``[R, vocab_size]``."""
    seeds, choices, positions = (t.long().contiguous() for t in (seeds, choices, positions))
    out = torch.empty(seeds.shape[0], vocab_size)
    library().isobit_gumbel(
        seeds.data_ptr(),
        choices.data_ptr(),
        positions.data_ptr(),
        out.data_ptr(),
        seeds.shape[0],
        vocab_size,
        torch.get_num_threads(),
    )
    return out
