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
from .filters import first_ids, has_filters, kept_ids
from .logit_edits import edit_logits, edits_logits
from .rows import SampledRow, SamplingRow

__all__ = ["SampledRow", "SamplingRow", "sample", "score_prompt"]


def sample(logits: Tensor, rows: Sequence[SamplingRow], kernels: KernelSet) -> list[SampledRow]:
    """Draw the next token of every row and report its logprobs.

    logits: fp32 ``[R, V]``, row ``i`` belongs to ``rows[i]``; left unchanged

    :raises EngineError: where a row holds NaN or +inf, or no possible token.
    :raises LogitsProcessorError: where a row's own processor fails.
    """
    if not rows:
        return []
    highest = logits.amax(dim=1)  # NaN where the row holds one
    if kernels.choose is None:
        _refuse_bad(highest.tolist())
    logprobs = kernels.log_softmax(logits)
    chosen, scores = _choose(logits, logprobs, rows, kernels)
    # Where no token is possible the id means nothing, and must not lead out of the row.
    own = _of_each(logprobs, chosen.clamp(max=logits.shape[1] - 1))
    # One copy to the host: fp64 holds every id and every fp32 number as it is.
    read = torch.stack([part.double() for part in (highest, scores, chosen, own)]).tolist()
    _refuse_bad(read[0])
    _refuse_impossible(read[1])
    token_ids = [int(token_id) for token_id in read[2]]
    return _report(logits, logprobs, token_ids, read[3], [row.params.logprobs for row in rows])


def score_prompt(
    logits: Tensor, targets: Sequence[int], num_top: Sequence[int | None], kernels: KernelSet
) -> list[SampledRow]:
    """Report given tokens exactly as ``sample`` reports those it draws.

    logits:  fp32 ``[R, V]``; row ``i`` predicts ``targets[i]``
    num_top: how many of the likeliest tokens to list per row; None leaves the rank out too

    :raises EngineError: where a row holds NaN or +inf.
    """
    if not targets:
        return []
    _refuse_bad(logits.amax(dim=1).tolist())
    logprobs = kernels.log_softmax(logits)
    index = torch.tensor(targets, dtype=torch.int64, device=logits.device)
    return _report(logits, logprobs, targets, _of_each(logprobs, index).tolist(), num_top)


def _choose(
    logits: Tensor, logprobs: Tensor, rows: Sequence[SamplingRow], kernels: KernelSet
) -> tuple[Tensor, Tensor]:
    """Token ids int64 ``[R]`` and their scores fp32 ``[R]``, not finite where none is possible."""
    edited = {i for i, row in enumerate(rows) if edits_logits(row)}
    if edited:
        logits = logits.clone()
        for i in edited:
            edit_logits(logits[i], rows[i])
    if kernels.choose is not None:
        return kernels.choose(logits, _draw(rows, logits))
    chosen, best = _highest(logits)
    _refuse_impossible(best.tolist())
    drawn = [i for i, row in enumerate(rows) if not row.params.greedy]
    if drawn:
        tempered = logprobs[drawn]
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
    vocab = logits.shape[1]
    params = [row.params for row in rows]

    def column(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(logits.device)

    return Draw(
        temperatures=column([p.temperature for p in params], torch.float32),
        top_k=column([p.top_k if p.top_k > 0 else vocab for p in params], torch.int64),
        top_p=column([p.top_p for p in params], torch.float64),
        min_p=column([p.min_p for p in params], torch.float32),
        filtered=column(
            [i for i, p in enumerate(params) if has_filters(p) and not p.greedy], torch.int64
        ),
        seeds=column([row.seed for row in rows], torch.int64),
        choices=column([row.choice for row in rows], torch.int64),
        positions=column([row.position for row in rows], torch.int64),
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
    return index, _of_each(scores, index)


def _of_each(rows: Tensor, index: Tensor) -> Tensor:
    """One value of every row, by its index."""
    return rows.gather(1, index.unsqueeze(1)).squeeze(1)


def _refuse_impossible(best: Sequence[float]) -> None:
    for i, score in enumerate(best):
        if not isfinite(score):
            raise EngineError(
                f"Row {i} leaves no token to choose: its best score is {score}. Either "
                "min_tokens rules out the whole vocabulary, or the logits overflowed."
            )


def _refuse_bad(highest: Sequence[float]) -> None:
    for i, value in enumerate(highest):
        if not isfinite(value):
            raise EngineError(
                f"Row {i} of the logits is not usable: wanted finite values (or -inf for "
                f"impossible tokens), its maximum is {value}. The model or its weights produced it."
            )


def _report(
    logits: Tensor,
    logprobs: Tensor,
    token_ids: Sequence[int],
    own: Sequence[float],
    num_top: Sequence[int | None],
) -> list[SampledRow]:
    report = []
    for i, (token_id, count) in enumerate(zip(token_ids, num_top, strict=True)):
        rank = None if count is None else _rank(logits[i], token_id)
        top = _top(logits[i], logprobs[i], count) if count else ()
        report.append(SampledRow(token_id, own[i], rank, top))
    return report


def _rank(logits: Tensor, token_id: int) -> int:
    """1 + the tokens with a higher logit, or an equal one and a lower id."""
    value = logits[token_id]
    before = torch.count_nonzero(logits[:token_id] >= value)
    return 1 + int(before + torch.count_nonzero(logits[token_id + 1 :] > value))


def _top(logits: Tensor, logprobs: Tensor, count: int) -> tuple[tuple[int, float], ...]:
    """(token id, logprob) of the ``count`` highest logits, ties by lowest id."""
    ids = first_ids(logits, count)
    return tuple(zip(ids.tolist(), logprobs[ids].tolist(), strict=True))
