"""``silu(gate) * up``; contract and bits of ``kernels/activation.py``.

Instructions limit it, not memory: no step is taken whose result another one covers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .elementary import NO_FMA, exp_in_range
from .launch import aligned

_BLOCK = 1024


@triton.jit
def _silu_mul(gate_up_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate_at = gate_up_ptr + row * 2 * WIDTH + i
    gate = tl.load(gate_at, mask=i < WIDTH, other=0.0).to(tl.float32)
    up = tl.load(gate_at + WIDTH, mask=i < WIDTH, other=0.0).to(tl.float32)
    # Below -87, e^x is lost beside the 1; and a NaN is the gate's own. Times -1 costs nothing here,
    # and a minus is a subtraction.
    e = exp_in_range(tl.maximum(gate * -1.0, -87.0))
    e = tl.where(gate < -88.72283, float("inf"), e)
    out = tl.div_rn(gate, 1.0 + e) * up
    tl.store(out_ptr + row * WIDTH + i, out.to(out_ptr.dtype.element_ty), mask=i < WIDTH)


def silu_mul(gate_up: Tensor) -> Tensor:
    """``[T, 2I]``, the gates first -> ``[T, I]``."""
    gate_up = aligned(gate_up)
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    if out.numel():
        _silu_mul[(rows, triton.cdiv(width, _BLOCK))](
            gate_up,
            out,
            WIDTH=width,
            BLOCK=_BLOCK,
            num_warps=4,
            **NO_FMA,
        )
    return out
