"""Neighbours, order and threads change no bit of a row; and the checks can fail."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isobit.errors import EngineError
from isobit.kernels.kernel_set import KernelSet
from isobit.sampling.filters import has_filters, kept_ids
from isobit.sampling.params import SamplingParams
from isobit.sampling.sampler import SampledRow, SamplingRow, sample

Sampler = Callable[[Tensor, Sequence[SamplingRow], KernelSet], list[SampledRow]]
VOCAB = 301  # no multiple of a vector width: a tail that moves with the shape would show


def bits(row: SampledRow) -> tuple[object, ...]:
    floats = (row.logprob, *(logprob for _, logprob in row.top))
    return (
        row.token_id,
        row.rank,
        [t for t, _ in row.top],
        struct.pack(f"{len(floats)}d", *floats),
    )


params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.6, 1.0, 1.3]),
    top_k=st.sampled_from([-1, -1, 1, 5, 200]),
    top_p=st.sampled_from([1.0, 1.0, 0.4, 0.95]),
    min_p=st.sampled_from([0.0, 0.0, 0.05]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    frequency_penalty=st.sampled_from([0.0, 0.3]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    logit_bias=st.sampled_from([None, {3: 2.5, 300: -1.0}]),
    min_tokens=st.sampled_from([0, 5]),
    logprobs=st.sampled_from([None, 0, 4]),
)
rows = st.builds(
    SamplingRow,
    params=params,
    seed=st.integers(-(2**63), 2**63 - 1),
    choice=st.integers(0, 3),
    position=st.integers(0, 2**31),
    prompt_token_ids=st.lists(st.integers(0, VOCAB - 1), max_size=5),
    output_token_ids=st.lists(st.integers(0, VOCAB - 1), max_size=5),
    eos_token_ids=st.just((0, 2)),
)


def read_sample(
    logits: Tensor, batch: Sequence[SamplingRow], kernels: KernelSet
) -> list[SampledRow]:
    return sample(logits, batch, kernels).read()


def logits_for(count: int, seed: int, vocab: int = VOCAB) -> Tensor:
    return torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed)) * 2.5


def assert_neighbours_change_nothing(
    sampler: Sampler, batch: list[SamplingRow], logits: Tensor, order: list[int], kernels: KernelSet
) -> None:
    together = [bits(r) for r in sampler(logits, batch, kernels)]
    alone = [bits(sampler(logits[i : i + 1], [batch[i]], kernels)[0]) for i in range(len(batch))]
    shuffled = sampler(logits[order].clone(), [batch[i] for i in order], kernels)
    assert together == alone
    assert [together[i] for i in order] == [bits(r) for r in shuffled]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_neighbours_change_nothing(kernels: KernelSet, data: st.DataObject) -> None:
    batch = data.draw(st.lists(rows, min_size=1, max_size=19))
    order = data.draw(st.permutations(range(len(batch))))
    logits = logits_for(len(batch), data.draw(st.integers(0, 2**20)))
    assert_neighbours_change_nothing(read_sample, batch, logits, order, kernels)


def mixed_batch(count: int, vocab: int) -> list[SamplingRow]:
    rng = random.Random(count)
    return [
        SamplingRow(
            params=SamplingParams(
                temperature=rng.choice([0.0, 0.8, 1.0]),
                top_p=rng.choice([1.0, 0.9, 0.999]),
                top_k=rng.choice([-1, 50]),
                min_p=rng.choice([0.0, 0.02]),
                repetition_penalty=rng.choice([1.0, 1.1]),
                logprobs=rng.choice([None, 5]),
            ),
            seed=rng.randrange(10**9),
            choice=0,
            position=i,
            prompt_token_ids=[rng.randrange(vocab) for _ in range(30)],
            output_token_ids=[],
            eos_token_ids=(2,),
        )
        for i in range(count)
    ]


def test_real_vocabulary_rows_and_threads_change_nothing(kernels: KernelSet) -> None:
    vocab = 49_152
    batch, logits = mixed_batch(8, vocab), logits_for(8, 5, vocab)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = [bits(r) for r in sample(logits, batch, kernels).read()]
        torch.set_num_threads(2)
        two = [bits(r) for r in sample(logits, batch, kernels).read()]
        alone = [bits(sample(logits[i : i + 1], [batch[i]], kernels).read()[0]) for i in range(8)]
    finally:
        torch.set_num_threads(before)
    assert one == two == alone


def sample_by_rank(
    logits: Tensor, batch: Sequence[SamplingRow], kernels: KernelSet
) -> list[SampledRow]:
    """The known fault: once any row has a filter, all are sorted and noise goes by rank."""
    if not any(has_filters(row.params) for row in batch):
        return sample(logits, batch, kernels).read()
    results = []
    for x, row in zip(logits, batch, strict=True):
        p = row.params
        ordered, ids = x.sort(descending=True, stable=True)
        key = [torch.tensor([v]) for v in (row.seed, row.choice, row.position)]
        noise = kernels.gumbel(*key, x.shape[0])[0]
        scores = ordered if p.greedy else ordered / p.temperature + noise
        kept = kept_ids(x, kernels.log_softmax(x[None])[0], p)
        scores[~torch.isin(ids, kept)] = -torch.inf
        token_id = int(ids[scores.argmax()])
        results.append(SampledRow(token_id, 0.0, None, ()))
    return results


def sample_by_row(
    logits: Tensor, batch: Sequence[SamplingRow], kernels: KernelSet
) -> list[SampledRow]:
    """Another fault: the noise of a row depends on its place in the batch."""
    moved = [
        SamplingRow(
            params=row.params,
            seed=row.seed,
            choice=row.choice,
            position=row.position + i,
            prompt_token_ids=row.prompt_token_ids,
            output_token_ids=row.output_token_ids,
            eos_token_ids=row.eos_token_ids,
        )
        for i, row in enumerate(batch)
    ]
    return sample(logits, moved, kernels).read()


@pytest.mark.parametrize("faulty", [sample_by_rank, sample_by_row])
def test_faulty_samplers_are_caught(faulty: Sampler, kernels: KernelSet) -> None:
    batch = mixed_batch(16, VOCAB)
    order = [*range(15, -1, -1)]
    assert_neighbours_change_nothing(read_sample, batch, logits_for(16, 1), order, kernels)
    with pytest.raises(AssertionError):
        assert_neighbours_change_nothing(faulty, batch, logits_for(16, 1), order, kernels)


def test_no_global_generator_is_touched(kernels: KernelSet) -> None:
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    sample(logits_for(24, 2), mixed_batch(24, VOCAB), kernels).read()
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert states == after


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_unusable_logits_are_an_error(bad: float, temperature: float, kernels: KernelSet) -> None:
    row = SamplingRow(
        params=SamplingParams(temperature=temperature),
        seed=0,
        choice=0,
        position=0,
        prompt_token_ids=(),
        output_token_ids=(),
        eos_token_ids=(),
    )
    logits = logits_for(3, 2)
    logits[1, 200] = bad
    with pytest.raises(EngineError, match="Row 1 of the logits"):
        sample(logits, [row] * 3, kernels).read()


def test_a_row_without_any_possible_token_is_an_error(kernels: KernelSet) -> None:
    row = SamplingRow(
        params=SamplingParams(min_tokens=1, stop_token_ids=[0, 1, 2]),
        seed=0,
        choice=0,
        position=0,
        prompt_token_ids=(),
        output_token_ids=(),
        eos_token_ids=(),
    )
    with pytest.raises(EngineError, match="min_tokens"):
        sample(torch.zeros(1, 3), [row], kernels).read()


def test_no_rows_no_tokens(kernels: KernelSet) -> None:
    assert sample(torch.empty(0, VOCAB), [], kernels).read() == []
