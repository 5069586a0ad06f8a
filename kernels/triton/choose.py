"""Draws a token a row: edited logits in, token ids out, in one walk over the vocabulary.

Contract: a token scores ``(x - max) / T + noise`` in fp32, every step rounded, the noise that of
``kernels/philox.py``; at temperature 0 it scores ``x``. The highest score wins, the lowest id among
equals. Maxima are exact, so the blocks' order does not matter, and a row sees nothing of others.
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
from .philox import gumbel_of, noise_words

_BLOCK = 512  # counters a program; four tokens each
_NO_ID = tl.constexpr(2**31 - 1)


@triton.jit
def _score(logits_ptr, ids, word, highest, temperature, cut_logit, cut_id, VOCAB: tl.constexpr):
    """The scores of a block of tokens; -inf for those that may not be drawn."""
    x = tl.load(logits_ptr + ids, mask=ids < VOCAB, other=float("-inf"))
    kept = (x > cut_logit) | ((x == cut_logit) & (ids <= cut_id))
    score = tl.div_rn(x - highest, temperature) + gumbel_of(word)
    return tl.where(kept & (x > float("-inf")), score, float("-inf"))


@triton.jit
def _first_of(score, ids, best):
    return tl.min(tl.where(score == best, ids, _NO_ID))


@triton.jit
def _choose_blocks(
    logits_ptr,
    highest_ptr,
    temperatures_ptr,
    cut_logit_ptr,
    cut_id_ptr,
    seeds_ptr,
    choices_ptr,
    positions_ptr,
    best_ptr,
    best_id_ptr,
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * VOCAB
    counter = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ids = counter * 4
    temperature = tl.load(temperatures_ptr + row)
    if temperature == 0.0:
        s0 = tl.load(logits_ptr + ids, mask=ids < VOCAB, other=float("-inf"))
        s1 = tl.load(logits_ptr + ids + 1, mask=ids + 1 < VOCAB, other=float("-inf"))
        s2 = tl.load(logits_ptr + ids + 2, mask=ids + 2 < VOCAB, other=float("-inf"))
        s3 = tl.load(logits_ptr + ids + 3, mask=ids + 3 < VOCAB, other=float("-inf"))
    else:
        high = tl.load(highest_ptr + row)
        value, last = tl.load(cut_logit_ptr + row), tl.load(cut_id_ptr + row)
        seed, choice = tl.load(seeds_ptr + row), tl.load(choices_ptr + row)
        w0, w1, w2, w3 = noise_words(seed, choice, tl.load(positions_ptr + row), counter)
        s0 = _score(logits_ptr, ids, w0, high, temperature, value, last, VOCAB)
        s1 = _score(logits_ptr, ids + 1, w1, high, temperature, value, last, VOCAB)
        s2 = _score(logits_ptr, ids + 2, w2, high, temperature, value, last, VOCAB)
        s3 = _score(logits_ptr, ids + 3, w3, high, temperature, value, last, VOCAB)
    best = tl.max(tl.maximum(tl.maximum(s0, s1), tl.maximum(s2, s3)))
    low = tl.minimum(_first_of(s0, ids, best), _first_of(s1, ids + 1, best))
    high_id = tl.minimum(_first_of(s2, ids + 2, best), _first_of(s3, ids + 3, best))
    at = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(best_ptr + at, best)
    tl.store(best_id_ptr + at, tl.minimum(low, high_id))


@triton.jit
def _choose_rows(
    best_ptr, best_id_ptr, score_ptr, token_ptr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr
):
    row = tl.program_id(0)
    i = tl.arange(0, WIDTH)
    scores = tl.load(best_ptr + row * BLOCKS + i, mask=i < BLOCKS, other=float("-inf"))
    ids = tl.load(best_id_ptr + row * BLOCKS + i, mask=i < BLOCKS, other=_NO_ID)
    best = tl.max(scores)
    tl.store(score_ptr + row, best)
    tl.store(token_ptr + row, _first_of(scores, ids, best).to(tl.int64))


def choose(logits: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """fp32 ``[R, V]``, edited -> (token ids int64 ``[R]``, their scores fp32 ``[R]``).

    A row that leaves no token has the score -inf, and its id means nothing.
    """
    logits = aligned(logits)
    rows, vocab = logits.shape
    highest = logits.amax(dim=1)
    cut_logit = torch.full_like(highest, -torch.inf)
    cut_id = torch.full_like(draw.seeds, vocab)
    which = draw.filtered
    if which.numel():
        cut_logit[which], cut_id[which] = cut(
            aligned(logits[which]),
            highest[which],
            draw.temperatures[which],
            draw.top_k[which],
            draw.top_p[which],
            draw.min_p[which],
        )
    blocks = triton.cdiv(vocab, 4 * _BLOCK)
    best = logits.new_empty(rows, blocks)
    best_id = torch.empty(rows, blocks, dtype=torch.int32, device=logits.device)
    _choose_blocks[(rows, blocks)](
        logits,
        highest,
        draw.temperatures,
        cut_logit,
        cut_id,
        draw.seeds,
        draw.choices,
        draw.positions,
        best,
        best_id,
        VOCAB=vocab,
        BLOCK=_BLOCK,
        num_warps=4,
        **NO_FMA,
    )
    score = torch.empty_like(highest)
    token_ids = torch.empty_like(draw.seeds)
    _choose_rows[(rows,)](
        best,
        best_id,
        score,
        token_ids,
        BLOCKS=blocks,
        WIDTH=triton.next_power_of_2(blocks),
        num_warps=1,
        **NO_FMA,
    )
    return token_ids, score
