"""A token that only the device knows has the effect, to the bit, of one that the host knows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from isobit.errors import EngineError
from isobit.kernels.kernel_set import KernelSet
from isobit.sampling.logit_edits import edit_logits
from isobit.sampling.params import SamplingParams
from isobit.sampling.rows import SamplingRow, needs_tokens
from isobit.sampling.sampler import sample
from isobit.sampling.stopping import ending_token_ids
from isobit.sampling.token_counts import TokenCounts

VOCAB = 61

params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_k=st.sampled_from([-1, 5]),
    top_p=st.sampled_from([1.0, 0.8]),
    presence_penalty=st.sampled_from([0.0, 0.7, -1.1]),
    frequency_penalty=st.sampled_from([0.0, 0.3, -0.123]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    logit_bias=st.sampled_from([None, {3: 2.5, 60: -1.1}]),
    min_tokens=st.sampled_from([0, 1, 3]),
    stop_token_ids=st.sampled_from([(), (4, 5)]),
    logprobs=st.sampled_from([None, 3]),
)
# Few tokens, so that the pending one is often listed already: in the prompt, the output or both.
tokens = st.lists(st.integers(0, 6), max_size=5)
known_rows = st.builds(
    SamplingRow,
    params=params,
    seed=st.integers(0, 99),
    choice=st.integers(0, 2),
    position=st.integers(0, 99),
    prompt_token_ids=tokens,
    output_token_ids=tokens,
    eos_token_ids=st.just((0, 2)),
)


def logits_for(count: int, seed: int) -> Tensor:
    return torch.randn(count, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def as_pending(row: SamplingRow) -> SamplingRow:
    """The row a moment earlier, when the host did not know its last output token."""
    if not row.output_token_ids:
        return row
    return replace(row, output_token_ids=row.output_token_ids[:-1], pending=True)


def last_tokens(rows: Sequence[SamplingRow]) -> Tensor:
    """What the device knows; -1, which is no token, where nothing is pending."""
    return torch.tensor([row.output_token_ids[-1] if row.output_token_ids else -1 for row in rows])


def edited(logits: Tensor, rows: Sequence[SamplingRow], last: Tensor | None = None) -> list[bytes]:
    """Each row's bits after all edits."""
    logits = logits.clone()
    edit_logits(logits, rows, last)
    return [row.numpy().tobytes() for row in logits]


def edited_by_hand(logits: Tensor, row: SamplingRow) -> bytes:
    """One row, one token at a time, every step rounded to fp32."""
    x, p = logits.numpy().copy(), row.params
    for t, bias in p.bias_pairs:
        x[t] += np.float32(bias)
    if len(row.output_token_ids) < p.min_tokens:
        x[list(ending_token_ids(p, row.eos_token_ids))] = -np.inf
    penalty = np.float32(p.repetition_penalty)
    for t in {*row.prompt_token_ids, *row.output_token_ids} if penalty != 1 else ():
        x[t] = x[t] / penalty if x[t] > 0 else x[t] * penalty
    for t in set(row.output_token_ids):
        x[t] -= np.float32(list(row.output_token_ids).count(t)) * np.float32(p.frequency_penalty)
        x[t] -= np.float32(p.presence_penalty)
    return bytes(x.tobytes())


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(known_rows, min_size=1, max_size=40), seed=st.integers(0, 2**20))
def test_pending_tokens_edit_as_known_ones(rows: list[SamplingRow], seed: int) -> None:
    logits = logits_for(len(rows), seed)
    by_hand = [edited_by_hand(x, row) for x, row in zip(logits, rows, strict=True)]
    assert edited(logits, rows) == by_hand
    assert edited(logits, [as_pending(row) for row in rows], last_tokens(rows)) == by_hand


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_pending_rows_sample_as_known_ones(kernels: KernelSet, data: st.DataObject) -> None:
    rows = data.draw(st.lists(known_rows, min_size=1, max_size=12))
    logits = logits_for(len(rows), data.draw(st.integers(0, 2**20)))
    known = sample(logits, rows, kernels).read()
    pending = sample(logits, [as_pending(row) for row in rows], kernels, last_tokens(rows)).read()
    assert known == pending


def mixed_rows() -> list[SamplingRow]:
    rng = random.Random(0)
    return [
        SamplingRow(
            params=SamplingParams(
                frequency_penalty=0.3, presence_penalty=0.1 * (i % 3), repetition_penalty=1.1
            ),
            seed=i,
            choice=0,
            position=9,
            prompt_token_ids=[rng.randrange(9) for _ in range(4)],
            output_token_ids=[rng.randrange(9) for _ in range(1 + i % 5)],
            eos_token_ids=(0,),
        )
        for i in range(50)
    ]


def test_a_pending_token_that_is_lost_or_anothers_is_caught() -> None:
    rows, logits = mixed_rows(), logits_for(50, 1)
    expected = edited(logits, rows)
    pending, last = [as_pending(row) for row in rows], last_tokens(rows)
    assert edited(logits, pending, last) == expected
    assert edited(logits, [replace(row, pending=False) for row in pending]) != expected
    assert edited(logits, pending, last.roll(1)) != expected
    assert edited(logits, rows, last) == expected  # nothing is pending: they mean nothing


def test_counts_kept_from_step_to_step_change_no_bit() -> None:
    rows, logits = mixed_rows(), logits_for(50, 2)
    kept = [TokenCounts(row.params, row.prompt_token_ids) for row in rows]
    for length in range(6):
        now = [replace(row, output_token_ids=row.output_token_ids[:length]) for row in rows]
        cached = [replace(row, counts=counts) for row, counts in zip(now, kept, strict=True)]
        assert edited(logits, now) == edited(logits, cached)
        last = torch.full((50,), length)
        now, cached = ([replace(row, pending=True) for row in some] for some in (now, cached))
        assert edited(logits, now, last) == edited(logits, cached, last)
    strangers = [replace(row, counts=counts) for row, counts in zip(rows, kept[::-1], strict=True)]
    with pytest.raises(EngineError, match="one TokenCounts for each choice"):
        edited(logits, strangers)


def test_a_pending_token_counts_towards_min_tokens(kernels: KernelSet) -> None:
    row = SamplingRow(
        params=SamplingParams(min_tokens=2, temperature=0),
        seed=0,
        choice=0,
        position=1,
        prompt_token_ids=(7,),
        output_token_ids=[8],
        eos_token_ids=(3,),
    )
    logits = torch.zeros(2, VOCAB)
    logits[:, 3] = 9.0
    sampled = sample(logits, [row, replace(row, pending=True)], kernels, torch.tensor([8, 8]))
    assert sampled.token_ids.tolist() == [0, 3]


def test_a_pending_token_that_nobody_gives_is_refused(kernels: KernelSet) -> None:
    row = replace(mixed_rows()[0], params=SamplingParams(), pending=True)
    with pytest.raises(EngineError, match="Row 1 has a pending token: wanted last_tokens"):
        sample(torch.zeros(2, VOCAB), [mixed_rows()[0], row], kernels)


def test_processors_and_a_pending_token_are_refused(kernels: KernelSet) -> None:
    params = SamplingParams(logits_processors=[lambda tokens, logits: logits])
    assert needs_tokens(params)
    assert not needs_tokens(SamplingParams(repetition_penalty=1.1))
    row = replace(mixed_rows()[0], params=params, pending=True)
    with pytest.raises(EngineError, match="one that the host knows"):
        sample(torch.zeros(1, VOCAB), [row], kernels, torch.tensor([0]))
