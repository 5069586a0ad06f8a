"""exp, log and sums out of operations that IEEE 754 rounds exactly.

``torch.exp``, ``torch.log`` and ``torch.sum`` treat the vectorised body and the tail of a tensor
differently, and where the tail begins moves with the shape and the thread count. These functions
use only elementwise add, multiply, divide, round, compare and integer steps, so the result of an
element depends on that element alone, on any device.
"""

from __future__ import annotations

import torch
from torch import Tensor

EXP_UNDERFLOW = -87.0
EXP_OVERFLOW = 88.72283
_LOG2_E = 1.4426950408889634
_LN2_F32_HIGH = 0.693359375  # 9 bits: times any exponent it is exact
_LN2_F32_LOW = -2.12194440054690583e-4
_LN2_F64_HIGH = float.fromhex("0x1.62e42feep-1")
_LN2_F64_LOW = float.fromhex("0x1.a39ef35793c76p-33")
_SQRT_HALF_BITS = 0x3FE6A09E << 32
_EXP_TAYLOR = (1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)
_ATANH_SERIES = (1 / 19, 1 / 17, 1 / 15, 1 / 13, 1 / 11, 1 / 9, 1 / 7, 1 / 5, 1 / 3)


def _polynomial(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Horner's rule, highest power first."""
    result = torch.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        result = result * x + c
    return result


def exp_f32(x: Tensor) -> Tensor:
    """e^x for fp32, within 2 ulp; 0 below -87 (so never subnormal), inf above 88.72283."""
    clamped = x.clamp(EXP_UNDERFLOW, EXP_OVERFLOW)
    n = torch.round(clamped * _LOG2_E)
    r = (clamped - n * _LN2_F32_HIGH) - n * _LN2_F32_LOW
    p = _polynomial(r, _EXP_TAYLOR)
    # Two steps: n reaches 128, and 2^128 is no fp32 number.
    half = n.to(torch.int32) >> 1
    rest = n.to(torch.int32) - half
    result = p * _power_of_two(half) * _power_of_two(rest)
    result = torch.where(x < EXP_UNDERFLOW, 0.0, result)
    result = torch.where(x > EXP_OVERFLOW, torch.inf, result)
    return torch.where(x.isnan(), x, result)


def _power_of_two(n: Tensor) -> Tensor:
    """2^n as fp32, for int32 n in -126 … 127."""
    return ((n + 127) << 23).view(torch.float32)


def log_f64(x: Tensor) -> Tensor:
    """ln x for positive, normal fp64, to 2e-15 of itself.

    With x = m 2^k and m in [sqrt(1/2), sqrt(2)), ln m = 2 atanh((m - 1) / (m + 1)).
    """
    bits = x.view(torch.int64)
    k = (bits - _SQRT_HALF_BITS) >> 52
    m = (bits - (k << 52)).view(torch.float64)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    s2 = s + s
    k_f64 = k.to(torch.float64)
    low = s2 * (z * _polynomial(z, _ATANH_SERIES)) + k_f64 * _LN2_F64_LOW
    return k_f64 * _LN2_F64_HIGH + (s2 + low)


def tree_sum(x: Tensor) -> Tensor:
    """Sum over the last axis, which is dropped: padded with zeros to a power of two, then halved.

    The order of the additions is fixed by the axis's length alone.
    """
    width = 1 << max(x.shape[-1] - 1, 0).bit_length()
    x = torch.nn.functional.pad(x, (0, width - x.shape[-1]))
    while width > 1:
        width //= 2
        x = x[..., :width] + x[..., width:]
    return x[..., 0]
