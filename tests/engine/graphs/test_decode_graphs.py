"""Captured decode steps give the bits of eager ones; on a CPU the captures are tapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch

from isobit import SamplingParams
from isobit.backends.base import Batch
from isobit.core.engine import Engine
from isobit.core.graphs import DecodeGraphs, graph_sizes
from isobit.verify.drive import as_transcripts, drive
from isobit.verify.locate import tracing
from isobit.verify.transcript import Transcript
from isobit.verify.workload import Case

SIZES = (1, 2, 4)
Start = Callable[[str], Engine]
pytestmark = pytest.mark.usefixtures("one_thread")

CASES = [
    Case(
        f"case {index}",
        tuple(3 + (index * 7 + place) % 50 for place in range(1 + 5 * index)),
        SamplingParams(
            max_tokens=4 + 3 * index,
            temperature=(0.0, 1.0)[index % 2],
            seed=index,
            ignore_eos=True,
            logprobs=2,
        ),
    )
    for index in range(6)
]
"""Six of other lengths that end one after the other: the batch passes through every size."""


@dataclass
class Steps:
    """Decode-only steps of an engine, by the number of their requests."""

    replayed: Counter[int] = field(default_factory=Counter)
    eager: Counter[int] = field(default_factory=Counter)


def with_graphs(engine: Engine) -> Engine:
    """Graphs as start-up makes them on a GPU; the matrix refuses them on a CPU."""
    runner = engine.runner
    hidden_size = runner.decoder.config.hidden_size
    runner.graphs = DecodeGraphs(runner.backend, runner.compute, SIZES, hidden_size)
    return engine


def watched(engine: Engine) -> Steps:
    """Counts the decode steps from now on."""
    steps, runner = Steps(), engine.runner
    graphs = runner.graphs
    assert graphs is not None
    replay, plan = graphs.replay, runner.backend.plan

    def counting_replay(batch: Batch) -> torch.Tensor:
        steps.replayed[batch.num_seqs] += 1
        return replay(batch)

    def counting_plan(batch: Batch) -> object:
        if batch.num_decodes == batch.num_seqs:
            steps.eager[batch.num_seqs] += 1
        return plan(batch)

    graphs.replay, runner.backend.plan = counting_replay, counting_plan
    return steps


def run(engine: Engine, arrive: Callable[[int], int] = lambda place: 0) -> list[Transcript]:
    return as_transcripts(drive(engine, CASES, arrive=arrive))


@pytest.fixture(scope="module")
def expected(start: Start) -> list[Transcript]:
    return run(start("mutant-none"))


def test_sizes() -> None:
    assert graph_sizes(1) == [1]
    assert graph_sizes(5) == [1, 2, 4, 5]
    assert graph_sizes(33) == [1, 2, 4, 8, 16, 24, 32, 33]
    assert graph_sizes(256)[-2:] == [248, 256]


def test_graphs_give_the_bits_of_eager_steps(
    start: Start, expected: list[Transcript], backend: str
) -> None:
    """Below, at and beyond the largest size; requests end, join and find a flushed cache."""
    engine = with_graphs(start(backend))
    steps = watched(engine)
    for arrive in (lambda place: 0, lambda place: 2 * place, lambda place: 40 * place):
        assert run(engine, arrive) == expected
        engine.flush_cache()
    assert set(steps.replayed) == set(SIZES)
    assert steps.eager
    assert min(steps.eager) > SIZES[-1]


def test_stale_lengths_are_caught(start: Start, expected: list[Transcript]) -> None:
    """The negative control: a backend whose replays keep the capture's lengths."""
    name = "mutant-captured-lengths"
    assert run(start(name)) == expected
    assert run(with_graphs(start(name))) != expected


def test_whoever_writes_k_and_v_the_bits_are_the_same(
    start: Start, expected: list[Transcript]
) -> None:
    engine = start("mutant-none-written")
    assert run(engine) == expected
    engine.flush_cache()
    engine.runner.engine_writes_kv = False  # both would write: it has a run() too
    assert run(engine) == expected


def test_k_and_v_that_nobody_writes_are_caught(start: Start, expected: list[Transcript]) -> None:
    """The negative control: what a backend reads is what the engine wrote."""
    engine = start("mutant-none-written")
    for layer in engine.runner.layers:
        layer.k.zero_()
        layer.v.zero_()
    kernels = engine.runner.decoder.kernels
    engine.runner.decoder.kernels = replace(
        kernels, rope_qkv_write=lambda *given: kernels.rope_qkv(*given[:6])[0]
    )
    assert run(engine) != expected


def test_an_observer_sees_every_op(start: Start, expected: list[Transcript], backend: str) -> None:
    engine = with_graphs(start(backend))
    steps = watched(engine)
    with tracing(engine, CASES[3]) as trace:
        assert run(engine) == expected
    assert not steps.replayed
    last = len(CASES[3].prompt_token_ids) + CASES[3].params.max_tokens - 2
    assert (last, "layers.1.mlp.act") in trace.digests
    engine.flush_cache()
    assert run(engine) == expected
    assert steps.replayed


def test_the_null_page_is_never_read(
    start: Start, expected: list[Transcript], backend: str
) -> None:
    engine = with_graphs(start(backend))
    for layer in engine.runner.layers:
        layer.k.fill_(torch.nan)
        layer.v.fill_(torch.nan)
    assert run(engine, lambda place: 3 * place) == expected
