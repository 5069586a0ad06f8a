"""Packs a step into the index tensors of a ``Batch``, in two copies to the device."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from ..backends.base import Batch
from ..kernels.transfer import parts_to_device
from .step import ScheduledSeq


def pack(
    seqs: Sequence[ScheduledSeq], page_size: int, device: torch.device, padding: int = 0
) -> Batch:
    """The batch of a step; a token that the host does not know yet is 0.

    :param padding: sequences on the null page to add, as ``Batch`` describes them; only where
        every sequence is in its decode phase.
    """
    spans = [range(seq.start, seq.stop) for seq in seqs]
    tokens = [t for s, r in zip(seqs, spans, strict=True) for t in _tokens(s, r)]
    slots = [x for s, r in zip(seqs, spans, strict=True) for x in _slots(s, r, page_size)]
    fill = [0] * padding
    query_lens = [seq.num_tokens for seq in seqs] + [1] * padding
    kv_lens = [span.stop for span in spans] + [1] * padding
    counts = [-(-length // page_size) for length in kv_lens]
    width = max(counts)
    table: list[int] = []
    for seq, count in zip(seqs, counts, strict=False):
        table += seq.request.page_ids[:count] + [0] * (width - count)
    positions = [p for span in spans for p in span]
    token_ids, positions_, slot_mapping = parts_to_device(
        [tokens + fill, positions + fill, slots + fill], torch.int64, device
    )
    starts, seq_lens, pages = parts_to_device(
        [[0, *accumulate(query_lens)], kv_lens, table + [0] * (width * padding)],
        torch.int32,
        device,
    )
    return Batch(
        token_ids=token_ids,
        positions=positions_,
        slot_mapping=slot_mapping,
        cu_seqlens_q=starts,
        seq_lens=seq_lens,
        block_table=pages.view(-1, width),
        query_lens=query_lens,
        kv_lens=kv_lens,
        num_decodes=sum(seq.is_decode for seq in seqs) + padding,
    )


def _tokens(seq: ScheduledSeq, span: range) -> Sequence[int]:
    known = seq.request.token_slice(span.start, span.stop)
    return [*known, 0] if seq.pending else known


def _slots(seq: ScheduledSeq, span: range, page_size: int) -> list[int]:
    pages = seq.request.page_ids
    return [pages[p // page_size] * page_size + p % page_size for p in span]
