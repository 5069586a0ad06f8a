"""Causal grouped-query attention over a paged KV cache.

Query head ``h`` reads KV head ``h // (Hq // Hk)``. A page holds ``page_size`` positions, laid out
``[page_size, Hk, D]``.

Contract: a query at absolute position ``p`` walks the positions ``0 … p`` in tiles of 64, aligned
at absolute positions, with the online softmax of Milakov & Gimelshein 2018. For each tile:

    s[j] = scale * sum_d q[d] k[j, d]    m' = max(m, max_j s[j])    a = e^(m - m')
    p[j] = e^(s[j] - m')                 l' = l a + sum_j p[j]      o' = o a + sum_j p[j] v[j]

and ``o / l`` at the end. So the result depends on the query and positions ``0 … p`` alone: a decode
step, a prefill and every chunking give the same bits.

Native: fp32; the sum over d is cut into blocks of 64 as in ``linear.py``; the tile's sum of p v is
one fma chain from zero, j ascending, then added to ``o a``; the tile's p are added in ascending
order, then ``l = fma(l, a, sum)``. Positions past a row's own are never touched, not even with
weight zero.
Torch: on one thread, both products are library matmuls of one fixed shape,
``[Hk, 16, D] x [Hk, D, 64]`` and ``[Hk, 16, 64] x [Hk, 64, D]``; the p are added by
``elementary.tree_sum``. Positions past the sequence's end are read as zeros; positions of the same
step past a row's own have weight zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .elementary import exp_f32, tree_sum
from .native.library import library
from .threads import one_thread

KV_TILE = 64
ROW_TILE = 16


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Copy k, v ``[T, Hk, D]`` into the slots ``page * page_size + offset`` of the caches."""
    k_cache.view(-1, *k_cache.shape[2:]).index_copy_(0, slot_mapping, k)
    v_cache.view(-1, *v_cache.shape[2:]).index_copy_(0, slot_mapping, v)


def paged_attention_native(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    scale: float,
    out: Tensor,
) -> None:
    """Fill ``out`` ``[T, Hq, D]``; the shapes are ``KernelSet.paged_attention``'s.

    :raises ValueError: a cache whose pages are not contiguous
    """
    _, page_size, num_kv_heads, head_dim = k_cache.shape
    inner = (num_kv_heads * head_dim, head_dim, 1)
    if k_cache.stride()[1:] != inner or v_cache.stride() != k_cache.stride():
        raise ValueError(
            "paged_attention wants k_cache and v_cache of equal strides whose pages are "
            f"contiguous; got strides {k_cache.stride()} and {v_cache.stride()}"
        )
    q_wide = q.float().contiguous()
    direct = out.dtype == torch.float32 and out.is_contiguous()
    result = out if direct else torch.empty_like(q_wide)
    table = block_table.contiguous()
    failed = library().isobit_paged_attention(
        q_wide.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        int(k_cache.dtype == torch.bfloat16),
        k_cache.stride(0),
        table.data_ptr(),
        table.shape[1],
        cu_seqlens_q.data_ptr(),
        seq_lens.data_ptr(),
        seq_lens.shape[0],
        q.shape[1],
        num_kv_heads,
        head_dim,
        page_size,
        scale,
        result.data_ptr(),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("paged_attention could not allocate its scratch memory")
    if not direct:
        out.copy_(result)


def paged_attention_torch(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_table: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens: Tensor,
    scale: float,
    out: Tensor,
) -> None:
    """Fill ``out`` ``[T, Hq, D]``; the shapes are ``KernelSet.paged_attention``'s."""
    starts = cu_seqlens_q.tolist()
    with one_thread():
        for b, kv_len in enumerate(seq_lens.tolist()):
            rows = slice(starts[b], starts[b + 1])
            keys = _read_pages(k_cache, block_table[b], kv_len)
            values = _read_pages(v_cache, block_table[b], kv_len)
            out[rows] = _attend_sequence(q[rows], keys, values, kv_len, scale).to(out.dtype)


def _read_pages(cache: Tensor, pages: Tensor, kv_len: int) -> Tensor:
    """One sequence's positions -> fp32 ``[Hk, tiles * 64, D]``, zeros past ``kv_len``."""
    page_size = cache.shape[1]
    used = cache[pages[: -(-kv_len // page_size)].long()].flatten(0, 1)[:kv_len]
    tiles = -(-kv_len // KV_TILE)
    padded = used.new_zeros(tiles * KV_TILE, *used.shape[1:], dtype=torch.float32)
    padded[:kv_len] = used
    return padded.transpose(0, 1).contiguous()


def _attend_sequence(q: Tensor, keys: Tensor, values: Tensor, kv_len: int, scale: float) -> Tensor:
    """q ``[n, Hq, D]``, the sequence's last n positions -> fp32 ``[n, Hq, D]``."""
    tokens, num_q_heads, dim = q.shape
    num_kv_heads = keys.shape[0]
    group = num_q_heads // num_kv_heads
    packed = q.float().view(tokens, num_kv_heads, group, dim).permute(1, 0, 2, 3).flatten(1, 2)
    positions = torch.arange(kv_len - tokens, kv_len, device=q.device).repeat_interleave(group)
    result = torch.empty_like(packed)
    for start in range(0, tokens * group, ROW_TILE):
        tile = slice(start, start + ROW_TILE)
        n = packed[:, tile].shape[1]
        padded = packed.new_zeros(num_kv_heads, ROW_TILE, dim)
        padded[:, :n] = packed[:, tile]
        # A padding row sees position 0, which always exists.
        limits = positions.new_zeros(ROW_TILE)
        limits[:n] = positions[tile]
        result[:, tile] = _attend_tile(padded, keys, values, limits, scale)[:, :n]
    unpacked = result.view(num_kv_heads, tokens, group, dim).permute(1, 0, 2, 3)
    return unpacked.reshape(tokens, num_q_heads, dim)


def _attend_tile(q: Tensor, keys: Tensor, values: Tensor, limits: Tensor, scale: float) -> Tensor:
    """q ``[Hk, 16, D]``, row i seeing positions ``0 … limits[i]`` -> ``[Hk, 16, D]``."""
    m = q.new_full(q.shape[:2], -torch.inf)
    total = torch.zeros_like(m)
    o = torch.zeros_like(q)
    for start in range(0, int(limits.max()) + 1, KV_TILE):
        tile = slice(start, start + KV_TILE)
        k = keys[:, tile].transpose(1, 2).contiguous()
        v = values[:, tile].contiguous()
        visible = torch.arange(start, start + KV_TILE, device=q.device) <= limits.unsqueeze(1)
        s = torch.where(visible, torch.bmm(q, k) * scale, -torch.inf)
        m_new = torch.maximum(m, s.amax(dim=-1))
        alpha = exp_f32(m - m_new)
        p = torch.where(visible, exp_f32(s - m_new.unsqueeze(-1)), 0.0)
        total = total * alpha + tree_sum(p)
        # + 0.0 turns -0 into +0, so a tile that a row does not see changes no bit of it.
        o = o * alpha.unsqueeze(-1) + (torch.bmm(p, v) + 0.0)
        m = m_new
    return o / total.unsqueeze(-1)
