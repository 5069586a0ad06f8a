"""The filters on vocabularies so wide that a short prefix does not always decide."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from isobit.sampling.filters import first_ids, kept_ids
from isobit.sampling.params import SamplingParams

VOCAB = 20_000


def naive_count(probabilities: np.ndarray, params: SamplingParams, slack: float) -> int:
    """How many tokens stay, from fp64 probabilities in descending order.

    ``slack`` moves every threshold a little, relative to itself: down to keep fewer, up for more.
    """
    count = len(probabilities)
    if params.min_p > 0.0:
        threshold = params.min_p * probabilities[0] * (1.0 - slack)
        count = int((probabilities >= threshold).sum())
    if params.top_k > 0:
        count = min(count, params.top_k)
    if params.top_p < 1.0:
        mass = np.cumsum(probabilities[:count])
        needed = params.top_p * mass[-1] * (1.0 + slack)
        count = min(int((mass < needed).sum()) + 1, count)
    return count


CASES = [
    SamplingParams(top_p=0.02),
    SamplingParams(top_p=0.7),
    SamplingParams(top_p=0.995),
    SamplingParams(min_p=0.4),
    SamplingParams(min_p=0.001),
    SamplingParams(min_p=1e-30),
    SamplingParams(top_k=3000),
    SamplingParams(top_k=3000, top_p=0.9),
    SamplingParams(top_k=17_000, top_p=0.9, min_p=0.01),
    SamplingParams(min_p=0.05, top_p=0.5),
    SamplingParams(top_k=VOCAB + 5, top_p=0.8),
]


@pytest.mark.parametrize("params", CASES, ids=lambda p: f"{p.top_k}-{p.top_p}-{p.min_p}")
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_kept_tokens(params: SamplingParams, scale: float) -> None:
    generator = torch.Generator().manual_seed(round(scale * 10))
    for _ in range(3):
        logits = torch.randn(VOCAB, generator=generator) * scale
        kept = kept_ids(logits, torch.log_softmax(logits, 0), params).tolist()
        order = sorted(range(VOCAB), key=lambda t: (-logits[t].item(), t))
        assert kept == order[: len(kept)]
        probabilities = torch.softmax(logits.double(), 0)[order].numpy()
        least = naive_count(probabilities, params, -3e-6)
        most = naive_count(probabilities, params, 3e-6)
        assert least <= len(kept) <= most
        assert most - least < 0.01 * VOCAB


@pytest.mark.parametrize("count", [1, 2, 999, 5000, VOCAB])
def test_ties_are_cut_by_id(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    logits = torch.randint(0, 6, (VOCAB,), generator=generator).float()
    logits[logits == 0] = -0.0  # equal to 0.0, so it must tie with it
    logits[7] = 0.0
    expected = sorted(range(VOCAB), key=lambda t: (-logits[t].item(), t))[:count]
    assert first_ids(logits, count).tolist() == expected
