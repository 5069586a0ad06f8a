"""Attention of the decoding sequences: a program a split, then one that folds a row's splits.

The contract is in ``online_softmax.py``. The states of the splits go through memory in fp32, which
changes no bit of them. Which program computes a split, and how many there are, is free.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .online_softmax import attend_split, fold_split, normalise
from .tiling import Scoring, Tiling, kernel_arguments, padded


@dataclass(frozen=True, slots=True)
class Partials:
    """Workspace for the states of all splits, fp32.

    acc:   ``[sequences, splits, q_heads, head_dim]``
    stats: ``[sequences, splits, q_heads, 2]``, each state's m and l
    """

    acc: Tensor
    stats: Tensor

    @classmethod
    def allocate(
        cls, num_seqs: int, splits: int, num_q_heads: int, head_dim: int, device: torch.device
    ) -> Partials:
        def empty(width: int) -> Tensor:
            shape = (num_seqs, splits, num_q_heads, width)
            return torch.empty(shape, dtype=torch.float32, device=device)

        return cls(empty(head_dim), empty(2))


def attend_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    num_decodes: int,
    seq_lens: Tensor,
    block_table: Tensor,
    scoring: Scoring,
    tiling: Tiling,
    partials: Partials,
    out: Tensor,
) -> None:
    """Fill the first ``num_decodes`` rows of ``out``; shapes as in ``backends/base.py``.

    :param partials: room for as many sequences, and for every split of the longest
    :raises ValueError: caches whose pages are not contiguous, or of unequal strides
    """
    num_q_heads, num_kv_heads = q.shape[1], k_cache.shape[2]
    splits = partials.acc.shape[1]
    shared = kernel_arguments(q, k_cache, v_cache, scoring, tiling)
    wanted = -(-tiling.decode_programs // (num_decodes * num_kv_heads))
    _split_kernel[(num_kv_heads, num_decodes, min(splits, wanted))](
        q,
        k_cache,
        v_cache,
        partials.acc,
        partials.stats,
        seq_lens,
        block_table,
        block_table.stride(0),
        splits,
        BLOCK_M=max(tiling.decode.rows, padded(num_q_heads // num_kv_heads)),
        num_warps=tiling.decode.warps,
        num_stages=tiling.decode.stages,
        **shared,
    )
    _fold_kernel[(num_q_heads, num_decodes)](
        partials.acc,
        partials.stats,
        out,
        seq_lens,
        splits,
        BLOCK_N=shared["BLOCK_N"],
        BLOCK_D=shared["BLOCK_D"],
        HEAD_DIM=shared["HEAD_DIM"],
        SPLIT=shared["SPLIT"],
        WINDOW=shared["WINDOW"],
        num_warps=1,
        enable_fp_fusion=False,
    )


@triton.jit
def _first_position(kv_len, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr):
    """Where the first tile begins that a sequence's last row sees."""
    begin = kv_len * 0
    if WINDOW > 0:
        begin = tl.maximum(kv_len - WINDOW, 0) // BLOCK_N * BLOCK_N
    return begin


@triton.jit(do_not_specialize=["table_stride", "max_splits"])
def _split_kernel(
    q,
    k_cache,
    v_cache,
    partial_acc,
    partial_stats,
    seq_lens,
    block_table,
    table_stride,
    max_splits,
    page_stride,
    factor,
    cap_factor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
):
    kv_head = tl.program_id(0)
    seq = tl.program_id(1).to(tl.int64)
    kv_len = tl.load(seq_lens + seq)
    begin = _first_position(kv_len, BLOCK_N, WINDOW)

    # Rows past the group repeat its last head, and are not stored.
    rows = tl.arange(0, BLOCK_M)
    heads = kv_head * GROUP + tl.minimum(rows, GROUP - 1)
    dims = tl.arange(0, BLOCK_D)
    in_head = (dims < HEAD_DIM)[None, :]
    stored = rows < GROUP
    places = heads[:, None] * HEAD_DIM + dims[None, :]
    queries = tl.load(q + seq * (NUM_KV_HEADS * GROUP * HEAD_DIM) + places, mask=in_head, other=0.0)

    first = begin // SPLIT + tl.program_id(2)
    for split in range(first, tl.cdiv(kv_len, SPLIT), tl.num_programs(2)):
        m, total, acc = attend_split(
            queries,
            tl.zeros([BLOCK_M], tl.int32) + (kv_len - 1),
            kv_len - 1,
            kv_len - 1,
            tl.maximum(split * SPLIT, begin),
            tl.minimum(split * SPLIT + SPLIT, kv_len),
            kv_len,
            k_cache + kv_head * HEAD_DIM,
            v_cache + kv_head * HEAD_DIM,
            block_table + seq * table_stride,
            page_stride,
            factor,
            cap_factor,
            BLOCK_M,
            BLOCK_N,
            BLOCK_D,
            HEAD_DIM,
            NUM_KV_HEADS * HEAD_DIM,
            PAGE,
            WINDOW,
            SOFT_CAP,
        )
        at = (seq * max_splits + split) * (NUM_KV_HEADS * GROUP)
        tl.store(partial_acc + at * HEAD_DIM + places, acc, mask=stored[:, None] & in_head)
        tl.store(partial_stats + (at + heads) * 2, m, mask=stored)
        tl.store(partial_stats + (at + heads) * 2 + 1, total, mask=stored)


@triton.jit(do_not_specialize=["max_splits"])
def _fold_kernel(
    partial_acc,
    partial_stats,
    out,
    seq_lens,
    max_splits,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
):
    head = tl.program_id(0)
    num_q_heads = tl.num_programs(0)
    seq = tl.program_id(1).to(tl.int64)
    kv_len = tl.load(seq_lens + seq)
    begin = _first_position(kv_len, BLOCK_N, WINDOW)
    dims = tl.arange(0, BLOCK_D)[None, :]
    one = tl.zeros([1], tl.int32)

    m = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([1, BLOCK_D], tl.float32)
    for split in range(begin // SPLIT, tl.cdiv(kv_len, SPLIT)):
        at = (seq * max_splits + split) * num_q_heads + head
        split_acc = tl.load(partial_acc + at * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0)
        split_m = tl.load(partial_stats + at * 2 + one)
        split_total = tl.load(partial_stats + at * 2 + 1 + one)
        m, total, acc = fold_split(m, total, acc, split_m, split_total, split_acc)

    place = (seq * num_q_heads + head) * HEAD_DIM + dims
    result = normalise(total, acc).to(out.dtype.element_ty)
    tl.store(out + place, result, mask=dims < HEAD_DIM)
