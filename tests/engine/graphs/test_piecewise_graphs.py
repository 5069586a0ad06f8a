"""Steps with a prefill, replayed in pieces, give the bits of eager ones; here pieces are tapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from isobit import SamplingParams
from isobit.backends.base import Batch
from isobit.backends.recording import recording
from isobit.core.config import EngineConfig
from isobit.core.engine import Engine
from isobit.core.graphs import DecodeGraphs
from isobit.core.pieces import PiecewiseGraphs, piece_sizes
from isobit.core.startup import start_engine
from isobit.errors import BackendError, ConfigError
from isobit.plugins.conformance.mutants.catalogue import candidates
from isobit.plugins.manager import PluginHost
from isobit.verify.drive import as_transcripts, drive
from isobit.verify.locate import tracing
from isobit.verify.transcript import Transcript
from isobit.verify.workload import Case

CPU = torch.device("cpu")
SIZES = (16, 32)
Start = Callable[[str], Engine]
pytestmark = pytest.mark.usefixtures("one_thread")

CASES = [
    Case(
        f"case {index}",
        tuple(3 + (index * 7 + place) % 50 for place in range(1 + 6 * index)),
        SamplingParams(
            max_tokens=4 + 2 * index,
            temperature=(0.0, 1.0)[index % 2],
            seed=index,
            ignore_eos=True,
            logprobs=2,
            prompt_logprobs=(None, None, 1)[index % 3],
        ),
    )
    for index in range(6)
]
"""Prompts of 1 to 31 tokens, 96 in all: alone they fit a size, together they do not."""


@dataclass
class Steps:
    """Steps with a prefill, by the number of their tokens."""

    replayed: Counter[int] = field(default_factory=Counter)
    eager: Counter[int] = field(default_factory=Counter)
    mixed: int = 0


def with_pieces(engine: Engine) -> Engine:
    """Graphs as start-up makes them on a GPU; the matrix refuses them on a CPU."""
    runner = engine.runner
    hidden_size = runner.decoder.config.hidden_size
    runner.graphs = DecodeGraphs(runner.backend, runner.compute, (1, 2), hidden_size)
    runner.pieces = PiecewiseGraphs(runner.backend.config, runner.model, SIZES)
    return engine


def watched(engine: Engine) -> Steps:
    """Counts the steps with a prefill from now on."""
    steps, runner = Steps(), engine.runner
    pieces = runner.pieces
    assert pieces is not None
    replay, compute = pieces.replay, runner.compute

    def counting_replay(batch: Batch, attend: Any) -> torch.Tensor:
        steps.replayed[batch.num_tokens] += 1
        steps.mixed += batch.num_decodes > 0
        return replay(batch, attend)

    def counting_compute(batch: Batch, plan: Any) -> torch.Tensor:
        if batch.num_decodes < batch.num_seqs:
            steps.eager[batch.num_tokens] += 1
        return compute(batch, plan)

    pieces.replay, runner.compute = counting_replay, counting_compute
    return steps


def run(engine: Engine, **options: Any) -> list[Transcript]:
    return as_transcripts(drive(engine, CASES, **options))


@pytest.fixture(scope="module")
def expected(start: Start) -> list[Transcript]:
    return run(start("mutant-none"))


def test_sizes() -> None:
    assert piece_sizes(5) == [5]
    assert piece_sizes(16) == [16]
    assert piece_sizes(17) == [16, 17]
    assert piece_sizes(512) == [16, 32, 64, 128, 256, 512]


def test_pieces_give_the_bits_of_eager_steps(
    start: Start, expected: list[Transcript], backend: str
) -> None:
    """Below, at and beyond the sizes; prompts in chunks, beside decodes, on a flushed cache."""
    engine = with_pieces(start(backend))
    steps = watched(engine)
    for place, budget in ((0, None), (2, None), (0, 16), (3, 11), (1, 32)):
        found = run(engine, arrive=lambda i, k=place: k * i, budget=lambda step, b=budget: b)
        assert found == expected
        engine.flush_cache()
    assert {16, 32} <= set(steps.replayed)
    assert min(steps.replayed) < 16
    assert any(16 < tokens < 32 for tokens in steps.replayed)
    assert steps.mixed
    assert steps.eager
    assert min(steps.eager) > SIZES[-1] >= max(steps.replayed)


def test_requests_that_lose_their_pages_give_the_same_bits(
    start: Start, expected: list[Transcript], backend: str
) -> None:
    engine = with_pieces(start(backend))
    steps, preempted = watched(engine), []

    def preempt(engine: Engine, step: int) -> None:
        if step % 2:
            preempted.append(engine.preempt(f"verify-{3 + step % 3}"))
            engine.flush_cache()

    assert run(engine, before_step=preempt) == expected
    assert sum(preempted) > 2
    assert len(steps.replayed) > 2


def test_what_nobody_wrote_is_never_read(
    start: Start, expected: list[Transcript], backend: str
) -> None:
    """The null page, unwritten slots, and what rows of padding find as attention's output."""
    engine = with_pieces(start(backend))
    steps, pieces = watched(engine), engine.runner.pieces
    assert pieces is not None
    for layer in engine.runner.layers:
        layer.k.fill_(torch.nan)
        layer.v.fill_(torch.nan)
    pieces._out.fill_(torch.nan)
    assert run(engine, arrive=lambda place: 2 * place) == expected
    assert set(steps.replayed) - set(SIZES)


@pytest.mark.parametrize("name", ["token_ids", "positions", "slot_mapping"])
def test_stale_inputs_are_caught(start: Start, expected: list[Transcript], name: str) -> None:
    """The negative control: pieces that keep an input of their capture."""
    engine = with_pieces(start("mutant-none-written"))
    for layer in engine.runner.layers:
        layer.k.zero_()
        layer.v.zero_()
    pieces = engine.runner.pieces
    assert pieces is not None
    pieces._inputs[name] = pieces._inputs[name].clone()
    assert run(engine, arrive=lambda place: 2 * place) != expected


def test_an_observer_sees_every_op(start: Start, expected: list[Transcript], backend: str) -> None:
    engine = with_pieces(start(backend))
    steps = watched(engine)
    with tracing(engine, CASES[3]) as trace:
        assert run(engine, arrive=lambda place: 2 * place) == expected
    assert not steps.replayed
    assert (5, "layers.1.mlp.act") in trace.digests


def test_a_backend_that_raises_between_pieces_is_named(
    start: Start, expected: list[Transcript], backend: str
) -> None:
    engine = with_pieces(start(backend))
    steps, owner = watched(engine), engine.runner.backend
    call = "run_written" if engine.runner.engine_writes_kv else "run"

    def fail(*args: Any) -> None:
        raise ValueError("no attention today")

    setattr(owner, call, fail)
    engine.add_request("r", [5, 6, 7], SamplingParams(max_tokens=2))
    with pytest.raises(BackendError, match=rf"{backend}.* raised ValueError in {call}\(\)"):
        engine.step()
    assert steps.replayed == {3: 1}
    delattr(owner, call)
    engine.abort("r")
    assert run(engine, arrive=lambda place: 2 * place) == expected


def test_a_recording_is_cut_into_pieces() -> None:
    x, between, out = torch.ones(3), torch.zeros(3), torch.zeros(3)
    with recording(CPU) as found:
        doubled = x * 2
        found.cut()
        out.copy_(doubled + between)
    first, second = found.pieces
    x.fill_(5)
    first.replay()
    between.copy_(doubled + 1)
    assert out.tolist() == [2, 2, 2]
    second.replay()
    assert out.tolist() == [21, 21, 21]


def test_only_small_models_are_captured_unless_asked_for() -> None:
    def tokens(weight_bytes: int, **options: Any) -> int:
        return EngineConfig(model="m", **options).graph_tokens("cuda", weight_bytes)

    assert tokens(2**31) == 512
    assert tokens(2**32) == 0
    assert tokens(2**40, cuda_graph_max_tokens=100) == 100
    assert tokens(1, cuda_graph_max_tokens=0) == 0
    assert tokens(1, max_num_batched_tokens=64) == 64
    with pytest.raises(ConfigError, match=r"cuda_graph_max_tokens was -1; wanted a whole number"):
        tokens(1, cuda_graph_max_tokens=-1)


@pytest.mark.usefixtures("graphs_on")
@pytest.mark.parametrize(("most", "sizes"), [(0, None), (20, (16, 20))])
def test_start_up_captures_and_reports(
    config_of: Callable[..., EngineConfig], most: int, sizes: tuple[int, ...] | None
) -> None:
    config = config_of("mutant-none", cuda_graph_max_bs=1, cuda_graph_max_tokens=most)
    engine, report = start_engine(config, PluginHost(candidates=candidates()))
    pieces = engine.runner.pieces
    assert (pieces and pieces.sizes) == sizes
    if pieces is not None:  # 20 rows of 8 bytes: a second row of one tensor would begin at 160
        assert [rows.storage_offset() for rows in pieces._inputs.values()] == [0, 0, 0]
    row = next((row for row in report.rows if row[0] == "  in pieces"), None)
    if sizes:
        assert row is not None
        assert row[1] == "2 captured"
        assert row[2].startswith("steps with a prefill of up to 20 tokens")
    else:
        assert row is None
