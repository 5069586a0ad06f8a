"""Drawn tokens follow the probabilities that temperature and filters leave (chi-square)."""

from __future__ import annotations

import math

import pytest
import torch

from isobit.kernels.kernel_set import KernelSet
from isobit.sampling.params import SamplingParams
from isobit.sampling.sampler import SamplingRow, sample

LOGITS = torch.tensor([1.2, -0.3, 0.4, 2.0, 0.1, -1.0, 0.9, 1.5, -0.2, 0.0, 0.6, -0.7])
DRAWS = 6000


def draws(params: SamplingParams, kernels: KernelSet, vary: str) -> torch.Tensor:
    """How often each token came, over ``DRAWS`` values of one of the noise's keys."""
    rows = []
    for i in range(DRAWS):
        key = {"seed": 7, "choice": 0, "position": 11} | {vary: i}
        row = SamplingRow(
            params=params, prompt_token_ids=(), output_token_ids=(), eos_token_ids=(), **key
        )
        rows.append(row)
    sampled = sample(LOGITS.repeat(DRAWS, 1), rows, kernels).read()
    return torch.bincount(torch.tensor([r.token_id for r in sampled]), minlength=len(LOGITS))


def chi_square(counts: torch.Tensor, probabilities: torch.Tensor) -> tuple[float, float]:
    """The statistic, and the bound that one fair sampler in 10,000 exceeds (Wilson-Hilferty)."""
    possible = probabilities > 0
    assert int(counts[~possible].sum()) == 0, "a token that was filtered out was drawn"
    expected = probabilities[possible] * DRAWS
    degrees = int(possible.sum()) - 1
    statistic = float(((counts[possible] - expected) ** 2 / expected).sum())
    h = 2 / (9 * degrees)
    return statistic, degrees * (1 - h + 3.719 * math.sqrt(h)) ** 3


CASES = [  # with the number of tokens that stay, worked out by hand
    (SamplingParams(), 12),
    (SamplingParams(temperature=0.6), 12),
    (SamplingParams(temperature=2.5), 12),
    (SamplingParams(top_k=4), 4),
    (SamplingParams(top_p=0.6), 4),
    (SamplingParams(min_p=0.3), 4),
    (SamplingParams(top_k=6, top_p=0.7, min_p=0.1, temperature=1.4), 4),
]


def kept_probabilities(params: SamplingParams, kept: int) -> torch.Tensor:
    probabilities = torch.softmax(LOGITS.double() / params.temperature, dim=0)
    probabilities[LOGITS.argsort(descending=True)[kept:]] = 0.0
    return probabilities / probabilities.sum()


@pytest.mark.parametrize(("params", "kept"), CASES)
def test_positions_follow_the_distribution(
    params: SamplingParams, kept: int, kernels: KernelSet
) -> None:
    statistic, bound = chi_square(
        draws(params, kernels, "position"), kept_probabilities(params, kept)
    )
    assert statistic < bound


@pytest.mark.parametrize("vary", ["seed", "choice"])
def test_seeds_and_choices_follow_it_too(vary: str, kernels: KernelSet) -> None:
    params = SamplingParams()
    statistic, bound = chi_square(draws(params, kernels, vary), kept_probabilities(params, 12))
    assert statistic < bound


def test_a_wrong_temperature_is_caught(kernels: KernelSet) -> None:
    counts = draws(SamplingParams(temperature=0.9), kernels, "position")
    statistic, bound = chi_square(counts, kept_probabilities(SamplingParams(), 12))
    assert statistic > bound
