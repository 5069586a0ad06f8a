"""A launch, and what is read of it later: on a GPU the launch waits for nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from isobit.errors import EngineError
from isobit.kernels.dispatch import load_kernels
from isobit.kernels.kernel_set import KernelSet
from isobit.sampling.params import SamplingParams
from isobit.sampling.rows import SamplingRow
from isobit.sampling.sampler import Sampled, sample, score_prompt
from isobit.sampling.token_counts import TokenCounts

VOCAB = 5000
EVERYTHING: list[SamplingParams] = [
    SamplingParams(temperature=0.0, logprobs=0),
    SamplingParams(top_k=40, top_p=0.9, min_p=0.01, logprobs=5),
    SamplingParams(repetition_penalty=1.2, frequency_penalty=0.3, presence_penalty=0.1),
    SamplingParams(logit_bias={7: 3.0, 9: -1.0}, min_tokens=8, stop_token_ids=[11], logprobs=20),
]


def rows_of(count: int, *, pending: bool) -> list[SamplingRow]:
    """Every parameter, over and over, on tokens that are listed or pending."""
    rows = []
    for i in range(count):
        params = EVERYTHING[i % len(EVERYTHING)]
        prompt = [(i * 7 + j * j) % VOCAB for j in range(300)]
        row = SamplingRow(
            params=params,
            seed=i,
            choice=i % 3,
            position=302 + pending,
            prompt_token_ids=prompt,
            output_token_ids=[5, i % VOCAB],
            eos_token_ids=(0, 2),
            pending=pending,
            counts=TokenCounts(params, prompt) if i % 2 else None,
        )
        rows.append(row)
    return rows


def logits_for(count: int, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return (torch.randn(count, VOCAB, generator=generator) * 3).to(device)


def test_tokens_are_the_same_launched_and_read(kernels: KernelSet) -> None:
    sampled = sample(logits_for(12), rows_of(12, pending=False), kernels)
    assert sampled.token_ids.dtype == torch.int64
    assert sampled.token_ids.tolist() == [row.token_id for row in sampled.read()]
    assert sampled.read() == sampled.read()


def test_scored_tokens_are_those_given(kernels: KernelSet) -> None:
    scored = score_prompt(logits_for(3), [5, 0, 9], [None, 0, 2], kernels)
    assert scored.token_ids.tolist() == [5, 0, 9]
    rows = scored.read()
    assert [row.token_id for row in rows] == [5, 0, 9]
    assert [(row.rank is None, len(row.top)) for row in rows] == [
        (True, 0),
        (False, 0),
        (False, 2),
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("bad", "problem"),
    [(float("nan"), "not usable"), (float("inf"), "not usable"), (None, "leaves no token")],
)
def test_what_cannot_be_sampled_is_an_error_once_it_is_read(
    temperature: float, bad: float | None, problem: str, kernels: KernelSet
) -> None:
    """Filters and the rest are launched on it all the same; its token is some valid id."""
    logits = torch.zeros(2, 3)
    if bad is not None:
        logits[1, 2] = bad
    row = SamplingRow(
        params=SamplingParams(
            temperature=temperature,
            top_p=0.5,
            min_p=0.1,
            top_k=2,
            logprobs=3,
            min_tokens=1 if bad is None else 0,
            stop_token_ids=[0, 1, 2],
        ),
        seed=0,
        choice=0,
        position=0,
        prompt_token_ids=(),
        output_token_ids=(),
        eos_token_ids=(),
    )
    good = rows_of(1, pending=False)[0]
    sampled = sample(logits, [good, row], kernels)
    assert 0 <= int(sampled.token_ids[1]) < 3
    with pytest.raises(EngineError, match=f"Row 1 .*{problem}"):
        sampled.read()


def test_unusable_logits_never_reach_a_processor(kernels: KernelSet) -> None:
    row = SamplingRow(
        params=SamplingParams(logits_processors=[lambda tokens, logits: logits]),
        seed=0,
        choice=0,
        position=0,
        prompt_token_ids=(),
        output_token_ids=(),
        eos_token_ids=(),
    )
    with pytest.raises(EngineError, match="Row 0 of the logits is not usable"):
        sample(torch.full((1, 3), torch.nan), [row], kernels)


@contextmanager
def refusing_waits() -> Iterator[None]:
    """Within, torch raises where the host would wait for the device."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def launches_while_busy(launch: Callable[[], object]) -> bool:
    """Whether the launch returns while the device still works on what came before."""
    torch.cuda.synchronize()
    torch.cuda._sleep(4_000_000_000)  # seconds
    done = torch.cuda.Event()
    done.record()
    launch()
    returned_early = not done.query()
    torch.cuda.synchronize()
    return returned_early


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_cuda
def test_a_launch_waits_for_nothing() -> None:
    kernels = load_kernels("triton", torch.device("cuda"))
    logits, count = logits_for(40, "cuda"), 40
    first = sample(logits, rows_of(count, pending=False), kernels)
    rows, targets = rows_of(count, pending=True), [*range(count)]

    def launch() -> tuple[Sampled, Sampled]:
        top = [None, 0, 3, 20] * (count // 4)
        return (
            sample(logits, rows, kernels, first.token_ids),
            score_prompt(logits, targets, top, kernels),
        )

    expected = [sampled.read() for sampled in launch()]  # kernels are compiled
    with refusing_waits():
        launched = launch()
    assert [sampled.read() for sampled in launched] == expected
    launches_while_busy(launch)  # now as much memory is reserved as a launch takes
    assert launches_while_busy(launch)


@pytest.mark.gpu
@needs_cuda
def test_waits_are_caught() -> None:
    x = torch.ones(4, device="cuda")
    with refusing_waits(), pytest.raises(RuntimeError, match="synchroniz"):
        x.sum().item()
    assert not launches_while_busy(lambda: x.sum().item())


@pytest.mark.gpu
@needs_cuda
def test_pending_rows_on_the_device_are_as_known_ones() -> None:
    """Their token is the step before's, which the host has not read."""
    kernels = load_kernels("triton", torch.device("cuda"))
    logits = logits_for(40, "cuda")
    first = sample(logits, rows_of(40, pending=False), kernels)
    pending = sample(logits.flip(1), rows_of(40, pending=True), kernels, first.token_ids)
    known = rows_of(40, pending=False)
    tokens = [row.token_id for row in first.read()]
    after = [
        SamplingRow(
            params=row.params,
            seed=row.seed,
            choice=row.choice,
            position=row.position + 1,
            prompt_token_ids=row.prompt_token_ids,
            output_token_ids=[*row.output_token_ids, token],
            eos_token_ids=row.eos_token_ids,
        )
        for row, token in zip(known, tokens, strict=True)
    ]
    assert sample(logits.flip(1), after, kernels).read() == pending.read()
