"""Radix selection over a row's logits: tallies by digit, and the digit in which a bound lies.

A row's tokens are told apart by a key in the order of their logits, 12 bits of it first and then
10 and 10. Many programs tally a row's tokens by their next digit; one program a row then finds the
digit that holds the wanted token, and only tokens of that digit are tallied next.

Contract: all tallies are integers, counts and masses of ``2^-40``. They are added by atomics, whose
order changes nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .elementary import exp_f32

FIRST = tl.constexpr(1 << 12)
"""Values of the first digit: common logits fall on some hundred, so that atomics seldom meet."""

NEXT_BITS = tl.constexpr(10)
NEXT = tl.constexpr(1 << 10)
"""Values of the second digit and of the third."""

_ONE = tl.constexpr(2.0**40)


@triton.jit
def keys_of(x):
    """int64 in ``[0, 2^32)`` in the order of fp32 logits, -0 as 0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, ~bits, bits | 0x80000000).to(tl.int64)


@triton.jit
def logit_of(key):
    """The fp32 logit of a key."""
    key = key.to(tl.uint32)
    bits = tl.where((key >> 31) != 0, key & 0x7FFFFFFF, ~key)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def weights_of(x, high, temperature):
    """``e^((x - max) / T)`` in fp32."""
    return exp_f32(tl.div_rn(x - high, temperature))


@triton.jit
def tally(counts_ptr, masses_ptr, digit, weight, found, by_count, by_mass):
    """Add the tokens found to their digits' counts and masses, where a search looks at them."""
    if by_count:
        one = tl.full(digit.shape, 1, tl.int64)
        tl.atomic_add(counts_ptr + digit, one, mask=found, sem="relaxed")
    if by_mass:
        mass = (weight * _ONE).to(tl.int64)
        tl.atomic_add(masses_ptr + digit, mass, mask=found & (mass > 0), sem="relaxed")


@triton.jit
def descend(counts_ptr, masses_ptr, wanted, DIGITS: tl.constexpr, BY_MASS: tl.constexpr):
    """The highest digit such that the tokens from it upwards have the wanted count, or mass.

    Returns the digit; the count or mass above it; the mass above it; its own count and mass.
    """
    digits = tl.arange(0, DIGITS)
    counts, masses = tl.load(counts_ptr + digits), tl.load(masses_ptr + digits)
    measure = masses if BY_MASS else counts
    reached = tl.cumsum(measure, 0, reverse=True) >= wanted
    digit = tl.sum(reached.to(tl.int32)) - 1
    above, here = digits > digit, digits == digit
    return (
        digit.to(tl.int64),
        tl.sum(tl.where(above, measure, 0)),
        tl.sum(tl.where(above, masses, 0)),
        tl.sum(tl.where(here, counts, 0)),
        tl.sum(tl.where(here, masses, 0)),
    )
