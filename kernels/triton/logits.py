"""Log-probabilities over the vocabulary; ``kernels/logits.py`` has the formula.

Contract: one program a row. The exact maximum; ``e^(x[v] - max)`` added to lane ``v mod 4096``, v
ascending; the lanes added by one ``tl.sum``, whose order is compiled from their number; the
logarithm in fp64, rounded to fp32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementary import NO_FMA, exp_f32, log_f64
from .launch import aligned

_LANES = 4096


@triton.jit
def _log_softmax(x_ptr, out_ptr, VOCAB: tl.constexpr, LANES: tl.constexpr):
    lane = tl.arange(0, LANES)
    row = tl.program_id(0).to(tl.int64) * VOCAB
    lanes = tl.full((LANES,), float("-inf"), tl.float32)
    for start in range(0, VOCAB, LANES):
        inside = lane < VOCAB - start
        x = tl.load(x_ptr + row + start + lane, mask=inside, other=float("-inf"))
        lanes = tl.maximum(lanes, x)
    top = tl.max(lanes)
    lanes = tl.zeros((LANES,), tl.float32)
    for start in range(0, VOCAB, LANES):
        inside = lane < VOCAB - start
        x = tl.load(x_ptr + row + start + lane, mask=inside, other=float("-inf"))
        lanes += exp_f32(x - top)
    total = tl.full((1,), 0.0, tl.float64) + tl.sum(lanes).to(tl.float64)
    log_total = log_f64(total).to(tl.float32)
    for start in range(0, VOCAB, LANES):
        inside = lane < VOCAB - start
        x = tl.load(x_ptr + row + start + lane, mask=inside, other=0.0)
        tl.store(out_ptr + row + start + lane, (x - top) - log_total, mask=inside)


def log_softmax(logits: Tensor) -> Tensor:
    """fp32 ``[R, V]`` -> fp32 ``[R, V]``."""
    logits = aligned(logits)
    rows, vocab = logits.shape
    out = torch.empty_like(logits)
    if rows:
        _log_softmax[(rows,)](logits, out, VOCAB=vocab, LANES=_LANES, num_warps=8, **NO_FMA)
    return out
