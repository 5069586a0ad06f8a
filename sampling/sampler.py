"""From logits to tokens, by the Gumbel-max trick.

A token is ``argmax(log_softmax(edited logits / temperature) + noise)`` over the tokens that the
request's filters keep. Gumbel noise is keyed by (seed, choice, position) and *vocabulary id*: a
token's noise is the same whatever is sorted, filtered or batched beside it. Ties go to the lowest
id. Temperature 0 is the argmax of the edited logits, which no filter could change.

Order, as in vLLM: ``logit_edits`` (processors, bias, ``min_tokens``, penalties), temperature,
``filters`` (min-p, top-k, top-p). Every operation on a row gives the bits it would give to that row
alone: the kernels by contract, the processors because they see that row alone, the rest because
elementwise arithmetic, comparisons, maxima and integer counts do not depend on shape or threads. No
global random generator is read or set.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

from ..errors import EngineError
from ..kernels.kernel_set import Draw, KernelSet
from ..kernels.transfer import parts_to_device, to_device
from .distribution import Distribution
from .filters import has_filters, kept_ids
from .logit_edits import edit_logits, edits_logits
from .ranks import rank_tokens
from .rows import SampledRow, SamplingRow, needs_tokens
from .sampled import Sampled, refuse_unusable

__all__ = ["Sampled", "SampledRow", "SamplingRow", "sample", "score_prompt"]


def sample(
    logits: Tensor,
    rows: Sequence[SamplingRow],
    kernels: KernelSet,
    last_tokens: Tensor | None = None,
) -> Sampled:
    """Draw the next token of every row; its tokens and their logprobs are there once read.

    On a CUDA device nothing is waited for, but for rows with logits processors of their own.

    logits: fp32 ``[R, V]``, row ``i`` belongs to ``rows[i]``; left unchanged
    last_tokens: int64 ``[R]`` on the logits' device, the last output token of each row that is
        pending; other entries mean nothing

    :raises EngineError: a row is pending and there are no ``last_tokens``, or it has processors;
        or the logits that processors would be given hold NaN or +inf.
    :raises LogitsProcessorError: where a row's own processor fails.
    """
    _check_pending(rows, last_tokens)
    highest = logits.amax(dim=1)  # NaN where the row holds one
    if any(needs_tokens(row.params) for row in rows):
        refuse_unusable(highest)
    model = Distribution(logits, kernels)
    chosen, scores = _choose(model, rows, kernels, last_tokens)
    # Where no token is possible the id means nothing, and must not lead out of the row.
    chosen = chosen.clamp(max=logits.shape[1] - 1)
    num_top = [row.params.logprobs for row in rows]
    ranked = rank_tokens(model, chosen, num_top)
    return Sampled(chosen, highest, scores, model.of_each(chosen), num_top, ranked)


def score_prompt(
    logits: Tensor, targets: Sequence[int], num_top: Sequence[int | None], kernels: KernelSet
) -> Sampled:
    """Report given tokens exactly as ``sample`` reports those it draws.

    logits:  fp32 ``[R, V]``; row ``i`` predicts ``targets[i]``
    num_top: how many of the likeliest tokens to list per row; None leaves the rank out too
    """
    highest = logits.amax(dim=1)
    model = Distribution(logits, kernels)
    given = to_device(targets, torch.int64, logits.device)
    ranked = rank_tokens(model, given, num_top)
    return Sampled(given, highest, highest, model.of_each(given), num_top, ranked)


def _check_pending(rows: Sequence[SamplingRow], last_tokens: Tensor | None) -> None:
    for i, row in enumerate(rows):
        if row.pending and last_tokens is None:
            raise EngineError(
                f"Row {i} has a pending token: wanted last_tokens to take it from, given None. "
                "Pass the device's tokens of the step before."
            )
        if row.pending and needs_tokens(row.params):
            raise EngineError(
                f"Row {i} has a pending token: wanted one that the host knows, as its logits "
                "processors are given all tokens. Read the step before first."
            )


def _choose(
    model: Distribution,
    rows: Sequence[SamplingRow],
    kernels: KernelSet,
    last_tokens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Token ids int64 ``[R]`` and their scores fp32 ``[R]``, not finite where none is possible."""
    logits = model.logits
    edited = {i for i, row in enumerate(rows) if edits_logits(row)}
    if edited:
        logits = logits.clone()
        edit_logits(logits, rows, last_tokens)
    if kernels.choose is not None:
        return kernels.choose(logits, _draw(rows, logits))
    chosen, best = _highest(logits)
    # A row without a possible token is refused once it is read, and needs no draw.
    possible = [isfinite(score) for score in best.tolist()]
    drawn = [i for i, row in enumerate(rows) if possible[i] and not row.params.greedy]
    if drawn:
        tempered = model.whole()[drawn]
        # A row with neither edits nor temperature keeps the log-softmax that it already has.
        warm = [j for j, i in enumerate(drawn) if i in edited or rows[i].params.temperature != 1.0]
        if warm:
            tempered[warm] = _tempered(logits, [drawn[j] for j in warm], rows, kernels)
        scores = tempered + _noise([rows[i] for i in drawn], logits, kernels)
        for j, i in enumerate(drawn):
            if has_filters(rows[i].params):
                ids = kept_ids(logits[i], tempered[j], rows[i].params)
                scores[j] = torch.full_like(scores[j], -torch.inf).scatter(0, ids, scores[j][ids])
        chosen[drawn], best[drawn] = _highest(scores)
    return chosen, best


def _draw(rows: Sequence[SamplingRow], logits: Tensor) -> Draw:
    """The rows' parameters side by side, on the logits' device."""
    vocab, device = logits.shape[1], logits.device
    params = [row.params for row in rows]
    temperatures, top_p, min_p = parts_to_device(
        [[p.temperature for p in params], [p.top_p for p in params], [p.min_p for p in params]],
        torch.float64,
        device,
    )
    top_k, filtered, seeds, choices, positions = parts_to_device(
        [
            [p.top_k if p.top_k > 0 else vocab for p in params],
            [i for i, p in enumerate(params) if has_filters(p) and not p.greedy],
            [row.seed for row in rows],
            [row.choice for row in rows],
            [row.position for row in rows],
        ],
        torch.int64,
        device,
    )
    return Draw(
        temperatures=temperatures.float(),
        top_k=top_k,
        top_p=top_p,
        min_p=min_p.float(),
        filtered=filtered,
        seeds=seeds,
        choices=choices,
        positions=positions,
    )


def _tempered(
    logits: Tensor, which: list[int], rows: Sequence[SamplingRow], kernels: KernelSet
) -> Tensor:
    """log_softmax(logits / temperature) of some rows."""
    # A tensor divisor: by a plain number, torch may multiply by its rounded reciprocal instead.
    temperatures = logits.new_tensor([[rows[i].params.temperature] for i in which])
    return kernels.log_softmax(logits[which] / temperatures)


def _noise(rows: Sequence[SamplingRow], logits: Tensor, kernels: KernelSet) -> Tensor:
    """Gumbel noise, fp32 ``[len(rows), V]``."""
    keys = torch.tensor([[row.seed, row.choice, row.position] for row in rows], dtype=torch.int64)
    seeds, choices, positions = keys.to(logits.device).unbind(1)
    return kernels.gumbel(seeds, choices, positions, logits.shape[1])


def _highest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The highest of each row, its index and itself; torch documents the first of equals."""
    index = scores.argmax(dim=1)
    return index, scores.gather(1, index.unsqueeze(1)).squeeze(1)
