"""Draws a token a row: edited logits in, token ids out.

Contract: a token scores ``(x - max) / T + noise`` in fp32, every step rounded, the noise that of
``kernels/philox.py``; at temperature 0 it scores ``x``. The highest score wins, the lowest id among
equals. Maxima are exact, so the blocks' order does not matter, and a row sees nothing of others.

The noise takes logarithms in fp64, for which a GPU has few units. So each token's score is first
estimated in fp32, within a known bound, and only those that could still win are computed as the
contract says. The bound has room for the roundings of scores above -30, and lower ones never win.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernel_set import Draw
from .elementary import NO_FMA
from .filters import cut
from .launch import aligned
from .philox import ROUGH, gumbel_of, noise_words, rough_gumbel_of
from .vocab import block_maxima, grid, highest_of, sizes

_NO_ID = tl.constexpr(2**31 - 1)
_SURE = tl.constexpr(-3.25)
"""Below the score of a row's likeliest token, which no filter drops: the least noise is -3.14."""


@triton.jit
def _first_of(score, ids, best):
    return tl.min(tl.where(score == best, ids, _NO_ID))


@triton.jit
def _words(seed, choice, position, block, BLOCK: tl.constexpr):
    """uint32 ``[BLOCK]``: the noise's words of a block's tokens, by id."""
    counter = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    w0, w1, w2, w3 = noise_words(seed, choice, position, counter)
    return tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))


@triton.jit
def _drawn(x, ids, kept, word, high, temperature):
    """The best score of a block and its token; (-inf, no id) where none of it can win the row."""
    inside = kept & (x > float("-inf"))
    rough = (x - high) * (1.0 / temperature) + rough_gumbel_of(word)
    rough = tl.where(inside, rough, float("-inf"))
    possible = rough >= tl.maximum(tl.max(rough) - 2 * ROUGH, _SURE - ROUGH)
    best = tl.full((), float("-inf"), tl.float32)
    best_id = tl.full((), _NO_ID, tl.int32)
    token = tl.min(tl.where(possible, ids, _NO_ID))
    while token < _NO_ID:  # mostly one token, or none
        here = ids == token
        own = tl.sum(tl.where(here, word, 0).to(tl.int64)).to(tl.uint32)
        logit = tl.max(tl.where(here, x, float("-inf")))
        score = tl.div_rn(logit - high, temperature) + gumbel_of(own)
        best_id = tl.where(score > best, token, best_id)
        best = tl.maximum(score, best)
        token = tl.min(tl.where(possible & (ids > token), ids, _NO_ID))
    return best, best_id


@triton.jit
def _choose_blocks(
    logits_ptr,
    maxima_ptr,
    temperatures_ptr,
    cut_logit_ptr,
    cut_id_ptr,
    seeds_ptr,
    choices_ptr,
    positions_ptr,
    best_ptr,
    best_id_ptr,
    FILTERED: tl.constexpr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + row * VOCAB + ids, mask=ids < VOCAB, other=float("-inf"))
    temperature = tl.load(temperatures_ptr + row)
    if temperature == 0.0:
        best = tl.max(x)
        best_id = _first_of(x, ids, best)
    else:
        kept = ids < VOCAB
        if FILTERED:
            value, last = tl.load(cut_logit_ptr + row), tl.load(cut_id_ptr + row)
            kept = kept & ((x > value) | ((x == value) & (ids <= last)))
        seed, choice = tl.load(seeds_ptr + row), tl.load(choices_ptr + row)
        word = _words(seed, choice, tl.load(positions_ptr + row), block, BLOCK)
        high = highest_of(maxima_ptr, row, WIDTH)
        best, best_id = _drawn(x, ids, kept, word, high, temperature)
    tl.store(best_ptr + row * WIDTH + block, best)
    tl.store(best_id_ptr + row * WIDTH + block, best_id)


@triton.jit
def _choose_rows(
    best_ptr, best_id_ptr, score_ptr, token_ptr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr
):
    row = tl.program_id(0)
    i = tl.arange(0, WIDTH)
    scores = tl.load(best_ptr + row * WIDTH + i, mask=i < BLOCKS, other=float("-inf"))
    ids = tl.load(best_id_ptr + row * WIDTH + i, mask=i < BLOCKS, other=_NO_ID)
    best = tl.max(scores)
    tl.store(score_ptr + row, best)
    tl.store(token_ptr + row, _first_of(scores, ids, best).to(tl.int64))


def choose(logits: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """fp32 ``[R, V]``, edited -> (token ids int64 ``[R]``, their scores fp32 ``[R]``).

    A row that leaves no token has the score -inf, and its id means nothing.
    """
    logits = aligned(logits)
    rows, vocab = logits.shape
    maxima = block_maxima(logits)
    best = torch.empty_like(maxima)
    best_id = torch.empty_like(maxima, dtype=torch.int32)
    score = logits.new_empty(rows)
    token_ids = torch.empty_like(draw.seeds)
    filtered = draw.filtered.numel() > 0
    _choose_blocks[grid(rows, vocab)](
        logits,
        maxima,
        draw.temperatures,
        *(cut(logits, maxima, draw) if filtered else (score, token_ids)),
        draw.seeds,
        draw.choices,
        draw.positions,
        best,
        best_id,
        FILTERED=filtered,
        num_warps=4,
        **sizes(vocab),
        **NO_FMA,
    )
    _choose_rows[(rows,)](
        best,
        best_id,
        score,
        token_ids,
        BLOCKS=grid(rows, vocab)[1],
        WIDTH=best.shape[1],
        num_warps=1,
        **NO_FMA,
    )
    return token_ids, score
