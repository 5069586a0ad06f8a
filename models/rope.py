"""Rotary position embedding: which angle each half-dimension turns by, per position.

RoPE is Su et al., "RoFormer" (2021). Bits match Hugging Face's ``modeling_rope_utils`` for the
inverse frequencies, so a checkpoint sees the angles that it was trained with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

ROPE_TYPES = ("default", "linear", "llama3")
"""The ``rope_type`` values that can be served; ``default`` is no scaling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How a model stretches its context beyond what it was first trained for.

    ``linear`` uses ``factor`` alone; the other fields belong to ``llama3``.
    """

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Radians per position of each rotated pair: fp32 ``[head_dim / 2]``.

    ``linear`` is Chen et al., "Extending Context Window ... via Positional Interpolation" (2023);
    ``llama3`` is the frequency-dependent interpolation of Llama 3.1's reference code.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    inv_freq = 1.0 / (theta**exponents)
    if scaling is None:
        return inv_freq
    if scaling.rope_type == "linear":
        return inv_freq / scaling.factor
    return _llama3(inv_freq, scaling)


def _llama3(inv_freq: Tensor, scaling: RopeScaling) -> Tensor:
    """Keep short wavelengths, divide long ones by the factor, blend the ones between."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    context = scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / inv_freq
    blend = (context / wavelength - low) / (high - low)
    blended = (1 - blend) * inv_freq / scaling.factor + blend * inv_freq
    stretched = torch.where(wavelength > context / low, inv_freq / scaling.factor, blended)
    return torch.where(wavelength < context / high, inv_freq, stretched)


def cos_sin_table(
    head_dim: int, theta: float, scaling: RopeScaling | None, max_positions: int
) -> Tensor:
    """fp32 ``[max_positions, head_dim]``: cosines in the first half of a row, sines in the second.

    Angles are fp32 products, as in Hugging Face. Their cosines are taken in fp64 and rounded once:
    fp32 vector libraries may treat the tail of an array differently, and then a row's bits would
    depend on ``max_positions``.
    """
    positions = torch.arange(max_positions, dtype=torch.float32)
    angles = positions[:, None] * inverse_frequencies(head_dim, theta, scaling)
    wide = angles.to(torch.float64)
    return torch.cat((wide.cos(), wide.sin()), dim=-1).to(torch.float32)
