"""exp and log on the device: the bits of ``kernels/elementary.py``.

Every step is one rounded operation, or an exact one that is done otherwise. Kernels that call these
are launched with ``enable_fp_fusion=False``, which keeps the compiler from joining a product and a
sum into one fma.
"""

from __future__ import annotations

import triton
import triton.language as tl

NO_FMA = {"enable_fp_fusion": False}
"""Launch option of every kernel whose bits are those of separately rounded steps."""


@triton.jit
def exp_in_range(x):
    """e^x for a block of fp32 from -87 to 88.72283; beyond, anything."""
    # Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, and leaves it in the low bits.
    shifted = x * 1.4426950408889634 + 12582912.0
    n = shifted - 12582912.0
    r = tl.fma(n, -0.693359375, x) - n * -2.12194440054690583e-4  # the fma's product is exact
    p = r * 0.0001984126984126984 + 0.001388888888888889
    p = p * r + 0.008333333333333333
    p = p * r + 0.041666666666666664
    p = p * r + 0.16666666666666666
    p = p * r + 0.5
    p = p * r + 1.0
    p = p * r + 1.0
    # Times 2^n: onto the exponent. The shift drops all of ``shifted`` but n.
    bits = p.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def exp_f32(x):
    """e^x for a block of fp32; 0 below -87, inf above 88.72283."""
    result = exp_in_range(tl.minimum(tl.maximum(x, -87.0), 88.72283))
    result = tl.where(x < -87.0, 0.0, result)
    result = tl.where(x > 88.72283, float("inf"), result)
    return tl.where(x == x, result, x)


@triton.jit
def log_f64(x):
    """ln x for a block of positive, normal fp64."""
    bits = x.to(tl.int64, bitcast=True)
    k = (bits - 0x3FE6A09E00000000) >> 52
    m = (bits - (k << 52)).to(tl.float64, bitcast=True)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    one = tl.full(z.shape, 1.0, tl.float64)  # a plain number would be rounded to fp32
    p = z * (one / 19.0) + one / 17.0
    p = p * z + one / 15.0
    p = p * z + one / 13.0
    p = p * z + one / 11.0
    p = p * z + one / 9.0
    p = p * z + one / 7.0
    p = p * z + one / 5.0
    p = p * z + one / 3.0
    s2 = s + s
    k_f64 = k.to(tl.float64)
    ln2_high = tl.full(z.shape, 0x3FE62E42FEE00000, tl.int64).to(tl.float64, bitcast=True)
    ln2_low = tl.full(z.shape, 0x3DEA39EF35793C76, tl.int64).to(tl.float64, bitcast=True)
    low = s2 * (z * p) + k_f64 * ln2_low
    return k_f64 * ln2_high + (s2 + low)
