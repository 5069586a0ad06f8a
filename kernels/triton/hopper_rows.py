"""What a consumer of ``prefill_hopper.py`` does: the attention of its 64 query rows.

Every step is written as in ``online_softmax.py``, whose contract it keeps: the tiles, the splits,
the folds and the three sums are the same. The scores of a tile are asked for together with the sums
over the tile before it, which are ready no later.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

ROWS = gl.constexpr(64)
SUM_COLUMNS = gl.constexpr(8)


@gluon.constexpr_function
def _registers(columns):
    """Where a consumer holds ``[64, columns]`` of a product."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def _rows_of(columns):
    return gl.SliceLayout(1, _registers(columns))


@gluon.constexpr_function
def whole_rows(columns):
    """16 bytes a thread, side by side."""
    lanes = columns // 8
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4, 1], [1, 0])


@gluon.jit
def _fold(m, total, folded, split_m, split_total, split_acc, BLOCK_D: gl.constexpr):
    """``fold_split``, of a running ``acc`` that lies in shared memory."""
    split_m = gl.convert_layout(split_m, _rows_of(BLOCK_D), assert_trivial=True)
    split_total = gl.convert_layout(gl.max(split_total, 1), _rows_of(BLOCK_D), assert_trivial=True)
    m_new = gl.maximum(m, split_m)
    anchor = gl.where(m_new == float("-inf"), 0.0, m_new)
    keep = gl.exp2(m - anchor)
    add = gl.exp2(split_m - anchor)
    total = gl.fma(total, keep, split_total * add)
    acc = folded.load(_registers(BLOCK_D))
    acc = gl.fma(acc, gl.broadcast(keep[:, None], acc)[0], split_acc * add[:, None])
    return m_new, total, acc


@gluon.jit
def _scores(queries, k_tile, BLOCK_N: gl.constexpr):
    """Ask for ``[64, BLOCK_N]``."""
    nothing = gl.zeros([ROWS, BLOCK_N], gl.float32, _registers(BLOCK_N))
    k_columns = k_tile.permute((1, 0))
    return hopper.warpgroup_mma(queries, k_columns, nothing, use_acc=False, is_async=True)


@gluon.jit
def _weigh(
    s, m, row_pos, at, factor, cap_factor,
    BLOCK_N: gl.constexpr, WINDOW: gl.constexpr, SOFT_CAP: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """A tile's p, m' and a, by the contract."""
    if SOFT_CAP:
        s = 1.0 - 2.0 / (gl.exp2(s * cap_factor) + 1.0)
    if MASKED:
        pos = (at + gl.arange(0, BLOCK_N, gl.SliceLayout(0, _registers(BLOCK_N))))[None, :]
        seen = pos <= row_pos[:, None]
        if WINDOW > 0:
            seen = seen & (pos > row_pos[:, None] - WINDOW)
        s = gl.where(seen, s, float("-inf"))
    m_new = gl.maximum(m, gl.max(s, 1) * factor)
    anchor = gl.where(m_new == float("-inf"), 0.0, m_new)
    p = gl.exp2(gl.fma(s, gl.full_like(s, factor), gl.broadcast(-anchor[:, None], s)[0]))
    return p, m_new, gl.exp2(m - anchor)


@gluon.jit
def _walk(
    first, last, p, m, total, acc, folded_m, folded_total,
    start, row_pos, factor, cap_factor, queries, folded, ones, k_tiles, v_tiles, full, empty,
    STAGES: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
    NEAR_SPLIT: gl.constexpr, NEAR_END: gl.constexpr, SPLIT: gl.constexpr,
    WINDOW: gl.constexpr, SOFT_CAP: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """Tiles ``first … last - 1``; ``p`` is of the tile before, whose values are still to come."""
    for i in range(first, last):
        stage = i % STAGES
        mbarrier.wait(full.index(stage), i // STAGES & 1)
        s = _scores(queries, k_tiles.index(stage), BLOCK_N)
        acc = hopper.warpgroup_mma(p, v_tiles.index(stage), acc, is_async=True)
        total = hopper.warpgroup_mma(p, ones, total, is_async=True)
        s, acc, total = hopper.warpgroup_mma_wait(num_outstanding=0, deps=[s, acc, total])
        mbarrier.arrive(empty.index(stage), count=1)
        at = start + i * BLOCK_N
        far = gl.maximum(at - NEAR_END, 0)
        new_split = (gl.minimum(at, NEAR_END) % NEAR_SPLIT == 0) & (far % SPLIT == 0)
        split_m = gl.where(new_split, float("-inf"), m)
        weights, m_new, keep = _weigh(
            s, split_m, row_pos, at, factor, cap_factor, BLOCK_N, WINDOW, SOFT_CAP, MASKED
        )
        if new_split:
            folded_m, folded_total, folded_acc = _fold(
                folded_m, folded_total, folded, m, total, acc, BLOCK_D
            )
            folded.store(folded_acc)
            acc = gl.zeros_like(acc)
            total = gl.zeros_like(total)
        else:
            acc_keep = gl.convert_layout(keep, _rows_of(BLOCK_D), assert_trivial=True)
            acc = acc * acc_keep[:, None]
            total_keep = gl.convert_layout(keep, _rows_of(SUM_COLUMNS), assert_trivial=True)
            total = total * total_keep[:, None]
        p = gl.convert_layout(weights.to(p.dtype), p.type.layout, assert_trivial=True)
        m = m_new
    return p, m, total, acc, folded_m, folded_total


@gluon.jit
def consume(
    consumer, shared,
    STAGES: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr,
    NEAR_SPLIT: gl.constexpr, NEAR_END: gl.constexpr, SPLIT: gl.constexpr,
    WINDOW: gl.constexpr, SOFT_CAP: gl.constexpr,
):  # fmt: skip
    """The rows of one consumer, over all tiles."""
    q, out, first_row, token_base, query_len, kv_len, kv_head, start, stop = shared[:9]
    factor, cap_factor, all_queries, all_folded, ones, k_tiles, v_tiles, full, empty = shared[9:]
    dtype: gl.constexpr = out.dtype.element_ty
    by_rows: gl.constexpr = whole_rows(BLOCK_D)
    first_row += consumer * ROWS
    before = kv_len - query_len
    # Rows past the last one repeat the last token: they read what exists and are not stored.
    rows = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, by_rows))
    tokens = token_base + gl.minimum(rows // GROUP, query_len - 1)
    heads = kv_head * GROUP + rows % GROUP
    dims = gl.arange(0, BLOCK_D, gl.SliceLayout(0, by_rows))
    places = (tokens * (NUM_KV_HEADS * GROUP) + heads)[:, None] * BLOCK_D + dims[None, :]
    queries = all_queries.index(consumer)
    queries.store(gl.load(q + places))
    folded = all_folded.index(consumer)
    folded.store(gl.zeros([ROWS, BLOCK_D], gl.float32, _registers(BLOCK_D)))
    hopper.fence_async_shared()

    score_rows = first_row + gl.arange(0, ROWS, _rows_of(BLOCK_N))
    row_pos = before + gl.minimum(score_rows // GROUP, query_len - 1)
    first_pos = before + gl.minimum(first_row // GROUP, query_len - 1)
    last_pos = before + gl.minimum((first_row + ROWS - 1) // GROUP, query_len - 1)
    # Tiles that every row sees whole are walked without masks; the first tile is apart.
    count = gl.cdiv(stop - start, BLOCK_N)
    bulk_stop = gl.minimum(gl.maximum((first_pos + 1 - start) // BLOCK_N, 1), count)
    bulk_start = 1
    if WINDOW > 0:
        whole = gl.cdiv(gl.maximum(last_pos - WINDOW + 1 - start, 0), BLOCK_N)
        bulk_start = gl.minimum(gl.maximum(whole, 1), bulk_stop)

    folded_m = gl.full([ROWS], float("-inf"), gl.float32, _rows_of(BLOCK_D))
    folded_total = gl.zeros([ROWS], gl.float32, _rows_of(BLOCK_D))
    m = gl.full([ROWS], float("-inf"), gl.float32, _rows_of(BLOCK_N))
    total = gl.zeros([ROWS, SUM_COLUMNS], gl.float32, _registers(SUM_COLUMNS))
    acc = gl.zeros([ROWS, BLOCK_D], gl.float32, _registers(BLOCK_D))
    mbarrier.wait(full.index(0), 0)
    s = _scores(queries, k_tiles.index(0), BLOCK_N)
    s = hopper.warpgroup_mma_wait(num_outstanding=0, deps=[s])
    mbarrier.arrive(empty.index(0), count=1)
    p, m, _ = _weigh(s, m, row_pos, start, factor, cap_factor, BLOCK_N, WINDOW, SOFT_CAP, True)
    operand: gl.constexpr = gl.DotOperandLayout(0, _registers(BLOCK_D), 2)
    p = gl.convert_layout(p.to(dtype), operand, assert_trivial=True)
    for part in gl.static_range(0 if WINDOW > 0 else 1, 3):
        first = 1 if part == 0 else bulk_start if part == 1 else bulk_stop
        last = bulk_start if part == 0 else bulk_stop if part == 1 else count
        p, m, total, acc, folded_m, folded_total = _walk(
            first, last, p, m, total, acc, folded_m, folded_total,
            start, row_pos, factor, cap_factor, queries, folded, ones, k_tiles, v_tiles,
            full, empty, STAGES, BLOCK_N, BLOCK_D, NEAR_SPLIT, NEAR_END, SPLIT,
            WINDOW, SOFT_CAP, part != 1,
        )  # fmt: skip

    stage = count % STAGES
    mbarrier.wait(full.index(stage), count // STAGES & 1)
    acc = hopper.warpgroup_mma(p, v_tiles.index(stage), acc, is_async=True)
    total = hopper.warpgroup_mma(p, ones, total, is_async=True)
    acc, total = hopper.warpgroup_mma_wait(num_outstanding=0, deps=[acc, total])
    _, folded_total, acc = _fold(folded_m, folded_total, folded, m, total, acc, BLOCK_D)
    divisor = gl.where(folded_total == 0.0, 1.0, folded_total)[:, None]
    result = gl.div_rn(acc, gl.broadcast(divisor, acc)[0]) + 0.0  # as in ``normalise``
    queries.store(result.to(dtype))  # nobody reads them any more
    gl.store(out + places, queries.load(by_rows), mask=(rows < query_len * GROUP)[:, None])
