"""Attention in float64, and how far from it an answer may be."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .scenario import Geometry
from .values import Rows

_BLOCK = 256
_FP32 = torch.finfo(torch.float32).eps


@dataclass(frozen=True, slots=True)
class Expected:
    """``out`` and ``bound``, both float64 ``[rows, q_heads, head_dim]``."""

    out: Tensor
    bound: Tensor


def attend(rows: Rows, positions: Tensor, geometry: Geometry) -> Expected:
    """What the rows at ``positions`` (int64) must give, and the largest error allowed.

    The bound has three parts: the output's own rounding; the rounding of the weights to the dtype
    and of an fp32 sum over them; and what an error of a score, of a few fp32 roundings over its
    products, does to its weight.
    """
    blocks = [positions[i : i + _BLOCK] for i in range(0, len(positions), _BLOCK)]
    parts = [_block(rows, part, geometry) for part in blocks]
    return Expected(
        torch.cat([part.out for part in parts]), torch.cat([part.bound for part in parts])
    )


def _block(rows: Rows, positions: Tensor, geometry: Geometry) -> Expected:
    seen = int(positions.max()) + 1
    group = geometry.num_q_heads // geometry.num_kv_heads
    q = rows.q[positions].double()
    k = rows.k[:seen].double().repeat_interleave(group, dim=1)
    v = rows.v[:seen].double().repeat_interleave(group, dim=1)
    scale = geometry.head_dim**-0.5
    scores = torch.einsum("rhd,khd->hrk", q, k) * scale
    # Summed products at full magnitude bound the rounding of a score.
    size = torch.einsum("rhd,khd->hrk", q.abs(), k.abs()) * scale
    if geometry.logit_soft_cap is not None:
        scores = geometry.logit_soft_cap * torch.tanh(scores / geometry.logit_soft_cap)
    at = torch.arange(seen, device=positions.device)
    hidden = at[None, :] > positions[:, None]
    if geometry.sliding_window is not None:
        hidden |= at[None, :] <= positions[:, None] - geometry.sliding_window
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    out = torch.einsum("hrk,khd->rhd", weights, v)
    dtype = getattr(torch, geometry.dtype)
    # The products of a score are rounded in fp32, and the score once more by each step after it.
    score_error = 8 * _FP32 * size.masked_fill(hidden, 0)
    relative = 2 * score_error + 2 * torch.finfo(dtype).eps + (8 + seen**0.5) * _FP32
    bound = torch.einsum("hrk,khd->rhd", weights * relative, v.abs())
    # An error of one weight moves the others through the sum that divides them.
    mean = (weights * relative).sum(-1).T[:, :, None]
    bound = bound + mean * torch.einsum("hrk,khd->rhd", weights, v.abs())
    bound = bound + torch.finfo(dtype).eps * out.abs() + torch.finfo(dtype).tiny
    return Expected(out, bound)
