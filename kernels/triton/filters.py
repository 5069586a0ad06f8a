"""Where top-k, top-p and min-p cut a row: no sort, no wait for the host.

All three keep a prefix of the tokens in descending order of logit, ties by lowest id
(``sampling/filters.py``), so a row's result is its last token: every token with a higher logit is
kept, and of the equal ones those up to its id.

Contract: a token weighs ``e^((x - max) / T)``, as an integer of ``2^-40``. All that is compared are
counts and integer sums, which are exact: no order of addition matters. The cut's logit is found by
radix selection (``radix.py``), by count for top-k and min-p, then by mass for top-p; the two share
their first tallies. Tokens of logit -inf are left out: no row draws them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernel_set import Draw
from .elementary import NO_FMA
from .radix import FIRST, NEXT, NEXT_BITS, descend, keys_of, logit_of, tally, weights_of
from .vocab import grid, highest_of, sizes


@triton.jit
def _survey(
    logits_ptr,
    maxima_ptr,
    which_ptr,
    temperatures_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    state_ptr,
    counts_ptr,
    masses_ptr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The first digit's tallies, and how many tokens are possible and likely enough."""
    at = tl.program_id(0).to(tl.int64)
    row = tl.load(which_ptr + at)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * VOCAB + ids, mask=ids < VOCAB, other=float("-inf"))
    possible = x > float("-inf")
    high = highest_of(maxima_ptr, row, WIDTH)
    weight = weights_of(x, high, tl.load(temperatures_ptr + row))
    min_p = tl.load(min_p_ptr + row)
    likely = possible & (weight >= min_p)
    tl.atomic_add(state_ptr + at * 4, tl.sum(possible.to(tl.int64)), sem="relaxed")
    tl.atomic_add(state_ptr + at * 4 + 1, tl.sum(likely.to(tl.int64)), sem="relaxed")
    by_count = (tl.load(top_k_ptr + row) < VOCAB) | (min_p > 0.0)
    by_mass = tl.load(top_p_ptr + row) < 1.0
    digit = keys_of(x) >> (2 * NEXT_BITS)
    counts_ptr += at * FIRST
    masses_ptr += at * FIRST
    tally(counts_ptr, masses_ptr, digit, weight, possible, by_count, by_mass)


@triton.jit
def _tally(
    logits_ptr,
    maxima_ptr,
    which_ptr,
    temperatures_ptr,
    state_ptr,
    counts_ptr,
    masses_ptr,
    BELOW: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A later digit's tallies, of the tokens whose digits so far are those found."""
    at = tl.program_id(0).to(tl.int64)
    digits = tl.load(state_ptr + at * 4)
    if digits >= 0:
        row = tl.load(which_ptr + at)
        ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + row * VOCAB + ids, mask=ids < VOCAB, other=float("-inf"))
        key = keys_of(x) >> BELOW
        found = (x > float("-inf")) & ((key >> NEXT_BITS) == digits)
        if tl.sum(found.to(tl.int32)) > 0:
            high = highest_of(maxima_ptr, row, WIDTH)
            weight = weights_of(x, high, tl.load(temperatures_ptr + row))
            counts_ptr += at * NEXT
            masses_ptr += at * NEXT
            tally(counts_ptr, masses_ptr, key & (NEXT - 1), weight, found, True, True)


@triton.jit
def _put(state_ptr, digits, wanted, higher):
    """A search's state: the digits found, or -1; what is still wanted; the mass above."""
    tl.store(state_ptr, digits)
    tl.store(state_ptr + 1, wanted)
    tl.store(state_ptr + 2, higher)


@triton.jit
def _start_by_count(which_ptr, top_k_ptr, state_ptr, counts_ptr, masses_ptr):
    """From the first tallies: the digit of the last token that min-p and top-k leave."""
    at = tl.program_id(0).to(tl.int64)
    state_ptr += at * 4
    counts_ptr += at * FIRST
    masses_ptr += at * FIRST
    possible, likely = tl.load(state_ptr), tl.load(state_ptr + 1)
    limit = tl.maximum(tl.minimum(likely, tl.load(top_k_ptr + tl.load(which_ptr + at))), 1)
    if limit < possible:
        digit, above, higher, _, _ = descend(counts_ptr, masses_ptr, limit, FIRST, False)
        _put(state_ptr, digit, limit - above, higher)
    else:  # nothing is cut, and the mass is that of all
        mass = tl.sum(tl.load(masses_ptr + tl.arange(0, FIRST)))
        _put(state_ptr, tl.full((), -1, tl.int64), limit, mass)


@triton.jit
def _continue(state_ptr, counts_ptr, masses_ptr, BY_MASS: tl.constexpr):
    """The second digit."""
    at = tl.program_id(0).to(tl.int64)
    state_ptr += at * 4
    counts_ptr += at * NEXT
    masses_ptr += at * NEXT
    digits, wanted = tl.load(state_ptr), tl.load(state_ptr + 1)
    if digits >= 0:
        digit, above, more, _, _ = descend(counts_ptr, masses_ptr, wanted, NEXT, BY_MASS)
        higher = tl.load(state_ptr + 2) + more
        _put(state_ptr, (digits << NEXT_BITS) | digit, wanted - above, higher)


@triton.jit
def _turn_to_mass(
    which_ptr,
    top_p_ptr,
    state_ptr,
    cut_ptr,
    counts_ptr,
    masses_ptr,
    first_counts_ptr,
    first_masses_ptr,
):
    """The last digit by count: a cut. Then, from the first tallies, the first digit by mass."""
    at = tl.program_id(0).to(tl.int64)
    state_ptr += at * 4
    counts_ptr += at * NEXT
    masses_ptr += at * NEXT
    digits, wanted, mass = tl.load(state_ptr), tl.load(state_ptr + 1), tl.load(state_ptr + 2)
    key = digits
    ties = wanted
    if digits >= 0:
        digit, above, more, count, own = descend(counts_ptr, masses_ptr, wanted, NEXT, False)
        key = (digits << NEXT_BITS) | digit
        ties = wanted - above
        mass = mass + more + ties * (own // count)
    tl.store(cut_ptr + at * 2, key)
    tl.store(cut_ptr + at * 2 + 1, ties)
    top_p = tl.load(top_p_ptr + tl.load(which_ptr + at))
    if top_p < 1.0:
        needed = tl.maximum((mass.to(tl.float64) * top_p).to(tl.int64), 1)
        first_counts_ptr += at * FIRST
        first_masses_ptr += at * FIRST
        digit, above, higher, _, _ = descend(
            first_counts_ptr, first_masses_ptr, needed, FIRST, True
        )
        _put(state_ptr, digit, needed - above, higher)
    else:
        _put(state_ptr, tl.full((), -1, tl.int64), wanted, mass)


@triton.jit
def _finish_by_mass(state_ptr, cut_ptr, counts_ptr, masses_ptr):
    """The last digit by mass: a cut within that by count."""
    at = tl.program_id(0).to(tl.int64)
    state_ptr += at * 4
    counts_ptr += at * NEXT
    masses_ptr += at * NEXT
    digits, wanted = tl.load(state_ptr), tl.load(state_ptr + 1)
    if digits >= 0:
        digit, above, _, count, own = descend(counts_ptr, masses_ptr, wanted, NEXT, True)
        each = own // count
        tl.store(cut_ptr + at * 2, (digits << NEXT_BITS) | digit)
        tl.store(cut_ptr + at * 2 + 1, (wanted - above + each - 1) // each)


@triton.jit
def _count_ties(
    logits_ptr,
    which_ptr,
    cut_ptr,
    ties_ptr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """How many tokens of each block have the cut's very logit."""
    at, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(which_ptr + at)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * VOCAB + ids, mask=ids < VOCAB, other=float("-inf"))
    equal = keys_of(x) == tl.load(cut_ptr + at * 2)
    tl.store(ties_ptr + at * WIDTH + block, tl.sum(equal.to(tl.int32)))


@triton.jit
def _last_tie(
    logits_ptr,
    which_ptr,
    cut_ptr,
    ties_ptr,
    cut_logit_ptr,
    cut_id_ptr,
    BLOCKS: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """The id of the last token of the cut's logit that is kept."""
    at = tl.program_id(0).to(tl.int64)
    row = tl.load(which_ptr + at)
    key, wanted = tl.load(cut_ptr + at * 2), tl.load(cut_ptr + at * 2 + 1)
    if key >= 0:
        i = tl.arange(0, WIDTH)
        ties = tl.load(ties_ptr + at * WIDTH + i, mask=i < BLOCKS, other=0)
        short = (i < BLOCKS) & (tl.cumsum(ties, 0) < wanted)
        block = tl.sum(short.to(tl.int32))
        ids = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + row * VOCAB + ids, mask=ids < VOCAB, other=float("-inf"))
        equal = keys_of(x) == key
        seen = tl.sum(tl.where(short, ties, 0)) + tl.cumsum(equal.to(tl.int32), 0)
        last = tl.max(tl.where(equal & (seen <= wanted), ids, -1))
        tl.store(cut_logit_ptr + row, logit_of(key))
        tl.store(cut_id_ptr + row, last.to(tl.int64))


def cut(logits: Tensor, maxima: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """The last token that each row keeps: (its logit fp32 ``[R]``, its id int64 ``[R]``).

    Rows that are not in ``draw.filtered``, and those that lose nothing, keep all: (-inf, V).

    logits: fp32 ``[R, V]``, aligned, before temperature
    maxima: fp32 ``[R, WIDTH]``, of ``block_maxima``
    """
    vocab = logits.shape[1]
    which, constants = draw.filtered, sizes(vocab) | NO_FMA
    rows = which.numel()
    programs = grid(rows, vocab)
    cut_logit = torch.full_like(draw.temperatures, -torch.inf)
    cut_id = torch.full_like(draw.seeds, vocab)
    found = which.new_empty(rows, 2)
    ties = torch.empty(rows, constants["WIDTH"], dtype=torch.int32, device=which.device)
    # The search's state, then counts and masses of the first digit and of four later ones.
    lengths = [rows * n for n in (4, *[FIRST.value] * 2, *[NEXT.value] * 8)]
    state, *tallies = which.new_zeros(sum(lengths)).split(lengths)
    first, second, third, fourth, fifth = zip(tallies[::2], tallies[1::2], strict=True)
    of_rows = (logits, maxima, which, draw.temperatures)

    limits = (draw.top_k, draw.top_p, draw.min_p)
    _survey[programs](*of_rows, *limits, state, *first, **constants)
    _start_by_count[(rows,)](which, draw.top_k, state, *first, num_warps=8, **NO_FMA)
    _tally[programs](*of_rows, state, *second, BELOW=NEXT_BITS.value, **constants)
    _continue[(rows,)](state, *second, BY_MASS=False, **NO_FMA)
    _tally[programs](*of_rows, state, *third, BELOW=0, **constants)
    tallied = (*third, *first)
    _turn_to_mass[(rows,)](which, draw.top_p, state, found, *tallied, num_warps=8, **NO_FMA)
    _tally[programs](*of_rows, state, *fourth, BELOW=NEXT_BITS.value, **constants)
    _continue[(rows,)](state, *fourth, BY_MASS=True, **NO_FMA)
    _tally[programs](*of_rows, state, *fifth, BELOW=0, **constants)
    _finish_by_mass[(rows,)](state, found, *fifth, **NO_FMA)
    _count_ties[programs](logits, which, found, ties, **constants)
    blocks = programs[1]
    _last_tie[(rows,)](logits, which, found, ties, cut_logit, cut_id, BLOCKS=blocks, **constants)
    return cut_logit, cut_id
