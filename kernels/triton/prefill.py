"""Attention of the prefilling sequences: a program a tile of query rows, over all of its splits.

A tile's rows are (token, head of the group), tokens first, so that every head of a group reads K
and V once. The contract is in ``online_softmax.py``; a finished split is folded at once. Where
``tiling.hopper`` says so, ``prefill_hopper.py`` computes the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .online_softmax import attend_span, normalise
from .tiling import Scoring, Tiling, kernel_arguments


def prefill_work(
    query_lens: Sequence[int], kv_lens: Sequence[int], first: int, group: int, rows: int
) -> list[tuple[int, int]]:
    """The (sequence, tile of query rows) of every program, from sequence ``first`` on.

    Those with the longest walk come first, so that the card is not left waiting for one of them.
    """
    work = [
        (min((tile + 1) * rows // group, query_lens[b]) - query_lens[b] + kv_lens[b], b, tile)
        for b in range(first, len(query_lens))
        for tile in range(-(-query_lens[b] * group // rows))
    ]
    work.sort(key=lambda item: -item[0])
    return [(b, tile) for _, b, tile in work]


def attend_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    work: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    block_table: Tensor,
    scoring: Scoring,
    tiling: Tiling,
    out: Tensor,
) -> None:
    """Fill the rows of ``out`` that ``work`` names; shapes as in ``backends/base.py``.

    :param work: int32 ``[programs, 2]``, ``prefill_work`` on the device
    :raises ValueError: caches whose pages are not contiguous, or of unequal strides
    """
    if tiling.hopper:
        # Imported here: older versions of Triton lack what it is written in.
        from .prefill_hopper import attend_prefill_hopper

        attend_prefill_hopper(
            q,
            k_cache,
            v_cache,
            work,
            cu_seqlens_q,
            seq_lens,
            block_table,
            scoring,
            tiling,
            out,
        )
        return
    _prefill_kernel[(work.shape[0], k_cache.shape[2])](
        q,
        k_cache,
        v_cache,
        out,
        work,
        cu_seqlens_q,
        seq_lens,
        block_table,
        block_table.stride(0),
        BLOCK_M=tiling.prefill.rows,
        FLAT=tiling.flat or scoring.window is not None,
        num_warps=tiling.prefill.warps,
        num_stages=tiling.prefill.stages,
        **kernel_arguments(q, k_cache, v_cache, scoring, tiling),
    )


@triton.jit(do_not_specialize=["table_stride"])
def _prefill_kernel(
    q,
    k_cache,
    v_cache,
    out,
    work,
    cu_seqlens_q,
    seq_lens,
    block_table,
    table_stride,
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
    WIDE: tl.constexpr,
    NEAR_SPLIT: tl.constexpr,
    NEAR_END: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    FLAT: tl.constexpr,
):
    seq = tl.load(work + 2 * tl.program_id(0))
    first_row = tl.load(work + 2 * tl.program_id(0) + 1) * BLOCK_M
    kv_head = tl.program_id(1)
    token_base = tl.load(cu_seqlens_q + seq).to(tl.int64)
    query_len = tl.load(cu_seqlens_q + seq + 1) - token_base.to(tl.int32)
    kv_len = tl.load(seq_lens + seq)

    # Rows past the last one repeat the last token: they read what exists and are not stored.
    rows = first_row + tl.arange(0, BLOCK_M)
    tokens = tl.minimum(rows // GROUP, query_len - 1)
    before = kv_len - query_len
    first_pos = before + first_row // GROUP
    last_pos = before + tl.minimum((first_row + BLOCK_M - 1) // GROUP, query_len - 1)
    dims = tl.arange(0, BLOCK_D)
    heads = kv_head * GROUP + rows % GROUP
    packed = (token_base + tokens) * (NUM_KV_HEADS * GROUP) + heads
    places = packed[:, None] * HEAD_DIM + dims[None, :]
    in_head = (dims < HEAD_DIM)[None, :]
    queries = tl.load(q + places, mask=in_head, other=0.0)

    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(first_pos - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    _, total, acc = attend_span(
        queries,
        before + tokens,
        first_pos,
        last_pos,
        begin,
        last_pos + 1,
        kv_len,
        k_cache + kv_head * HEAD_DIM,
        v_cache + kv_head * HEAD_DIM,
        block_table + seq.to(tl.int64) * table_stride,
        page_stride,
        factor,
        cap_factor,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
        HEAD_DIM,
        NUM_KV_HEADS * HEAD_DIM,
        PAGE,
        WIDE,
        NEAR_SPLIT,
        NEAR_END,
        SPLIT,
        WINDOW,
        SOFT_CAP,
        FLAT,
    )
    result = normalise(total, acc).to(out.dtype.element_ty)
    tl.store(out + places, result, mask=(rows < query_len * GROUP)[:, None] & in_head)
