"""RMS normalisation over the last axis (Zhang & Sennrich 2019), rounded as Hugging Face does.

In fp32 ``x * (1 / sqrt(sum(x^2) / H + eps))``, rounded to x.dtype, times the weight in x.dtype.

Contract (native): ``x[i]^2`` goes by fma into lane ``i mod 16``, i ascending; the 16 lanes are
added in halves (0+8, 1+9, …, then 0+4, …). Contract (torch): the squares are added as
``elementary.tree_sum`` does. Divisions are IEEE in both, and so is the native square root; torch's
on a CPU is its library's, which may be an ulp off.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .elementary import tree_sum
from .native.library import library


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x ``[..., H]``, weight ``[H]`` -> ``[..., H]`` in x.dtype."""
    wide = x.float()
    mean_square = tree_sum(wide * wide) / x.shape[-1]
    inverse = 1.0 / torch.sqrt(mean_square + eps)
    return (wide * inverse.unsqueeze(-1)).to(x.dtype) * weight.to(x.dtype)


def rms_norm_native(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x ``[..., H]``, weight ``[H]`` -> ``[..., H]`` in x.dtype."""
    wide = x.float().contiguous()
    out = torch.empty_like(wide)
    hidden = x.shape[-1]
    library().isobit_rms_norm(
        wide.data_ptr(),
        out.data_ptr(),
        wide.numel() // hidden,
        hidden,
        eps,
        torch.get_num_threads(),
    )
    return out.to(x.dtype) * weight.to(x.dtype)


def add_rms_norm_torch(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """-> (rms_norm(x + residual), x + residual); the sum is rounded to x.dtype first."""
    total = x + residual
    return rms_norm_torch(total, weight, eps), total


def add_rms_norm_native(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """-> (rms_norm(x + residual), x + residual); the sum is rounded to x.dtype first."""
    total = x + residual
    return rms_norm_native(total, weight, eps), total
