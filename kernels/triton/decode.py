"""Attention of the decoding sequences: programs for the splits, then one that folds a row's splits.

The contract is in ``online_softmax.py``. Program 0 of each (sequence, KV head) walks the first
``serial`` splits and folds them as it goes; each later split is computed by some other program. A
sequence without later splits is done then. Of a longer one, the state of program 0 and those of the
later splits go through memory in fp32, which changes no bit of them, and are folded in ascending
order. Which program computes a split, how many there are, and ``serial``, are free.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .online_softmax import attend_span, fold_split, normalise, split_of, split_start
from .tiling import Scoring, Tiling, kernel_arguments, padded


@dataclass(frozen=True, slots=True)
class Partials:
    """Workspace for the states that go through memory, fp32.

    acc:    ``[sequences, slots, q_heads, head_dim]``; slot 0 is for the state of the first
        ``serial`` splits, each other one for a later split; no slots if there are no later splits
    stats:  ``[sequences, slots, q_heads, 2]``, each state's m and l
    serial: how many splits, the first ones, one program walks
    """

    acc: Tensor
    stats: Tensor
    serial: int

    @classmethod
    def within(
        cls, room: Tensor, num_seqs: int, slots: int, num_q_heads: int, head_dim: int, serial: int
    ) -> Partials:
        """A workspace at the start of ``room``, fp32 of ``sequences * slots`` rows or more.

        :param room: ``[rows, q_heads * (head_dim + 2)]``, contiguous
        """
        states = num_seqs * slots * num_q_heads
        acc, stats = room.view(-1)[: states * (head_dim + 2)].split([states * head_dim, states * 2])
        shape = (num_seqs, slots, num_q_heads)
        return cls(acc.view(*shape, head_dim), stats.view(*shape, 2), serial)


def partial_slots(num_seqs: int, num_kv_heads: int, kv_len: int, tiling: Tiling) -> int:
    """The slots of a sequence in ``Partials``, for sequences of up to ``kv_len`` positions."""
    later = tiling.splits(kv_len) - tiling.serial_splits(num_seqs * num_kv_heads)
    return later + 1 if later > 0 else 0


def allocate_room(rows: int, num_q_heads: int, head_dim: int, device: torch.device) -> Tensor:
    """Memory for ``Partials.within``; ``rows`` is the greatest number of sequences times slots."""
    return torch.empty(rows, num_q_heads * (head_dim + 2), dtype=torch.float32, device=device)


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

    :param partials: room for as many sequences, and for the later splits of the longest
    :raises ValueError: caches whose pages are not contiguous, or of unequal strides
    """
    num_q_heads, num_kv_heads = q.shape[1], k_cache.shape[2]
    slots = partials.acc.shape[1]
    shared = kernel_arguments(q, k_cache, v_cache, scoring, tiling)
    spread = tiling.decode_programs // (num_decodes * num_kv_heads)
    later = min(max(slots - 1, 0), max(spread - 1, 1))
    # What begins last should be short. Where each later program has one split, the last ones are
    # the longest; where some have one more, those are the first.
    backwards = later == slots - 1
    _split_kernel[(num_kv_heads, num_decodes, 1 + later)](
        q,
        k_cache,
        v_cache,
        partials.acc,
        partials.stats,
        out,
        seq_lens,
        block_table,
        block_table.stride(0),
        slots,
        partials.serial,
        int(backwards),
        BLOCK_M=max(tiling.decode.rows, padded(num_q_heads // num_kv_heads)),
        num_warps=tiling.decode.warps,
        num_stages=tiling.decode.stages,
        **shared,
    )
    if slots == 0:  # no sequence has later splits
        return
    names = ("BLOCK_N", "BLOCK_D", "HEAD_DIM", "NEAR_SPLIT", "NEAR_END", "SPLIT", "WINDOW")
    _fold_kernel[(num_q_heads, num_decodes)](
        partials.acc,
        partials.stats,
        out,
        seq_lens,
        slots,
        partials.serial,
        **{name: shared[name] for name in names},
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


@triton.jit(do_not_specialize=["table_stride", "max_slots", "serial", "backwards"])
def _split_kernel(
    q,
    k_cache,
    v_cache,
    partial_acc,
    partial_stats,
    out,
    seq_lens,
    block_table,
    table_stride,
    max_slots,
    serial,
    backwards,
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

    first = split_of(begin, NEAR_SPLIT, NEAR_END, SPLIT)
    last = split_of(kv_len - 1, NEAR_SPLIT, NEAR_END, SPLIT) + 1
    # Program 0 walks the first splits in one go, the others one split at a time.
    part = tl.program_id(2)
    if backwards != 0:
        part = (tl.num_programs(2) - part) % tl.num_programs(2)
    early = part == 0
    lowest = tl.where(early, first, tl.maximum(first, serial) + part - 1)
    highest = tl.where(early, tl.minimum(serial, last), last)
    step = tl.where(early, serial, tl.num_programs(2) - 1)
    for split in range(lowest, highest, step):
        until = tl.where(early, highest, split + 1)
        m, total, acc = attend_span(
            queries,
            tl.zeros([BLOCK_M], tl.int32) + (kv_len - 1),
            kv_len - 1,
            kv_len - 1,
            tl.maximum(split_start(split, NEAR_SPLIT, NEAR_END, SPLIT), begin),
            tl.minimum(split_start(until, NEAR_SPLIT, NEAR_END, SPLIT), kv_len),
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
            WIDE,
            NEAR_SPLIT,
            NEAR_END,
            SPLIT,
            WINDOW,
            SOFT_CAP,
            True,
        )
        if last <= serial:
            place = seq * (NUM_KV_HEADS * GROUP * HEAD_DIM) + places
            result = normalise(total, acc).to(out.dtype.element_ty)
            tl.store(out + place, result, mask=stored[:, None] & in_head)
        else:
            slot = tl.maximum(split - serial + 1, 0)
            at = (seq * max_slots + slot) * (NUM_KV_HEADS * GROUP)
            tl.store(partial_acc + at * HEAD_DIM + places, acc, mask=stored[:, None] & in_head)
            tl.store(partial_stats + (at + heads) * 2, m, mask=stored)
            tl.store(partial_stats + (at + heads) * 2 + 1, total, mask=stored)


@triton.jit(do_not_specialize=["max_slots", "serial"])
def _fold_kernel(
    partial_acc,
    partial_stats,
    out,
    seq_lens,
    max_slots,
    serial,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NEAR_SPLIT: tl.constexpr,
    NEAR_END: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOW: tl.constexpr,
):
    head = tl.program_id(0)
    num_q_heads = tl.num_programs(0)
    seq = tl.program_id(1).to(tl.int64)
    kv_len = tl.load(seq_lens + seq)
    begin = _first_position(kv_len, BLOCK_N, WINDOW)
    first = split_of(begin, NEAR_SPLIT, NEAR_END, SPLIT)
    last = split_of(kv_len - 1, NEAR_SPLIT, NEAR_END, SPLIT) + 1
    if last > serial:  # otherwise ``out`` has the result
        dims = tl.arange(0, BLOCK_D)[None, :]
        one = tl.zeros([1], tl.int32)
        m = tl.full([1], float("-inf"), tl.float32)
        total = tl.zeros([1], tl.float32)
        acc = tl.zeros([1, BLOCK_D], tl.float32)
        for slot in range(tl.maximum(first - serial + 1, 0), last - serial + 1):
            at = (seq * max_slots + slot) * num_q_heads + head
            split_acc = tl.load(partial_acc + at * HEAD_DIM + dims, mask=dims < HEAD_DIM, other=0.0)
            split_m = tl.load(partial_stats + at * 2 + one)
            split_total = tl.load(partial_stats + at * 2 + 1 + one)
            m, total, acc = fold_split(m, total, acc, split_m, split_total, split_acc)

        place = (seq * num_q_heads + head) * HEAD_DIM + dims
        result = normalise(total, acc).to(out.dtype.element_ty)
        tl.store(out + place, result, mask=dims < HEAD_DIM)
