"""Writes a step's K and V into the paged cache: a program a token. There is nothing to add up."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .pdl import overlapping, wait_for_inputs


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Copy k, v ``[T, Hk, D]`` into the slots ``page * page_size + offset`` of the caches.

    k_cache, v_cache: ``[num_pages, page_size, Hk, D]`` with contiguous pages and equal strides
    """
    tokens, num_kv_heads, head_dim = k.shape
    width = num_kv_heads * head_dim
    _write_kernel[(tokens,)](
        k,
        v,
        k_cache,
        v_cache,
        slot_mapping,
        k_cache.stride(0),
        PAGE=k_cache.shape[1],
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        num_warps=4,
        **overlapping(k.device),
    )


@triton.jit
def _write_kernel(
    k,
    v,
    k_cache,
    v_cache,
    slot_mapping,
    page_stride,
    PAGE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token)
    target = slot // PAGE * page_stride + slot % PAGE * WIDTH
    lane = tl.arange(0, BLOCK)
    inside = lane < WIDTH
    wait_for_inputs(PDL)
    tl.store(k_cache + target + lane, tl.load(k + token * WIDTH + lane, mask=inside), mask=inside)
    tl.store(v_cache + target + lane, tl.load(v + token * WIDTH + lane, mask=inside), mask=inside)
