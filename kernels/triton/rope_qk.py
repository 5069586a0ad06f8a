"""From one row of the QKV product to q, k and v: split, QK norm where the model has one, RoPE.

Contract: one program a head of a token. The norm is ``norm.py``'s over the head, with the squares
of the two halves added pairwise first; RoPE is elementwise and has the bits of ``kernels/rope.py``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernel_set import QkNorm
from .elementary import NO_FMA
from .launch import aligned
from .pdl import overlapping, wait_for_inputs


@triton.jit
def _half_normed(x, inverse, weight):
    return ((x * inverse).to(weight.dtype).to(tl.float32) * weight.to(tl.float32)).to(weight.dtype)


@triton.jit
def _rope_qkv(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_sin_ptr,
    positions_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    dim,
    eps,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    i = tl.arange(0, BLOCK)
    inside = i < HALF
    row = qkv_ptr + (token * (Q_HEADS + 2 * KV_HEADS) + head) * 2 * HALF
    first = tl.load(row + i, mask=inside, other=0.0)
    second = tl.load(row + HALF + i, mask=inside, other=0.0)
    if head < Q_HEADS:
        to = q_ptr + (token * Q_HEADS + head) * 2 * HALF
        weight_ptr = q_weight_ptr
    elif head < Q_HEADS + KV_HEADS:
        to = k_ptr + (token * KV_HEADS + head - Q_HEADS) * 2 * HALF
        weight_ptr = k_weight_ptr
    else:
        to = v_ptr + (token * KV_HEADS + head - Q_HEADS - KV_HEADS) * 2 * HALF
        weight_ptr = k_weight_ptr
    if head < Q_HEADS + KV_HEADS:
        a, b = first.to(tl.float32), second.to(tl.float32)
        if NORM:
            mean_square = tl.div_rn(tl.sum(a * a + b * b), dim)
            inverse = tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))
            low = tl.load(weight_ptr + i, mask=inside, other=0.0)
            high = tl.load(weight_ptr + HALF + i, mask=inside, other=0.0)
            a = _half_normed(a, inverse, low).to(tl.float32)
            b = _half_normed(b, inverse, high).to(tl.float32)
        angles = cos_sin_ptr + tl.load(positions_ptr + token) * 2 * HALF
        cos = tl.load(angles + i, mask=inside, other=0.0)
        sin = tl.load(angles + HALF + i, mask=inside, other=0.0)
        first = (a * cos - b * sin).to(first.dtype)
        second = (b * cos + a * sin).to(second.dtype)
    tl.store(to + i, first, mask=inside)
    tl.store(to + HALF + i, second, mask=inside)


def rope_qkv(
    qkv: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    norm: QkNorm | None,
    cos_sin: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv ``[T, (Hq + 2 Hk) D]``: q's heads, then k's, then v's -> q, k, v ``[T, heads, D]``."""
    qkv = aligned(qkv)
    tokens, dim = qkv.shape[0], cos_sin.shape[-1]
    q = qkv.new_empty(tokens, num_q_heads, dim)
    k, v = (qkv.new_empty(tokens, num_kv_heads, dim) for _ in range(2))
    weights = (norm.q, norm.k) if norm is not None else (qkv, qkv)
    if tokens:
        _rope_qkv[(tokens, num_q_heads + 2 * num_kv_heads)](
            qkv,
            *(aligned(weight.to(qkv.dtype)) for weight in weights),
            aligned(cos_sin),
            aligned(positions.long()),
            q,
            k,
            v,
            float(dim),
            norm.eps if norm is not None else 0.0,
            Q_HEADS=num_q_heads,
            KV_HEADS=num_kv_heads,
            HALF=dim // 2,
            BLOCK=triton.next_power_of_2(dim // 2),
            NORM=norm is not None,
            num_warps=1,
            **NO_FMA,
            **overlapping(qkv.device),
        )
    return q, k, v


def rope(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """q ``[T, Hq, D]``, k ``[T, Hk, D]``, positions ``[T]`` -> the rotated copies."""
    # As heads of one row; k stands for v too, which is only copied.
    row = torch.cat([q, k, k], dim=1).flatten(1)
    rotated_q, rotated_k, _ = rope_qkv(row, q.shape[1], k.shape[1], None, cos_sin, positions)
    return rotated_q, rotated_k
