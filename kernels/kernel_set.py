"""The ops a model is made of, and the bundle in which one provider offers them all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
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


@dataclass(frozen=True, slots=True)
class QkNorm:
    """The RMS norm over each head of q and of k before RoPE: weights ``[D]``, and epsilon."""

    q: Tensor
    k: Tensor
    eps: float


RopeQkv = Callable[[Tensor, int, int, QkNorm | None, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
RopeQkvWrite = Callable[
    [Tensor, int, int, QkNorm | None, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Draw:
    """How each of ``R`` rows is sampled, on the logits' device.

    temperatures: fp32 ``[R]``; 0 takes the highest logit
    top_k:        int64 ``[R]``; the vocabulary's size where it is off
    top_p:        fp64 ``[R]``; 1 where it is off
    min_p:        fp32 ``[R]``; 0 where it is off
    filtered:     int64 ``[F]``, the rows, none of them greedy, in which one of these three is on
    seeds, choices, positions: int64 ``[R]``, the noise's key
    """

    temperatures: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    filtered: Tensor
    seeds: Tensor
    choices: Tensor
    positions: Tensor


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
    rope_qkv:        (qkv ``[T, (Hq + 2 Hk) D]``, Hq, Hk, QkNorm or None, cos_sin, positions)
                     -> q, k, v ``[T, heads, D]``, contiguous, q and k normed and rotated
    rope_qkv_write:  (what ``rope_qkv`` takes, k_cache, v_cache, slot_mapping) -> q; k and v go to
                     slot ``page * page_size + offset``, the caches ``[P, page_size, Hk, D]``
    silu_mul:        gate_up ``[T, 2I]`` -> silu(gate) * up ``[T, I]``
    log_softmax:     fp32 ``[R, V]`` -> fp32 ``[R, V]``
    log_normalisers: fp32 ``[R, V]`` -> (maxima, log totals: fp32 ``[R]``), such that log_softmax is
                     (logit - maximum) - log total, each step rounded to fp32; None where the
                     sampler takes ``log_softmax`` whole
    gumbel:          (seeds, choices, positions: int64 ``[R]``, vocab_size) -> fp32 ``[R, V]``
    choose:          (edited logits fp32 ``[R, V]``, Draw) -> (token ids int64 ``[R]``, their scores
                     fp32 ``[R]``, not finite where no token is possible); None where the sampler
                     does this out of ``log_softmax`` and ``gumbel``
    paged_attention: (q ``[T, Hq, D]``, k_cache, v_cache, block_table int32 ``[B, max_pages]``,
                     cu_seqlens_q int32 ``[B + 1]``, seq_lens int32 ``[B]``, scale, out) -> None
    prepare:         (the layers' linears, the head, rows of a step at most, rows of the head at
                     most) -> None: choose and compile now what a step would wait for; nothing for
                     a provider that chooses nothing
    demoted:         (device) -> a line for each way to compute an op there that gave other bits and
                     is not used; empty for a provider that has one way
    """

    name: str
    linear: Callable[[Tensor], Linear]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    add_rms_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    rope: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    rope_qkv: RopeQkv
    rope_qkv_write: RopeQkvWrite
    silu_mul: Callable[[Tensor], Tensor]
    log_softmax: Callable[[Tensor], Tensor]
    log_normalisers: Callable[[Tensor], tuple[Tensor, Tensor]] | None
    gumbel: Callable[[Tensor, Tensor, Tensor, int], Tensor]
    choose: Callable[[Tensor, Draw], tuple[Tensor, Tensor]] | None
    paged_attention: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float, Tensor], None]
    prepare: Callable[[Iterable[Linear], Linear, int, int], None] = lambda *_: None
    demoted: Callable[[torch.device], Sequence[str]] = lambda device: ()
