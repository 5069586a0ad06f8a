"""From one row of the QKV product to q, k and v: split, QK norm where the model has one, RoPE.

Contract: a head's bits depend on that head and its position alone. The norm rounds as ``norm.py``
does. The squares of the head's two halves are added pairwise, and padded with zeros to a power of
two. While there are more than 32, adjacent ones are added; then the second half is added to the
first until one is left. Every step adds two numbers, so the order does not depend on the compiler.
RoPE is elementwise and has the bits of ``kernels/rope.py``. A program takes several heads of one
token, which changes no bit.

K and V go to rows of their own, or straight to their slots of the paged cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernel_set import QkNorm
from .elementary import NO_FMA
from .launch import aligned

_PAIRS = 512  # of a program: 16 bytes of either half for each thread of two warps


@triton.jit
def _sums(x, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of each of the rows ``[HEADS, BLOCK]``, in the contract's order: ``[HEADS, 1]``."""
    for fold in tl.static_range(1, 11):
        if BLOCK >> fold >= 32:
            x = tl.sum(tl.reshape(x, (HEADS, BLOCK >> fold, 2)), axis=2)
        elif BLOCK >> fold:
            x = tl.sum(tl.reshape(x, (HEADS, 2, BLOCK >> fold)), axis=1)
    return tl.reshape(x, (HEADS, 1))


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
    slots_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    dim,
    eps,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    NORM: tl.constexpr,
    SLOTS: tl.constexpr,
):
    DIM: tl.constexpr = 2 * HALF
    Q_PARTS: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    KV_PARTS: tl.constexpr = (KV_HEADS + HEADS - 1) // HEADS
    PARTS: tl.constexpr = Q_PARTS + 2 * KV_PARTS
    token = (tl.program_id(0) // PARTS).to(tl.int64)
    part = tl.program_id(0) % PARTS
    position = tl.load(positions_ptr + token)
    kv_row = tl.load(slots_ptr + token) if SLOTS else token
    row = qkv_ptr + token * (Q_HEADS + 2 * KV_HEADS) * DIM
    if part < Q_PARTS:
        first_head = part * HEADS
        to = q_ptr + token * Q_HEADS * DIM
        weight_ptr = q_weight_ptr
    elif part < Q_PARTS + KV_PARTS:
        first_head = (part - Q_PARTS) * HEADS
        row += Q_HEADS * DIM
        to = k_ptr + kv_row * KV_HEADS * DIM
        weight_ptr = k_weight_ptr
    else:
        first_head = (part - Q_PARTS - KV_PARTS) * HEADS
        row += (Q_HEADS + KV_HEADS) * DIM
        to = v_ptr + kv_row * KV_HEADS * DIM
        weight_ptr = k_weight_ptr
    head = first_head + tl.arange(0, HEADS)[:, None]
    i = tl.arange(0, BLOCK)[None, :]
    inside = (head < tl.where(part < Q_PARTS, Q_HEADS, KV_HEADS)) & (i < HALF)
    at = head * DIM + i
    a_row = head * 0 + i  # of as many heads, so that all blocks lie alike in the registers
    angles = cos_sin_ptr + position * DIM + a_row
    turned = inside & (tl.zeros_like(head) + part < Q_PARTS + KV_PARTS)
    cos = tl.load(angles, mask=turned, other=0.0)
    sin = tl.load(angles + HALF, mask=turned, other=0.0)
    first = tl.load(row + at, mask=inside, other=0.0)
    second = tl.load(row + at + HALF, mask=inside, other=0.0)
    if part < Q_PARTS + KV_PARTS:
        a, b = first.to(tl.float32), second.to(tl.float32)
        if NORM:
            low = tl.load(weight_ptr + a_row, mask=inside, other=0.0)
            high = tl.load(weight_ptr + a_row + HALF, mask=inside, other=0.0)
            mean_square = tl.div_rn(_sums(a * a + b * b, HEADS, BLOCK), dim)
            inverse = tl.div_rn(1.0, tl.sqrt_rn(mean_square + eps))
            a = _half_normed(a, inverse, low).to(tl.float32)
            b = _half_normed(b, inverse, high).to(tl.float32)
        first = (a * cos - b * sin).to(first.dtype)
        second = (b * cos + a * sin).to(second.dtype)
    tl.store(to + at, first, mask=inside)
    tl.store(to + at + HALF, second, mask=inside)


def rope_qkv(
    qkv: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    norm: QkNorm | None,
    cos_sin: Tensor,
    positions: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """qkv ``[T, (Hq + 2 Hk) D]``: q's heads, then k's, then v's -> q, k, v ``[T, heads, D]``."""
    k, v = (qkv.new_empty(qkv.shape[0], num_kv_heads, cos_sin.shape[-1]) for _ in range(2))
    q = _launch(qkv, num_q_heads, num_kv_heads, norm, cos_sin, positions, k, v, None)
    return q, k, v


def rope_qkv_write(
    qkv: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    norm: QkNorm | None,
    cos_sin: Tensor,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    """As ``rope_qkv``, but k and v go to their slots of the caches -> q ``[T, Hq, D]``.

    k_cache, v_cache: ``[num_pages, page_size, Hk, D]``, contiguous
    """
    return _launch(
        qkv, num_q_heads, num_kv_heads, norm, cos_sin, positions, k_cache, v_cache, slot_mapping
    )


def _launch(
    qkv: Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    norm: QkNorm | None,
    cos_sin: Tensor,
    positions: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor | None,
) -> Tensor:
    """q; k and v are filled in the rows ``[Hk, D]`` that ``slots`` names, or else one a token."""
    qkv, positions = aligned(qkv), aligned(positions.long())
    tokens, dim = qkv.shape[0], cos_sin.shape[-1]
    q = qkv.new_empty(tokens, num_q_heads, dim)
    weights = (norm.q, norm.k) if norm is not None else (qkv, qkv)
    block = triton.next_power_of_2(dim // 2)
    heads = min(triton.next_power_of_2(num_q_heads), max(1, _PAIRS // block))
    parts = triton.cdiv(num_q_heads, heads) + 2 * triton.cdiv(num_kv_heads, heads)
    if tokens:
        _rope_qkv[(tokens * parts,)](
            qkv,
            *(aligned(weight.to(qkv.dtype)) for weight in weights),
            aligned(cos_sin),
            positions,
            positions if slots is None else aligned(slots),
            q,
            k,
            v,
            float(dim),
            norm.eps if norm is not None else 0.0,
            Q_HEADS=num_q_heads,
            KV_HEADS=num_kv_heads,
            HALF=dim // 2,
            HEADS=heads,
            BLOCK=block,
            NORM=norm is not None,
            SLOTS=slots is not None,
            num_warps=2,
            **NO_FMA,
        )
    return q


def rope(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """q ``[T, Hq, D]``, k ``[T, Hk, D]``, positions ``[T]`` -> the rotated copies."""
    # As heads of one row; k stands for v too, which is only copied.
    row = torch.cat([q, k, k], dim=1).flatten(1)
    rotated_q, rotated_k, _ = rope_qkv(row, q.shape[1], k.shape[1], None, cos_sin, positions)
    return rotated_q, rotated_k
