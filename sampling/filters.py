"""top-k, top-p and min-p: which tokens of a row may be drawn.

All three keep a prefix of the tokens in descending order of logit, ties by lowest id. In vLLM's
order:

min_p: tokens at least ``min_p`` times as likely as the likeliest;
top_k: the first ``top_k`` of those;
top_p: of those, the shortest prefix whose share of their probability reaches ``top_p``.

Probabilities are the row's own, after temperature. They are added as 52-bit fixed-point integers:
integer sums have no rounding, so they are the same in any order, on any device and thread count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.elementary import exp_f32
from .params import SamplingParams

_ONE = 2.0**52  # a row's mass is about one, so its sums are exact in fp64 too
_FIRST_WIDTH = 1024
_GROWTH = 16


def has_filters(params: SamplingParams) -> bool:
    """Whether any filter is on."""
    return params.top_k > 0 or params.top_p < 1.0 or params.min_p > 0.0


def kept_ids(logits: Tensor, logprobs: Tensor, params: SamplingParams) -> Tensor:
    """The tokens of one row that may be drawn; always at least the likeliest.

    logits:   fp32 ``[V]``, before temperature: they give the order (temperature would only merge
              neighbours by rounding)
    logprobs: fp32 ``[V]``, log-softmax after temperature: they give the probabilities
    returns:  int64 ``[kept]``
    """
    vocab = logits.shape[0]
    limit = min(params.top_k, vocab) if params.top_k > 0 else vocab
    if params.min_p == 0.0 and params.top_p == 1.0:
        return first_ids(logits, limit)
    # Most rows keep few tokens: order a short prefix, and widen it until it decides. Tokens with
    # equal logits are equally likely, so it does not matter how topk orders them.
    width = min(_FIRST_WIDTH, limit)
    while True:
        probabilities = exp_f32(logprobs[logits.topk(width).indices])
        count = _num_kept(probabilities, params, limit, vocab)
        if count is not None:
            return first_ids(logits, count)
        width = min(width * _GROWTH, limit)


def first_ids(logits: Tensor, count: int) -> Tensor:
    """The ``count`` highest of fp32 ``[V]``, ties by lowest id; int64, highest first."""
    values, ids = logits.topk(count)
    # topk leaves open which of the tokens level with the last one it takes.
    above = ids[values > values[-1]]
    level = (logits == values[-1]).nonzero().flatten()[: count - above.shape[0]]
    above = above.sort().values
    return torch.cat((above[logits[above].sort(descending=True, stable=True).indices], level))


def _num_kept(prefix: Tensor, params: SamplingParams, limit: int, vocab: int) -> int | None:
    """How many tokens stay, from the probabilities of the likeliest; None if those are too few.

    prefix: fp32, descending; ``limit`` tokens at most are allowed by top-k
    """
    count = width = prefix.shape[0]
    settled = width == limit
    if params.min_p > 0.0:
        unlikely = (prefix < prefix[0] * params.min_p).nonzero()
        if unlikely.shape[0] > 0:
            count, settled = int(unlikely[0]), True
    if params.top_p == 1.0:
        return count if settled else None
    alone = limit == vocab and params.min_p == 0.0  # then the whole probability is one
    if not (settled or alone):
        return None
    mass = (prefix[:count].double() * _ONE).long().cumsum(0)
    needed = params.top_p * (_ONE if alone else float(mass[-1]))
    if mass[-1] < needed and not settled:
        return None
    return min(int(torch.count_nonzero(mass < needed)) + 1, count)
