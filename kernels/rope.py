"""Rotary position embedding (Su et al. 2021) in the half-split layout that Llama models use.

Contract: elementwise. With ``c, s`` the table's row for the token's position,
``out[i] = x[i] * c[i] - x[i + D/2] * s[i]`` and ``out[i + D/2] = x[i + D/2] * c[i] + x[i] * s[i]``
in fp32, every product and sum rounded (no fma), and rounded to x.dtype once at the end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .attention import write_kv
from .kernel_set import QkNorm, RopeQkv, RopeQkvWrite
from .native.library import library


def rope_table(inv_freq: Tensor, max_pos: int) -> Tensor:
    """inv_freq ``[D/2]`` -> fp32 ``[max_pos, D]``: the cosines, then the sines.

    The angle ``position * inv_freq`` is rounded to fp32, as Hugging Face rounds it; its cosine and
    sine are taken in fp64 and rounded once.
    """
    positions = torch.arange(max_pos, dtype=torch.float32, device=inv_freq.device)
    angles = torch.outer(positions, inv_freq.float()).double()
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


def rope_torch(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """q ``[T, Hq, D]``, k ``[T, Hk, D]``, positions ``[T]`` -> the rotated copies."""
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)

    def rotate(x: Tensor) -> Tensor:
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(
            x.dtype
        )

    return rotate(q), rotate(k)


def rope_native(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """q ``[T, Hq, D]``, k ``[T, Hk, D]``, positions ``[T]`` -> the rotated copies."""

    def rotate(x: Tensor) -> Tensor:
        tokens, heads, dim = x.shape
        wide = x.float()
        if wide.stride()[1:] != (dim, 1):
            wide = wide.contiguous()
        out = torch.empty(tokens, heads, dim)
        library().isobit_rope(
            wide.data_ptr(),
            wide.stride(0),
            cos_sin.data_ptr(),
            positions.data_ptr(),
            out.data_ptr(),
            tokens,
            heads,
            dim,
            torch.get_num_threads(),
        )
        return out.to(x.dtype)

    cos_sin = cos_sin.contiguous()
    positions = positions.long().contiguous()
    return rotate(q), rotate(k)


def split_norm_rope(
    rms_norm: Callable[[Tensor, Tensor, float], Tensor],
    rope: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
) -> RopeQkv:
    """``rope_qkv`` out of a provider's own norm and rotation, one after the other."""

    def rope_qkv(
        qkv: Tensor,
        num_q_heads: int,
        num_kv_heads: int,
        norm: QkNorm | None,
        cos_sin: Tensor,
        positions: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads = qkv.view(len(qkv), -1, cos_sin.shape[-1])
        q, k, v = (
            part.contiguous()
            for part in torch.split(heads, [num_q_heads, num_kv_heads, num_kv_heads], dim=1)
        )
        if norm is not None:
            q, k = rms_norm(q, norm.q, norm.eps), rms_norm(k, norm.k, norm.eps)
        return *rope(q, k, cos_sin, positions), v

    return rope_qkv


def rope_then_write(rope_qkv: RopeQkv) -> RopeQkvWrite:
    """``rope_qkv_write`` out of a provider's ``rope_qkv`` and the write that all share."""

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
        q, k, v = rope_qkv(qkv, num_q_heads, num_kv_heads, norm, cos_sin, positions)
        write_kv(k, v, k_cache, v_cache, slot_mapping)
        return q

    return rope_qkv_write
