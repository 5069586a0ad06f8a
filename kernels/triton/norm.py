"""RMS normalisation, alone or with the residual added first; rounded as ``kernels/norm.py`` rounds.

Contract: one program a row. The squares of the whole row, padded with zeros to the next power
of two, are added by one ``tl.sum`` in fp32; the compiler takes its order from the width and the
dtype alone. Square root and divisions are IEEE; nothing is joined into an fma.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .elementary import NO_FMA
from .launch import aligned


@triton.jit
def normed(x, weight, hidden, eps):
    """A row's fp32 block, zeros past its end, over its root mean square, times the weight."""
    mean_square = tl.div_rn(tl.sum(x * x), hidden)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))
    return (x * inverse).to(weight.dtype).to(tl.float32) * weight.to(tl.float32)


@triton.jit
def _rms_norm(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    hidden,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr,
):
    i = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * HIDDEN + i
    inside = i < HIDDEN
    # All loads come before any store: the compiler moves none past another, and waits add up.
    weight = tl.load(weight_ptr + i, mask=inside, other=0.0)
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    if ADD:
        residual = tl.load(residual_ptr + at, mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + at, x, mask=inside)
    out = normed(x.to(tl.float32), weight, hidden, eps)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x ``[..., H]``, weight ``[H]`` -> ``[..., H]`` in x.dtype."""
    x = aligned(x)
    out = torch.empty_like(x)
    _launch(x, x, weight, out, out, eps, add=False)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """-> (rms_norm(x + residual), x + residual); the sum is rounded to x.dtype first."""
    x, residual = aligned(x), aligned(residual)
    out, total = torch.empty_like(x), torch.empty_like(x)
    _launch(x, residual, weight, out, total, eps, add=True)
    return out, total


def _launch(
    x: Tensor, residual: Tensor, weight: Tensor, out: Tensor, total: Tensor, eps: float, add: bool
) -> None:
    hidden = x.shape[-1]
    block = triton.next_power_of_2(hidden)
    if x.numel():
        _rms_norm[(x.numel() // hidden,)](
            x,
            residual,
            aligned(weight.to(x.dtype)),
            out,
            total,
            float(hidden),
            eps,
            HIDDEN=hidden,
            BLOCK=block,
            ADD=add,
            num_warps=min(16, max(1, block // 512)),
            **NO_FMA,
        )
