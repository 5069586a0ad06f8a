"""``silu(gate) * up`` with ``silu(x) = x / (1 + e^-x)``.

Contract: elementwise in fp32, the exponential our own (``elementary.py``, ``elementary.h``),
rounded to the input's dtype once at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .elementary import exp_f32
from .native.library import library


def silu_mul_torch(gate_up: Tensor) -> Tensor:
    """``[T, 2I]``, the gates first -> ``[T, I]``."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gate / (1.0 + exp_f32(-gate)) * up).to(gate_up.dtype)


def silu_mul_native(gate_up: Tensor) -> Tensor:
    """``[T, 2I]``, the gates first -> ``[T, I]``."""
    wide = gate_up.float().contiguous()
    rows, width = wide.shape
    out = torch.empty(rows, width // 2)
    library().isobit_silu_mul(
        wide.data_ptr(), out.data_ptr(), rows, width // 2, torch.get_num_threads()
    )
    return out.to(gate_up.dtype)
