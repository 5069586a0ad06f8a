"""The attention contract on CUDA, as the device functions that prefill and decode share.

Contract: a query at absolute position ``p`` walks its KV positions in ascending order, in *tiles*
of ``KV_TILE`` positions, grouped in *splits*: of ``NEAR_SPLIT`` positions below ``NEAR_END``, of
``SPLIT`` from there on. Tiles and splits lie at absolute positions (``split_of``, ``split_start``).
A split starts from the empty state ``m = -inf, l = 0, o = 0``. For each of its tiles, with ``c``
the factor that turns scores into base-2 logarithms:

    s[j] = sum_d q[d] k[j, d]              m' = max(m, c max_j s[j])     a = 2^(m - m')
    p[j] = 2^fma(s[j], c, -m')             l' = sum_j p[j] + l a         o' = sum_j p[j] v[j] + o a

Under a soft cap ``s`` becomes ``tanh(s scale / cap)`` and ``c`` takes the cap for the scale. The
finished splits are folded in ascending order, from the empty state too:

    M' = max(M, m)    A = 2^(M - M')    B = 2^(m - M')    L' = fma(L, A, l B)    O' = fma(O, A, o B)

and the result is ``O / L``, correctly rounded, in the query's dtype.

The three sums are ``tl.dot``s with fp32 accumulators: over d of the head dim padded to a power of
two with zeros, over j of one tile, with ``p`` in the dtype of V; the sum of p is a product with
ones, so that it has the order of the others. fp32 inputs are multiplied in fp32. Positions that
the row does not see have weight zero. Positions past the sequence's end are read as zeros.

So a tile in which a row sees nothing, and a split of such tiles, change no bit of it: there
``a = 1`` and ``p = 0``, or ``A = 1`` and ``l = o = 0``. Folded into the empty state, a state stays
as it is: what some program folded of the first splits may be stored, and later splits folded into
it. The result depends on the query and on the positions that it sees alone. Decode equals prefill,
and chunks, neighbours, the page size, the height of a tile of rows, who walks which splits, warps,
warp groups (``prefill_hopper.py``), stages and the grid are free. Fused multiply-adds are written
out, and the kernels are compiled without any other (``enable_fp_fusion=False``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .page_table import tile_slots

SUM_COLUMNS = tl.constexpr(8)
"""Columns of ones in the product that adds up p: the least that a matrix instruction takes."""


@triton.jit
def split_of(pos, NEAR_SPLIT: tl.constexpr, NEAR_END: tl.constexpr, SPLIT: tl.constexpr):
    """The split that position ``pos`` lies in; for a split's start also the splits before it."""
    return tl.minimum(pos, NEAR_END) // NEAR_SPLIT + tl.maximum(pos - NEAR_END, 0) // SPLIT


@triton.jit
def split_start(split, NEAR_SPLIT: tl.constexpr, NEAR_END: tl.constexpr, SPLIT: tl.constexpr):
    """The first position of a split; it stops where the next one starts."""
    near: tl.constexpr = NEAR_END // NEAR_SPLIT
    return tl.minimum(split, near) * NEAR_SPLIT + tl.maximum(split - near, 0) * SPLIT


@triton.jit
def fold_split(m, total, acc, split_m, split_total, split_acc):
    """Fold a finished split into the running state: m and total ``[R]``, acc ``[R, D]``."""
    m_new = tl.maximum(m, split_m)
    anchor = tl.where(m_new == float("-inf"), 0.0, m_new)
    keep = tl.exp2(m - anchor)
    add = tl.exp2(split_m - anchor)
    total = tl.fma(total, keep, split_total * add)
    acc = tl.fma(acc, tl.broadcast_to(keep[:, None], acc.shape), split_acc * add[:, None])
    return m_new, total, acc


@triton.jit
def normalise(total, acc):
    """``acc / total``. A row that saw nothing gives zeros, never a NaN."""
    total = tl.broadcast_to(tl.where(total == 0.0, 1.0, total)[:, None], acc.shape)
    # + 0.0 turns -0 into +0: a tile of weight zero may have turned one into the other.
    return tl.div_rn(acc, total) + 0.0


@triton.jit
def attend_span(
    q,  # [BLOCK_M, BLOCK_D]
    row_pos,  # [BLOCK_M], each row's absolute position
    first_pos,  # the least and the greatest of them
    last_pos,
    start,  # KV positions that some row may see: start … stop - 1,
    stop,  # start at a tile's edge
    kv_len,
    k_head,  # pointers to this KV head of slot 0 of page 0
    v_head,
    table,  # pointer to the sequence's pages
    page_stride,
    factor,
    cap_factor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    PAGE: tl.constexpr,
    WIDE: tl.constexpr,
    NEAR_SPLIT: tl.constexpr,
    NEAR_END: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    FLAT: tl.constexpr,
):
    """The splits from ``start`` to ``stop``, folded: m and total ``[R]``, acc ``[R, D]``.

    Tiles that every row sees whole are walked without masks.
    FLAT: those in one loop, not in one for each split: see ``_walk``
    """
    folded_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    folded_total = tl.zeros([BLOCK_M], tl.float32)
    folded_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M, SUM_COLUMNS], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    bulk_start = start
    bulk_stop = tl.maximum(tl.minimum((first_pos + 1) // BLOCK_N * BLOCK_N, stop), start)
    if WINDOW > 0:
        whole = tl.cdiv(tl.maximum(last_pos - WINDOW + 1, 0), BLOCK_N) * BLOCK_N
        bulk_start = tl.minimum(tl.maximum(whole, start), bulk_stop)
        m, total, acc, folded_m, folded_total, folded_acc = _walk(
            m, total, acc, folded_m, folded_total, folded_acc,
            q, row_pos, start, bulk_start, kv_len, k_head, v_head, table, page_stride,
            factor, cap_factor, BLOCK_N, BLOCK_D, HEAD_DIM, SLOT_STRIDE, PAGE, WIDE,
            NEAR_SPLIT, NEAR_END, SPLIT, WINDOW, SOFT_CAP, True, True,
        )  # fmt: skip
    m, total, acc, folded_m, folded_total, folded_acc = _walk(
        m, total, acc, folded_m, folded_total, folded_acc,
        q, row_pos, bulk_start, bulk_stop, kv_len, k_head, v_head, table, page_stride,
        factor, cap_factor, BLOCK_N, BLOCK_D, HEAD_DIM, SLOT_STRIDE, PAGE, WIDE,
        NEAR_SPLIT, NEAR_END, SPLIT, WINDOW, SOFT_CAP, FLAT, False,
    )  # fmt: skip
    m, total, acc, folded_m, folded_total, folded_acc = _walk(
        m, total, acc, folded_m, folded_total, folded_acc,
        q, row_pos, bulk_stop, stop, kv_len, k_head, v_head, table, page_stride,
        factor, cap_factor, BLOCK_N, BLOCK_D, HEAD_DIM, SLOT_STRIDE, PAGE, WIDE,
        NEAR_SPLIT, NEAR_END, SPLIT, WINDOW, SOFT_CAP, True, True,
    )  # fmt: skip
    return fold_split(folded_m, folded_total, folded_acc, m, _column(total), acc)


@triton.jit
def _column(total):
    """The columns of the sums are all the same."""
    return tl.max(total, 1)


@triton.jit
def _walk(
    m,  # the state of the split that is being walked,
    total,
    acc,
    folded_m,  # and that of the finished ones
    folded_total,
    folded_acc,
    q,
    row_pos,
    start,
    stop,
    kv_len,
    k_head,
    v_head,
    table,
    page_stride,
    factor,
    cap_factor,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    PAGE: tl.constexpr,
    WIDE: tl.constexpr,
    NEAR_SPLIT: tl.constexpr,
    NEAR_END: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    FLAT: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The tiles from ``start`` to ``stop``; where a split begins, the one before it is folded.

    FLAT: in one loop, whose loads run on from split to split, but whose products are waited for in
    every tile; otherwise in a loop for each split, which begins with no loads under way. Then
    ``start`` is where a split starts.
    """
    first = split_of(start, NEAR_SPLIT, NEAR_END, SPLIT)
    last = split_of(stop - 1, NEAR_SPLIT, NEAR_END, SPLIT)
    for part in range(1 if FLAT else last - first + 1):
        at = start
        end = stop
        if not FLAT:
            at = split_start(first + part, NEAR_SPLIT, NEAR_END, SPLIT)
            end = tl.minimum(split_start(first + part + 1, NEAR_SPLIT, NEAR_END, SPLIT), stop)
        # Each tile's slots are looked up a tile ahead: no load of K waits for the page table.
        slots = tile_slots(table, at, kv_len, page_stride, BLOCK_N, SLOT_STRIDE, PAGE, WIDE)
        if not FLAT:
            folded_m, folded_total, folded_acc = fold_split(
                folded_m, folded_total, folded_acc, m, _column(total), acc
            )
            m = tl.full(m.shape, float("-inf"), tl.float32)
            total = tl.zeros(total.shape, tl.float32)
            acc = tl.zeros(acc.shape, tl.float32)
        for tile in range(at, end, BLOCK_N):
            if FLAT and tile == split_start(
                split_of(tile, NEAR_SPLIT, NEAR_END, SPLIT), NEAR_SPLIT, NEAR_END, SPLIT
            ):
                folded_m, folded_total, folded_acc = fold_split(
                    folded_m, folded_total, folded_acc, m, _column(total), acc
                )
                m = tl.full(m.shape, float("-inf"), tl.float32)
                total = tl.zeros(total.shape, tl.float32)
                acc = tl.zeros(acc.shape, tl.float32)
            m, total, acc = _attend_tile(
                m, total, acc, q, row_pos, tile, kv_len, k_head, v_head, slots, factor, cap_factor,
                BLOCK_N, BLOCK_D, HEAD_DIM, WINDOW, SOFT_CAP, MASKED,
            )  # fmt: skip
            slots = tile_slots(
                table, tile + BLOCK_N, kv_len, page_stride, BLOCK_N, SLOT_STRIDE, PAGE, WIDE
            )
    return m, total, acc, folded_m, folded_total, folded_acc


@triton.jit
def _attend_tile(
    m,
    total,
    acc,
    q,
    row_pos,
    at,
    kv_len,
    k_head,
    v_head,
    slots,
    factor,
    cap_factor,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One tile, positions ``at … at + BLOCK_N - 1``: the first line of the contract's sums."""
    dims = tl.arange(0, BLOCK_D)
    pos = at + tl.arange(0, BLOCK_N)
    places = slots[:, None] + dims[None, :]  # of K and of V
    there = (pos < kv_len)[:, None] & (dims < HEAD_DIM)[None, :]
    if MASKED or HEAD_DIM < BLOCK_D:
        k = tl.load(k_head + places, mask=there, other=0.0)
    else:
        k = tl.load(k_head + places)
    s = tl.dot(q, tl.trans(k), input_precision="ieee")
    if SOFT_CAP:
        s = 1.0 - 2.0 / (tl.exp2(s * cap_factor) + 1.0)
    if MASKED:
        seen = pos[None, :] <= row_pos[:, None]
        if WINDOW > 0:
            seen = seen & (pos[None, :] > row_pos[:, None] - WINDOW)
        s = tl.where(seen, s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * factor)
    anchor = tl.where(m_new == float("-inf"), 0.0, m_new)
    keep = tl.exp2(m - anchor)[:, None]
    shift = tl.broadcast_to(-anchor[:, None], s.shape)
    p = tl.exp2(tl.fma(s, tl.full(s.shape, factor, tl.float32), shift))
    if MASKED or HEAD_DIM < BLOCK_D:
        v = tl.load(v_head + places, mask=there, other=0.0)
    else:
        v = tl.load(v_head + places)
    weights = p.to(v.dtype)
    ones = tl.full([BLOCK_N, SUM_COLUMNS], 1.0, v.dtype)
    total = tl.dot(weights, ones, total * keep, input_precision="ieee")
    acc = tl.dot(weights, v, acc * keep, input_precision="ieee")
    return m_new, total, acc
