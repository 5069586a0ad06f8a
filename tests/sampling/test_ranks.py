"""Ranks and the likeliest tokens against a plain sort, where many logits are equal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from isobit.kernels.kernel_set import KernelSet
from isobit.sampling.distribution import Distribution
from isobit.sampling.ranks import RankedRows, rank_tokens

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


def assert_as_sorted(ranked: Sequence[RankedRows], logits: Tensor, logprobs: Tensor) -> None:
    counts, tokens = counts_for(len(logits)), tokens_for(len(logits))
    rows = [i for part in ranked for i in part.rows]
    assert sorted(rows) == [i for i, count in enumerate(counts) if count is not None]
    for part in ranked:
        for at, i in enumerate(part.rows):
            order = naive_order(logits[i])
            assert part.ranks[at] == 1 + order.index(int(tokens[i]))
            assert part.top_ids[at, : counts[i]].tolist() == order[: counts[i]]
            logprobs_of_top = part.top_logprobs[at, : counts[i]]
            assert torch.equal(logprobs_of_top, logprobs[i][order[: counts[i]]])


def ranked_tokens(logits: Tensor, kernels: KernelSet) -> list[RankedRows]:
    rows = len(logits)
    return rank_tokens(Distribution(logits, kernels), tokens_for(rows), counts_for(rows))


@pytest.mark.parametrize("seed", range(3))
def test_ranks_are_places_in_the_sorted_row(seed: int, kernels: KernelSet) -> None:
    logits = all_kinds(seed)
    ranked = ranked_tokens(logits, kernels)
    assert_as_sorted(ranked, logits, kernels.log_softmax(logits))


def test_a_topk_that_breaks_ties_another_way_is_caught(kernels: KernelSet) -> None:
    logits = all_kinds(0)
    wrong = []
    for part in ranked_tokens(logits, kernels):
        order = logits[part.rows].flip(1).sort(dim=1, descending=True, stable=True).indices
        wrong.append(replace(part, top_ids=VOCAB - 1 - order))
    with pytest.raises(AssertionError):
        assert_as_sorted(wrong, logits, kernels.log_softmax(logits))


def test_only_rows_listed_together_are_listed_as_far(kernels: KernelSet) -> None:
    ranked = ranked_tokens(all_kinds(0), kernels)
    assert {part.top_ids.shape[1] for part in ranked} == {0, 1, 7, VOCAB}


def test_nobody_asks(kernels: KernelSet) -> None:
    assert rank_tokens(Distribution(tied_logits(3, 0), kernels), tokens_for(3), [None] * 3) == []
