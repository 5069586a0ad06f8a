"""Block tables as FlashInfer wants them: every sequence's pages end to end, and where each begins.

A sequence of ``n`` tokens has ``ceil(n / page_size)`` pages, of which the last holds
``n - (pages - 1) * page_size`` tokens. Lengths are known on the host and on the device, pages on
the device alone, so nothing here waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from .base import Batch


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long ``B`` sequences are, on the host; all int32.

    indptr:    ``[B + 1]``, where each sequence's pages begin among those of all
    last_page_len: ``[B]``, tokens in each sequence's last page
    kv_lens:   ``[B]``
    """

    indptr: Tensor
    last_page_len: Tensor
    kv_lens: Tensor


@dataclass(frozen=True, slots=True)
class PageLists:
    """The pages of ``B`` sequences: ``indices``, int32 ``[indptr[B]]`` on the device."""

    lengths: Lengths
    indices: Tensor


def num_pages(length: int, page_size: int) -> int:
    """Pages of a sequence."""
    return -(-length // page_size)


def page_lists(batch: Batch, first: int, last: int, page_size: int) -> PageLists:
    """Those of the sequences ``first … last - 1``."""
    lengths = batch.kv_lens[first:last]
    total = sum(num_pages(n, page_size) for n in lengths)
    tables, seq_lens = batch.block_table[first:last], batch.seq_lens[first:last]
    _, indices = flat_pages(tables, seq_lens, page_size, total)
    return PageLists(lengths_on_host(lengths, page_size, tables.device), indices)


def lengths_on_host(kv_lens: Sequence[int], page_size: int, device: torch.device) -> Lengths:
    """Of sequences of so many tokens, to be copied to ``device``."""
    pages = [num_pages(n, page_size) for n in kv_lens]
    last = [n - (p - 1) * page_size for n, p in zip(kv_lens, pages, strict=True)]
    starts = [0, *accumulate(pages)]
    return Lengths(*(on_host(values, device) for values in (starts, last, kv_lens)))


def flat_pages(
    block_table: Tensor, seq_lens: Tensor, page_size: int, total: int
) -> tuple[Tensor, Tensor]:
    """``indptr`` and ``indices`` on the device, from a block table ``[B, max_pages]``.

    :param total: pages of all sequences together, so that no size is asked of the device.
    """
    pages = (seq_lens.long() + (page_size - 1)) // page_size
    indptr = torch.zeros(len(pages) + 1, dtype=torch.int64, device=pages.device)
    torch.cumsum(pages, 0, out=indptr[1:])
    owners = torch.repeat_interleave(pages, output_size=total)
    columns = torch.arange(total, device=pages.device) - indptr[owners]
    return indptr.int(), block_table[owners, columns]


def last_page_len(seq_lens: Tensor, page_size: int) -> Tensor:
    """int32 ``[B]`` on the device."""
    return (seq_lens - 1) % page_size + 1


def on_host(values: Sequence[int], device: torch.device) -> Tensor:
    """An int32 tensor that can be copied to ``device`` while the host goes on.

    Torch reuses its pinned memory only once the copies that read it are done.
    """
    return torch.tensor(values, dtype=torch.int32, pin_memory=device.type == "cuda")
