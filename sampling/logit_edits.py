"""What requests do to their logits before temperature: their processors, bias, penalties.

A request's own processors come first, so that none undoes what follows. Then, in vLLM's order:
``logit_bias``; the tokens that would end the request become impossible until
``min_tokens``; repetition penalty over prompt and output (a positive logit is divided by it, a
negative one multiplied); frequency penalty times the count in the output; presence penalty once for
each token in the output. Each of these is one fp32 operation on the tokens concerned, for all rows
at once. All but the processors are launched without a wait: a token that the host does not know yet
is taken from the device, and is counted to the same bits.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..kernels.transfer import parts_to_device, to_device
from .processors import apply_processors
from .rows import SamplingRow
from .stopping import ending_token_ids
from .token_counts import TokenCounts, has_penalties

_ROWS = 32
"""Rows penalised at once: their tokens take memory."""


def edits_logits(row: SamplingRow) -> bool:
    """Whether ``edit_logits`` would change anything."""
    p = row.params
    return bool(p.processors or p.bias_pairs or has_penalties(p) or _is_short(row))


def edit_logits(logits: Tensor, rows: Sequence[SamplingRow], last_tokens: Tensor | None) -> None:
    """Change the rows' logits, fp32 ``[R, V]``, in place.

    last_tokens: int64 ``[R]`` on the device, the token of each row that is pending; not None
        where one is

    :raises LogitsProcessorError: a row's own processor failed.
    """
    for i, row in enumerate(rows):
        if row.params.processors:
            logits[i].copy_(apply_processors(logits[i], row))
    _add_bias(logits, rows)
    _rule_out_the_end(logits, rows)
    penalised = [i for i, row in enumerate(rows) if has_penalties(row.params)]
    for begin in range(0, len(penalised), _ROWS):
        _penalise(logits, rows, penalised[begin : begin + _ROWS], last_tokens)


def _add_bias(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    pairs = [(i, *pair) for i, row in enumerate(rows) for pair in row.params.bias_pairs]
    if pairs:
        row_of, ids, biases = zip(*pairs, strict=True)
        at = tuple(parts_to_device([row_of, ids], torch.int64, logits.device))
        bias = to_device(biases, logits.dtype, logits.device)
        logits.index_put_(at, logits[at] + bias)


def _rule_out_the_end(logits: Tensor, rows: Sequence[SamplingRow]) -> None:
    ends = [
        (i, token_id)
        for i, row in enumerate(rows)
        if _is_short(row)
        for token_id in ending_token_ids(row.params, row.eos_token_ids)
    ]
    if ends:
        row_of, ids = zip(*ends, strict=True)
        at = tuple(parts_to_device([row_of, ids], torch.int64, logits.device))
        logits.index_put_(at, logits.new_full((), -torch.inf))


def _is_short(row: SamplingRow) -> bool:
    return row.num_output_tokens < row.params.min_tokens


def _penalise(
    logits: Tensor, rows: Sequence[SamplingRow], which: list[int], last_tokens: Tensor | None
) -> None:
    """All three penalties on the rows ``which``, each token of a row once."""
    device = logits.device
    owner, ids, counts = _listed([rows[i] for i in which], device)
    pending = [place for place, i in enumerate(which) if rows[i].pending]
    row_of, places = parts_to_device([which, pending], torch.int64, device)
    if pending and last_tokens is not None:
        latest = torch.full_like(row_of, -1).scatter(0, places, last_tokens[row_of[places]])
        again = ids == latest[owner]
        earlier = torch.zeros_like(row_of).index_add_(0, owner, counts * again)
        # A pending token that the host has listed too is there twice, with the same count: it is
        # computed twice, out of the same logit, to the same bits.
        ids = torch.cat((ids, latest[places]))
        counts = torch.cat((counts + again, earlier[places] + 1))
        owner = torch.cat((owner, places))
    params = [rows[i].params for i in which]
    repetition, frequency, presence = (
        part[owner]
        for part in parts_to_device(
            [
                [p.repetition_penalty for p in params],
                [p.frequency_penalty for p in params],
                [p.presence_penalty for p in params],
            ],
            logits.dtype,
            device,
        )
    )
    at = (row_of[owner], ids)
    x = logits[at]
    x = torch.where(x > 0, x / repetition, x * repetition)
    fewer = x - counts.to(x.dtype) * frequency
    logits.index_put_(at, torch.where(counts > 0, fewer - presence, x))


def _listed(rows: Sequence[SamplingRow], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Every token that the host knows of the rows, as int64 ``[N]``: its row, its id, its count."""
    ids, counts, lengths = array("i"), array("i"), []
    for row in rows:
        known = row.counts or TokenCounts(row.params, row.prompt_token_ids)
        known.update(row.output_token_ids)
        ids += known.ids
        counts += known.counts
        lengths.append(len(known.ids))
    both = to_device(np.array((ids, counts)), torch.int32, device).long()
    repeats = to_device(lengths, torch.int64, device)
    places = torch.arange(len(rows), device=device)
    owner = places.repeat_interleave(repeats, output_size=len(ids))
    return owner, both[0], both[1]
