"""Attention of the prefilling sequences on Hopper, by warp groups: ``prefill.py``'s bits, sooner.

A program has three *consumers*, warp groups of 64 query rows each, and a *producer*, the warp group
that copies the tiles of K and V into shared memory and runs ahead of them. While one consumer turns
scores into weights, the tensor cores multiply for the others. Stage ``i`` of the ring has K of tile
``i`` and V of tile ``i - 1``: the scores of a tile are asked for together with the product of the
weights and the values of the tile before it. The folded splits wait in shared memory.

The contract is that of ``online_softmax.py``, and every step of it is written as there. That a warp
group's products have the bits of any other tensor core instruction is not documented; it is checked
by ``benchmarks/gpu_attention_bits.py``.
"""

from __future__ import annotations

import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .hopper_rows import ROWS, SUM_COLUMNS, consume, whole_rows
from .tiling import Scoring, Tiling, kernel_arguments

_CONSUMERS = gl.constexpr(3)
_TOGETHER = gl.constexpr(8)
"""Consecutive positions whose page is looked up once: a page has a multiple of them."""
# Registers a thread; a processor has 512 for one thread of each of the four warp groups.
_CONSUMER_REGISTERS = gl.constexpr(160)
_PRODUCER_REGISTERS = gl.constexpr(32)
# Triton has renamed it between 3.6 and 3.9.
_copy = getattr(hopper.async_copy, "async_load", None) or (
    hopper.async_copy.async_copy_global_to_shared
)


def attend_prefill_hopper(
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
    """As ``attend_prefill``, of which this is the part for ``tiling.hopper``."""
    arguments = kernel_arguments(q, k_cache, v_cache, scoring, tiling)
    del arguments["WIDE"]  # places are counted in 64 bits here
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
        STAGES=tiling.prefill.stages,
        num_warps=4,  # of the first consumer; the kernel starts the other warp groups
        **arguments,
    )


@gluon.constexpr_function
def _copied(columns):
    """16 bytes a thread of each of some consecutive positions that lie in one page."""
    lanes = columns // 8
    return gl.BlockedLayout([1, lanes // 2, 8], [2, 16 // lanes, lanes], [4, 1, 1], [2, 1, 0])


@gluon.jit
def _produce(
    k_head, v_head, table, page_stride, kv_len, start, stop, k_tiles, v_tiles, full, empty,
    STAGES: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
    SLOT_STRIDE: gl.constexpr, PAGE: gl.constexpr,
):  # fmt: skip
    """Fill the stages, once each tile of the last round has been used by every consumer."""
    layout: gl.constexpr = _copied(BLOCK_D)
    shape: gl.constexpr = [BLOCK_N // _TOGETHER, _TOGETHER, BLOCK_D]
    first = gl.arange(0, shape[0], gl.SliceLayout(1, gl.SliceLayout(2, layout))) * _TOGETHER
    lane = gl.arange(0, _TOGETHER, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    dims = gl.arange(0, BLOCK_D, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    inside = (lane * SLOT_STRIDE)[None, :, None] + dims[None, None, :]
    # Pages are looked up a tile ahead. Past the sequence's end there are none: page 0 is copied.
    k_pages = gl.load(table + (start + first) // PAGE, mask=start + first < kv_len, other=0)
    v_pages = gl.zeros_like(k_pages)
    for i in range(gl.cdiv(stop - start, BLOCK_N) + 1):
        k_pos = start + i * BLOCK_N + first
        v_pos = k_pos - BLOCK_N
        next_pos = k_pos + BLOCK_N
        next_pages = gl.load(table + next_pos // PAGE, mask=next_pos < kv_len, other=0)
        k_slots = k_pages.to(gl.int64) * page_stride + k_pos % PAGE * SLOT_STRIDE
        v_slots = v_pages.to(gl.int64) * page_stride + gl.maximum(v_pos, 0) % PAGE * SLOT_STRIDE
        # K past the end gives scores that are masked. V must be zeros there, as the cache has NaN.
        there = v_pos[:, None] + lane[None, :] < kv_len
        stage = i % STAGES
        mbarrier.wait(empty.index(stage), i // STAGES & 1 ^ 1)
        _copy(k_tiles.index(stage).reshape(shape), k_head + (k_slots[:, None, None] + inside))
        _copy(
            v_tiles.index(stage).reshape(shape),
            v_head + (v_slots[:, None, None] + inside),
            mask=there[:, :, None],
        )
        hopper.async_copy.commit_group()
        v_pages = k_pages
        k_pages = next_pages
        hopper.async_copy.wait_group(0)
        hopper.fence_async_shared()  # so that the tensor cores see the copies
        mbarrier.arrive(full.index(stage), count=1)


@gluon.jit(do_not_specialize=["table_stride"])
def _prefill_kernel(
    q, k_cache, v_cache, out, work, cu_seqlens_q, seq_lens, block_table, table_stride,
    page_stride, factor, cap_factor,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, HEAD_DIM: gl.constexpr,
    NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr, PAGE: gl.constexpr,
    NEAR_SPLIT: gl.constexpr, NEAR_END: gl.constexpr, SPLIT: gl.constexpr,
    WINDOW: gl.constexpr, SOFT_CAP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    rows: gl.constexpr = _CONSUMERS * ROWS
    seq = gl.load(work + 2 * gl.program_id(0))
    first_row = gl.load(work + 2 * gl.program_id(0) + 1) * rows
    kv_head = gl.program_id(1)
    token_base = gl.load(cu_seqlens_q + seq).to(gl.int64)
    query_len = gl.load(cu_seqlens_q + seq + 1) - token_base.to(gl.int32)
    kv_len = gl.load(seq_lens + seq)
    before = kv_len - query_len
    start = 0
    if WINDOW > 0:
        start = gl.maximum(before + first_row // GROUP - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    stop = before + gl.minimum((first_row + rows - 1) // GROUP, query_len - 1) + 1

    dtype: gl.constexpr = out.dtype.element_ty
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    by_rows: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    queries = gl.allocate_shared_memory(dtype, [_CONSUMERS, ROWS, BLOCK_D], swizzled)
    folded = gl.allocate_shared_memory(gl.float32, [_CONSUMERS, ROWS, BLOCK_D], by_rows)
    k_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], swizzled)
    v_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_D], swizzled)
    ones = gl.allocate_shared_memory(dtype, [SUM_COLUMNS, BLOCK_N], swizzled)
    ones.store(gl.full([SUM_COLUMNS, BLOCK_N], 1.0, dtype, whole_rows(BLOCK_N)))
    hopper.fence_async_shared()
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=_CONSUMERS)

    shared = (
        q, out, first_row, token_base, query_len, kv_len, kv_head, start, stop,
        factor, cap_factor, queries, folded, ones.permute((1, 0)), k_tiles, v_tiles, full, empty,
    )  # fmt: skip
    k_head = k_cache + kv_head * HEAD_DIM
    v_head = v_cache + kv_head * HEAD_DIM
    table = block_table + seq.to(gl.int64) * table_stride
    gl.warp_specialize(
        [
            (consume, (
                0, shared, STAGES, BLOCK_N, BLOCK_D, NUM_KV_HEADS, GROUP,
                NEAR_SPLIT, NEAR_END, SPLIT, WINDOW, SOFT_CAP,
            )),
            (consume, (
                1, shared, STAGES, BLOCK_N, BLOCK_D, NUM_KV_HEADS, GROUP,
                NEAR_SPLIT, NEAR_END, SPLIT, WINDOW, SOFT_CAP,
            )),
            (consume, (
                2, shared, STAGES, BLOCK_N, BLOCK_D, NUM_KV_HEADS, GROUP,
                NEAR_SPLIT, NEAR_END, SPLIT, WINDOW, SOFT_CAP,
            )),
            (_produce, (
                k_head, v_head, table, page_stride, kv_len, start, stop,
                k_tiles, v_tiles, full, empty,
                STAGES, BLOCK_N, BLOCK_D, NUM_KV_HEADS * HEAD_DIM, PAGE,
            )),
        ],
        [4, 4, 4],
        [_CONSUMER_REGISTERS, _CONSUMER_REGISTERS, _PRODUCER_REGISTERS],
    )  # fmt: skip
