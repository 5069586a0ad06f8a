"""Where the positions of a tile lie in the paged KV cache."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_slots(
    table,
    at,
    kv_len,
    page_stride,
    BLOCK_N: tl.constexpr,
    SLOT_STRIDE: tl.constexpr,
    PAGE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Where the slots of the tile from position ``at`` begin in the cache, ``[BLOCK_N]``.

    WIDE: whether the cache has places that an int32 cannot count
    """
    lane = tl.arange(0, BLOCK_N)
    if PAGE % BLOCK_N == 0:  # the tile lies in one page
        pages = tl.load(table + at // PAGE, mask=at < kv_len, other=0)
        inside = (at % PAGE + lane) * SLOT_STRIDE
    elif BLOCK_N % PAGE == 0:  # pages begin at the tile's edge
        pages = tl.load(table + at // PAGE + lane // PAGE, mask=at + lane < kv_len, other=0)
        inside = lane % PAGE * SLOT_STRIDE
    else:
        pages = tl.load(table + (at + lane) // PAGE, mask=at + lane < kv_len, other=0)
        inside = (at + lane) % PAGE * SLOT_STRIDE
    if WIDE:
        pages = pages.to(tl.int64)
    return pages * page_stride + inside
