"""The ops a model is made of, and the bundle in which one provider offers them all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Linear(Protocol):
    """A prepared weight ``[out_features, in_features]``: ``y = x @ W^T``, no bias."""

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...

    def __call__(self, x: Tensor) -> Tensor:
        """``[T, K]`` in the model's dtype -> ``[T, N]`` in the same dtype."""
        ...

    def accumulators(self, x: Tensor) -> Tensor:
        """``[T, K]`` -> fp32 ``[T, N]``, the sums before they are rounded to the model's dtype."""
        ...


@dataclass(frozen=True)
class KernelSet:
    """One provider's implementation of every op.

    Each op keeps a contract, stated in the op's own file: the bits of a row depend on that row
    (and, for attention, on its own sequence) alone, never on the batch or the thread count.

    linear:          weight ``[N, K]`` fp32 or bf16 -> ``Linear``
    rms_norm:        (x ``[..., H]``, weight ``[H]``, eps) -> x.dtype
    add_rms_norm:    (x, residual, weight, eps) -> (rms_norm(x + residual), x + residual)
    rope:            (q ``[T, Hq, D]``, k ``[T, Hk, D]``, cos_sin fp32 ``[max_pos, D]``,
                     positions int64 ``[T]``) -> rotated (q, k)
    silu_mul:        gate_up ``[T, 2I]`` -> silu(gate) * up ``[T, I]``
    log_softmax:     fp32 ``[R, V]`` -> fp32 ``[R, V]``
    gumbel:          (seeds, choices, positions: int64 ``[R]``, vocab_size) -> fp32 ``[R, V]``
    write_kv:        (k ``[T, Hk, D]``, v, k_cache ``[P, page_size, Hk, D]``, v_cache,
                     slot_mapping int64 ``[T]``) -> None
    paged_attention: (q ``[T, Hq, D]``, k_cache, v_cache, block_table int32 ``[B, max_pages]``,
                     cu_seqlens_q int32 ``[B + 1]``, seq_lens int32 ``[B]``, scale, out) -> None
    """

    name: str
    linear: Callable[[Tensor], Linear]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    rope: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    silu_mul: Callable[[Tensor], Tensor]
    log_softmax: Callable[[Tensor], Tensor]
    gumbel: Callable[[Tensor, Tensor, Tensor, int], Tensor]
    write_kv: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
    paged_attention: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float, Tensor], None]
