"""Where top-k, top-p and min-p cut a row: no sort, no wait for the host.

All three keep a prefix of the tokens in descending order of logit, ties by lowest id
(``sampling/filters.py``), so a row's result is its last token: every token with a higher logit is
kept, and of the equal ones those up to its id.

Contract: one program a row. A token weighs ``e^((x - max) / T)``, as an integer of ``2^-40``. All
that is compared are counts and integer sums, which are exact: no order of addition matters. The cut
is found by bisection over the 32 bits of an order-preserving key, twice: for the count, then for
the mass.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementary import NO_FMA, exp_f32

_BLOCK = 4096
_ONE = tl.constexpr(2.0**40)


@triton.jit
def _weigh(
    logits_ptr, highest_ptr, temperatures_ptr, out_ptr, VOCAB: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * VOCAB + i, mask=i < VOCAB, other=float("-inf"))
    shifted = x - tl.load(highest_ptr + row)
    weight = exp_f32(tl.div_rn(shifted, tl.load(temperatures_ptr + row)))
    tl.store(out_ptr + row * VOCAB + i, weight, mask=i < VOCAB)


@triton.jit
def _keys(logits_ptr, first, lane, VOCAB: tl.constexpr):
    """uint32 in the order of the logits, -0 as 0; past the end 0, which no logit has."""
    inside = first + lane < VOCAB
    x = tl.load(logits_ptr + first + lane, mask=inside, other=0.0)
    bits = tl.where(x == 0.0, 0.0, x).to(tl.uint32, bitcast=True)
    key = tl.where((bits >> 31) != 0, ~bits, bits | 0x80000000)
    return tl.where(inside, key, 0)


@triton.jit
def _masses(weights_ptr, first, lane, VOCAB: tl.constexpr):
    weight = tl.load(weights_ptr + first + lane, mask=first + lane < VOCAB, other=0.0)
    return (weight * _ONE).to(tl.int64)


@triton.jit
def _measure(logits_ptr, weights_ptr, bound, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Count and mass of the tokens whose key is at least ``bound``."""
    lane = tl.arange(0, BLOCK)
    count = tl.zeros((BLOCK,), tl.int64)
    mass = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, VOCAB, BLOCK):
        above = _keys(logits_ptr, first, lane, VOCAB) >= bound
        count += above.to(tl.int64)
        mass += tl.where(above, _masses(weights_ptr, first, lane, VOCAB), 0)
    return tl.sum(count), tl.sum(mass)


@triton.jit
def _bisect(
    logits_ptr,
    weights_ptr,
    count_wanted,
    mass_wanted,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The highest key such that the tokens from it upwards have both the count and the mass."""
    key = tl.full((), 0, tl.uint32)
    bit = tl.full((), 0x80000000, tl.uint32)
    for _ in range(32):
        count, mass = _measure(logits_ptr, weights_ptr, key | bit, VOCAB, BLOCK)
        key = tl.where((count >= count_wanted) & (mass >= mass_wanted), key | bit, key)
        bit = bit >> 1
    return key


@triton.jit
def _at(logits_ptr, weights_ptr, key, limit, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """Of the tokens with this key: how many the limit leaves, each one's mass, the mass above."""
    higher, mass_higher = _measure(logits_ptr, weights_ptr, key + 1, VOCAB, BLOCK)
    count_from, mass_from = _measure(logits_ptr, weights_ptr, key, VOCAB, BLOCK)
    each = (mass_from - mass_higher) // (count_from - higher)
    return limit - higher, each, mass_higher


@triton.jit
def _cut(
    logits_ptr,
    weights_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    cut_logit_ptr,
    cut_id_ptr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * VOCAB
    weights_ptr += row.to(tl.int64) * VOCAB
    top_k = tl.load(top_k_ptr + row).to(tl.int64)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    lane = tl.arange(0, BLOCK)

    # How many tokens min-p and top-k leave, what the last of them is, and their mass.
    likely = tl.zeros((BLOCK,), tl.int64)
    for first in range(0, VOCAB, BLOCK):
        inside = first + lane < VOCAB
        weight = tl.load(weights_ptr + first + lane, mask=inside, other=-1.0)
        likely += (weight >= min_p).to(tl.int64)
    limit = tl.maximum(tl.minimum(tl.sum(likely), top_k), 1)
    zero = tl.full((), 0, tl.int64)
    key = tl.full((), 0x007FFFFF, tl.uint32)  # of -inf: nothing is cut
    ties = zero + VOCAB
    if limit < VOCAB:
        key = _bisect(logits_ptr, weights_ptr, limit, zero, VOCAB, BLOCK)
        ties, each, mass_higher = _at(logits_ptr, weights_ptr, key, limit, VOCAB, BLOCK)
        mass = mass_higher + ties * each
    else:
        _, mass = _measure(logits_ptr, weights_ptr, key, VOCAB, BLOCK)
    if top_p < 1.0:
        needed = tl.maximum((mass.to(tl.float64) * top_p).to(tl.int64), 1)
        key = _bisect(logits_ptr, weights_ptr, zero, needed, VOCAB, BLOCK)
        _, each, mass_higher = _at(logits_ptr, weights_ptr, key, limit, VOCAB, BLOCK)
        ties = (needed - mass_higher + each - 1) // each

    # The last of the equal tokens that is kept, by id.
    last = tl.full((), -1, tl.int64)
    seen = zero
    for first in range(0, VOCAB, BLOCK):
        equal = (_keys(logits_ptr, first, lane, VOCAB) == key).to(tl.int64)
        kept = (equal != 0) & (seen + tl.cumsum(equal, 0) <= ties)
        last = tl.maximum(last, tl.max(tl.where(kept, (first + lane).to(tl.int64), -1)))
        seen += tl.sum(equal)
    bits = tl.where((key >> 31) != 0, key & 0x7FFFFFFF, ~key)
    tl.store(cut_logit_ptr + row, bits.to(tl.float32, bitcast=True))
    tl.store(cut_id_ptr + row, last)


def cut(
    logits: Tensor,
    highest: Tensor,
    temperatures: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> tuple[Tensor, Tensor]:
    """The last token that each row keeps: (its logit fp32 ``[R]``, its id int64 ``[R]``).

    logits:       fp32 ``[R, V]``, aligned, before temperature
    highest:      fp32 ``[R]``, each row's maximum
    temperatures: fp32 ``[R]``, above 0
    top_k:        int64 ``[R]``, V or more where it is off
    top_p:        fp64 ``[R]``, 1 where it is off
    min_p:        fp32 ``[R]``, 0 where it is off
    """
    rows, vocab = logits.shape
    weights = torch.empty_like(logits)
    grid = (rows, triton.cdiv(vocab, _BLOCK))
    _weigh[grid](logits, highest, temperatures, weights, VOCAB=vocab, BLOCK=_BLOCK, **NO_FMA)
    cut_logit = highest.new_empty(rows)
    cut_id = top_k.new_empty(rows)
    _cut[(rows,)](
        logits,
        weights,
        top_k,
        top_p,
        min_p,
        cut_logit,
        cut_id,
        VOCAB=vocab,
        BLOCK=_BLOCK,
        num_warps=8,
        **NO_FMA,
    )
    return cut_logit, cut_id
