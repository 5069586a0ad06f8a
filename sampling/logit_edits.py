"""What a request does to its logits before temperature: its processors, bias, penalties.

The request's own processors come first, so that none undoes what follows. Then, in vLLM's order:
``logit_bias``; the tokens that would end the request become impossible until
``min_tokens``; repetition penalty over prompt and output (a positive logit is divided by it, a
negative one multiplied); frequency penalty times the count in the output; presence penalty once for
each token in the output. Each of these is one fp32 operation on the tokens concerned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import torch
from torch import Tensor

from .processors import apply_processors
from .rows import SamplingRow
from .stopping import ending_token_ids


def edits_logits(row: SamplingRow) -> bool:
    """Whether ``edit_logits`` would change anything."""
    p = row.params
    return bool(
        p.logits_processors
        or p.bias_pairs
        or len(row.output_token_ids) < p.min_tokens
        or p.repetition_penalty != 1.0
        or p.frequency_penalty != 0.0
        or p.presence_penalty != 0.0
    )


def edit_logits(logits: Tensor, row: SamplingRow) -> None:
    """Change one row's logits, fp32 ``[V]``, in place."""
    p = row.params
    if p.logits_processors:
        logits.copy_(apply_processors(logits, row))
    if p.bias_pairs:
        ids, values = zip(*p.bias_pairs, strict=True)
        logits[_index(ids, logits)] += logits.new_tensor(values)
    if len(row.output_token_ids) < p.min_tokens:
        logits[_index(ending_token_ids(p, row.eos_token_ids), logits)] = -torch.inf
    if p.repetition_penalty != 1.0:
        _repetition(logits, {*row.prompt_token_ids, *row.output_token_ids}, p.repetition_penalty)
    if row.output_token_ids and (p.frequency_penalty != 0.0 or p.presence_penalty != 0.0):
        counts = Counter(row.output_token_ids)
        index = _index(counts.keys(), logits)
        times = logits.new_tensor(list(counts.values()))
        logits[index] -= times * p.frequency_penalty
        logits[index] -= p.presence_penalty


def _repetition(logits: Tensor, token_ids: set[int], penalty: float) -> None:
    index = _index(token_ids, logits)
    seen = logits[index]
    # A tensor divisor: by a plain number, torch may multiply by its rounded reciprocal instead.
    divisor = torch.full_like(seen, penalty)
    logits[index] = torch.where(seen > 0, seen / divisor, seen * divisor)


def _index(token_ids: Collection[int], logits: Tensor) -> Tensor:
    return torch.tensor(list(token_ids), dtype=torch.int64, device=logits.device)
