"""torch's own kernels as they come: fast where the library is, and under no contract.

This is what other engines call their default mode; on CUDA only the products are taken from here
(``dispatch.py``). Results may depend on the batch, the chunking and the thread count, so the engine
takes it only under ``deterministic=False``; it is also the yardstick for what determinism costs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


class LibraryLinear:
    """``F.linear`` on the weight as it is."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self.out_features, self.in_features = weight.shape

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self._weight)

    def accumulators(self, x: Tensor) -> Tensor:
        """The product rounded to the weight's dtype: the library does not give its sums."""
        return functional.linear(x, self._weight).float()


def rms_norm_library(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return functional.rms_norm(x, (x.shape[-1],), weight, eps)


def add_rms_norm_library(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm_library(total, weight, eps), total


def silu_mul_library(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def log_softmax_library(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1)


def paged_attention_library(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    scale: float,
    out: Tensor,
) -> None:
    """``scaled_dot_product_attention`` on each sequence's gathered pages."""
    starts = cu_seqlens_q.tolist()
    for index, kv_len in enumerate(seq_lens.tolist()):
        rows = slice(starts[index], starts[index + 1])
        num_rows = rows.stop - rows.start
        pages = block_table[index, : -(-kv_len // k_cache.shape[1])].long()
        k = k_cache[pages].flatten(0, 1)[:kv_len].transpose(0, 1)
        v = v_cache[pages].flatten(0, 1)[:kv_len].transpose(0, 1)
        positions = torch.arange(kv_len - num_rows, kv_len, device=q.device)
        mask = torch.arange(kv_len, device=q.device) <= positions[:, None]
        attended = functional.scaled_dot_product_attention(
            q[rows].transpose(0, 1), k, v, attn_mask=mask, scale=scale, enable_gqa=True
        )
        out[rows] = attended.transpose(0, 1)
