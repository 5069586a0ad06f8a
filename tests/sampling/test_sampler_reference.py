"""The sampler against the same pipeline written again: fp64, one row at a time, plain Python."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from isobit.kernels.kernel_set import KernelSet
from isobit.sampling.params import SamplingParams
from isobit.sampling.sampler import SamplingRow, sample, score_prompt

EOS = (1,)
CLOSE = 1e-4
"""A decision nearer than this may go either way between fp32 and fp64, and is not judged."""


@dataclass
class Reference:
    token_id: int
    margin: float  # the smallest distance by which any decision was taken


def reference_sample(logits: np.ndarray, row: SamplingRow, noise: np.ndarray) -> Reference:
    p = row.params
    x = logits.astype(np.float64)
    for token_id, bias in p.bias_pairs:
        x[token_id] += bias
    if len(row.output_token_ids) < p.min_tokens:
        x[list(p.stop_ids) + ([] if p.ignore_eos else list(row.eos_token_ids))] = -math.inf
    for t in {*row.prompt_token_ids, *row.output_token_ids}:
        x[t] = x[t] / p.repetition_penalty if x[t] > 0 else x[t] * p.repetition_penalty
    for t in set(row.output_token_ids):
        x[t] -= p.frequency_penalty * list(row.output_token_ids).count(t) + p.presence_penalty
    order = sorted(range(len(x)), key=lambda t: (-x[t], t))
    if p.temperature == 0.0:
        return Reference(order[0], _gap(x, order, 1))
    y = x / p.temperature
    probabilities = np.exp(y - y.max()) / np.exp(y - y.max()).sum()
    kept, margin = _kept(x, probabilities, order, p)
    scores = np.log(probabilities, where=probabilities > 0, out=np.full_like(y, -math.inf)) + noise
    ranked = sorted(kept, key=lambda t: (-scores[t], t))
    return Reference(ranked[0], min(margin, _gap(scores, ranked, 1)))


def _kept(
    x: np.ndarray, probabilities: np.ndarray, order: list[int], p: SamplingParams
) -> tuple[list[int], float]:
    margin = math.inf
    kept = order
    if p.min_p > 0.0:
        threshold = p.min_p * probabilities.max()
        kept = [t for t in kept if probabilities[t] >= threshold]
        margin = min(margin, float(np.abs(probabilities / threshold - 1.0).min()))
    if p.top_k > 0:
        margin = min(margin, _gap(x, kept, p.top_k))
        kept = kept[: p.top_k]
    if p.top_p < 1.0:
        mass = np.cumsum(probabilities[kept])
        needed = p.top_p * mass[-1]
        margin = min(margin, float(np.abs(mass[:-1] - needed).min(initial=math.inf)))
        count = int((mass < needed).sum()) + 1
        margin = min(margin, _gap(x, kept, count))
        kept = kept[:count]
    return kept, margin


def _gap(values: np.ndarray, order: list[int], count: int) -> float:
    """Distance across the cut after ``count``; exact ties are decided by id, so they count too."""
    if count >= len(order):
        return math.inf
    a, b = float(values[order[count - 1]]), float(values[order[count]])
    return math.inf if a == b or not math.isfinite(b) else a - b


def random_params(rng: random.Random, vocab: int) -> SamplingParams:
    def maybe(value: Any, otherwise: Any, chance: float = 0.4) -> Any:
        return value if rng.random() < chance else otherwise

    return SamplingParams(
        temperature=rng.choice([0.0, 0.3, 0.7, 1.0, 1.0, 1.7, 5.0]),
        top_k=maybe(rng.randint(1, vocab + 3), -1),
        top_p=maybe(rng.uniform(0.05, 0.999), 1.0),
        min_p=maybe(rng.uniform(0.001, 0.6), 0.0),
        presence_penalty=maybe(rng.uniform(-2, 2), 0.0, 0.2),
        frequency_penalty=maybe(rng.uniform(-2, 2), 0.0, 0.2),
        repetition_penalty=maybe(rng.uniform(0.6, 2), 1.0, 0.2),
        logit_bias=maybe({rng.randrange(vocab): rng.uniform(-9, 9) for _ in range(3)}, None, 0.2),
        min_tokens=maybe(4, 0, 0.2),
        stop_token_ids=maybe([rng.randrange(vocab)], [], 0.2),
        ignore_eos=rng.random() < 0.3,
        seed=rng.randint(-(2**63), 2**63 - 1),
        logprobs=maybe(rng.randint(0, min(6, vocab)), None),
    )


def random_row(rng: random.Random, vocab: int) -> SamplingRow:
    params = random_params(rng, vocab)
    assert params.seed is not None
    return SamplingRow(
        params=params,
        seed=params.seed,
        choice=rng.randrange(4),
        position=rng.randrange(100_000),
        prompt_token_ids=[rng.randrange(vocab) for _ in range(rng.randrange(8))],
        output_token_ids=[rng.randrange(vocab) for _ in range(rng.randrange(8))],
        eos_token_ids=EOS,
    )


def noise_of(row: SamplingRow, vocab: int, kernels: KernelSet) -> np.ndarray:
    seed, choice, position = (torch.tensor([v]) for v in (row.seed, row.choice, row.position))
    return kernels.gumbel(seed, choice, position, vocab)[0].double().numpy()


@pytest.mark.parametrize(("vocab", "count"), [(5, 1000), (64, 1000), (1237, 300)])
def test_same_tokens_as_the_reference(vocab: int, count: int, kernels: KernelSet) -> None:
    rng = random.Random(vocab)
    rows = [random_row(rng, vocab) for _ in range(count)]
    logits = torch.randn(len(rows), vocab, generator=torch.Generator().manual_seed(vocab)) * 3
    untouched = logits.clone()
    sampled = sample(logits, rows, kernels).read()
    assert torch.equal(logits, untouched)
    judged = 0
    for i, row in enumerate(rows):
        expected = reference_sample(logits[i].numpy(), row, noise_of(row, vocab, kernels))
        if expected.margin > CLOSE:
            judged += 1
            assert sampled[i].token_id == expected.token_id, row
    assert judged > 0.95 * len(rows)


def test_ties_go_to_the_lowest_id(kernels: KernelSet) -> None:
    """Few distinct logits and powers of two: every tie is exact in fp32 and in fp64."""
    vocab, rng = 48, random.Random(3)
    rows = []
    for _ in range(600):
        params = SamplingParams(
            temperature=rng.choice([0.0, 0.5, 1.0, 2.0]),
            top_k=rng.choice([-1, 1, 2, 7, 30]),
            top_p=rng.choice([1.0, 0.5, 0.83]),
            logprobs=9,
        )
        rows.append(
            SamplingRow(
                params=params,
                seed=rng.randrange(1000),
                choice=0,
                position=rng.randrange(1000),
                prompt_token_ids=(),
                output_token_ids=(),
                eos_token_ids=EOS,
            )
        )
    generator = torch.Generator().manual_seed(3)
    logits = torch.randint(-2, 3, (len(rows), vocab), generator=generator).float()
    for i, result in enumerate(sample(logits, rows, kernels).read()):
        x = logits[i].numpy()
        expected = reference_sample(x, rows[i], noise_of(rows[i], vocab, kernels))
        if expected.margin > CLOSE:
            assert result.token_id == expected.token_id
        order = sorted(range(vocab), key=lambda t: (-x[t], t))
        assert [token_id for token_id, _ in result.top] == order[:9]
        assert result.rank == order.index(result.token_id) + 1


def test_top_k_1_is_greedy(kernels: KernelSet) -> None:
    """Also where temperature makes neighbouring logits equal: filters order by the logits."""
    logits = torch.full((200, 40), 1.9)
    logits[:, 7] = torch.nextafter(torch.tensor(1.9), torch.tensor(2.0))
    row = SamplingRow(
        params=SamplingParams(top_k=1, temperature=1.5),
        seed=1,
        choice=0,
        position=0,
        prompt_token_ids=(),
        output_token_ids=(),
        eos_token_ids=EOS,
    )
    assert {r.token_id for r in sample(logits, [row] * 200, kernels).read()} == {7}


def test_logprobs_are_of_the_raw_distribution(kernels: KernelSet) -> None:
    vocab, rng = 300, random.Random(8)
    logits = torch.randn(64, vocab, generator=torch.Generator().manual_seed(8)) * 4
    rows = [random_row(rng, vocab) for _ in range(64)]
    expected = torch.log_softmax(logits.double(), dim=-1)
    for i, result in enumerate(sample(logits, rows, kernels).read()):
        assert result.logprob == pytest.approx(expected[i, result.token_id].item(), abs=1e-5)
        wanted = rows[i].params.logprobs
        assert len(result.top) == (wanted or 0)
        assert (result.rank is None) == (wanted is None)
        for token_id, logprob in result.top:
            assert logprob == pytest.approx(expected[i, token_id].item(), abs=1e-5)


def test_scoring_a_prompt_reports_the_bits_that_sampling_reported(kernels: KernelSet) -> None:
    vocab, rng = 300, random.Random(9)
    logits = torch.randn(64, vocab, generator=torch.Generator().manual_seed(9)) * 4
    rows = [random_row(rng, vocab) for _ in range(64)]
    sampled = sample(logits, rows, kernels).read()
    scored = score_prompt(
        logits, [r.token_id for r in sampled], [row.params.logprobs for row in rows], kernels
    ).read()
    assert scored == sampled  # floats compare by value; fp32 logprobs are never -0.0 and 0.0 both
