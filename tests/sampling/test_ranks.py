"""Ranks and the likeliest tokens against a plain sort, where many logits are equal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from isobit.kernels.kernel_set import KernelSet
from isobit.sampling.distribution import Distribution
from isobit.sampling.ranks import Ranks, rank_tokens

VOCAB = 131


def tied_logits(rows: int, seed: int) -> Tensor:
    """A few values, both zeros, and impossible tokens."""
    x = torch.randint(-3, 4, (rows, VOCAB), generator=torch.Generator().manual_seed(seed)) / 2
    x[:, ::3] *= -1.0  # turns some zeros into -0
    x[:, 5::7] = -torch.inf
    return x


def all_kinds(seed: int) -> Tensor:
    extremes = [3e38, -3e38, 1e-45, -1e-45, 0.0, -0.0, -torch.inf, 1.0, 1.0]
    rare = torch.tensor(extremes * 15)[:VOCAB].repeat(20, 1)
    spread = torch.randn(20, VOCAB, generator=torch.Generator().manual_seed(seed)) * 5
    return torch.cat((tied_logits(60, seed), rare, spread))


def counts_for(rows: int) -> list[int | None]:
    return [(None, 0, 1, 7, VOCAB)[i % 5] for i in range(rows)]


def tokens_for(rows: int) -> Tensor:
    return torch.arange(rows) * 17 % VOCAB


def naive_order(logits: Tensor) -> list[int]:
    return sorted(range(len(logits)), key=lambda t: (-logits[t].item(), t))


def assert_as_sorted(ranks: Ranks, logits: Tensor, logprobs: Tensor) -> None:
    asked = [(i, n) for i, n in enumerate(counts_for(len(logits))) if n is not None]
    for at, (i, count) in enumerate(asked):
        order = naive_order(logits[i])
        assert ranks.ranks[at] == 1 + order.index(int(tokens_for(len(logits))[i]))
        assert ranks.top_ids[at, :count].tolist() == order[:count]
        assert torch.equal(ranks.top_logprobs[at, :count], logprobs[i][order[:count]])


@pytest.mark.parametrize("seed", range(3))
def test_ranks_are_places_in_the_sorted_row(seed: int, kernels: KernelSet) -> None:
    logits = all_kinds(seed)
    model = Distribution(logits, kernels)
    ranks = rank_tokens(model, tokens_for(len(logits)), counts_for(len(logits)))
    assert_as_sorted(ranks, logits, kernels.log_softmax(logits))


def test_a_topk_that_breaks_ties_another_way_is_caught(kernels: KernelSet) -> None:
    logits = all_kinds(0)
    model = Distribution(logits, kernels)
    ranks = rank_tokens(model, tokens_for(len(logits)), counts_for(len(logits)))
    asked = [i for i, count in enumerate(counts_for(len(logits))) if count is not None]
    order = logits[asked].flip(1).sort(dim=1, descending=True, stable=True).indices
    wrong = Ranks(ranks.ranks, VOCAB - 1 - order, ranks.top_logprobs)
    with pytest.raises(AssertionError):
        assert_as_sorted(wrong, logits, kernels.log_softmax(logits))


def test_nobody_asks(kernels: KernelSet) -> None:
    ranks = rank_tokens(Distribution(tied_logits(3, 0), kernels), tokens_for(3), [None] * 3)
    assert ranks.ranks.shape == (0,)
    assert ranks.top_ids.shape == ranks.top_logprobs.shape == (0, 0)
