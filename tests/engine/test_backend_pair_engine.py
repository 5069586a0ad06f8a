"""An engine on a pair: each row has the bits of its phase's backend, alone and among others."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from isobit import SamplingParams
from isobit.backends import torch as torch_plugin
from isobit.backends.capabilities import BackendSpec
from isobit.backends.matrix import load_factory
from isobit.cache.reuse import ReuseScope
from isobit.core.config import EngineConfig
from isobit.core.engine import Engine
from isobit.core.graphs import DecodeGraphs
from isobit.core.report import StartupReport
from isobit.core.startup import start_engine
from isobit.plugins import hookimpl
from isobit.plugins.conformance.mutants.catalogue import MUTANTS, RIGHT_WRITTEN
from isobit.plugins.conformance.rig import execute
from isobit.plugins.conformance.scenario import Geometry, Run, Sequence, then_decode, together
from isobit.plugins.discovery import Candidate
from isobit.plugins.manager import PluginHost
from isobit.verify.drive import as_transcripts, drive
from isobit.verify.transcript import Transcript
from isobit.verify.workload import Case

OTHER = replace(RIGHT_WRITTEN, name="other")
"""Adds in another order than torch's kernels."""

PAIR = "prefill=torch,decode=other"
pytestmark = pytest.mark.usefixtures("one_thread")

CASES = [
    Case(
        f"case {index}",
        tuple(3 + (index * 7 + place) % 50 for place in range(1 + 9 * index)),
        SamplingParams(
            max_tokens=4 + 5 * index,
            temperature=(0.0, 1.0)[index % 2],
            seed=index,
            ignore_eos=True,
            logprobs=2,
        ),
    )
    for index in range(5)
]


def mutant(name: str) -> BackendSpec:
    """One that is wrong, with its K and V written by the engine."""
    (found,) = [m.spec for m in MUTANTS if m.name == name]
    return replace(found, capabilities=RIGHT_WRITTEN.capabilities)


class Hooks:
    """A plugin of ``OTHER`` and of what is passed."""

    def __init__(self, *specs: BackendSpec) -> None:
        self.specs = [OTHER, *specs]

    @hookimpl
    def isobit_attention_backends(self) -> list[BackendSpec]:
        return self.specs


def host(*specs: BackendSpec) -> PluginHost:
    return PluginHost(
        candidates=[
            Candidate("torch", "isobit", "0", "torch", lambda: torch_plugin),
            Candidate("toys", "toy-dist", "1.5", "toys", lambda: Hooks(*specs)),
        ]
    )


def started(
    folder: Path, backend: str, *specs: BackendSpec, **options: Any
) -> tuple[Engine, StartupReport]:
    config = EngineConfig(
        model=str(folder),
        attention_backend=backend,
        kernels="torch",
        device="cpu",
        max_model_len=80,
        page_size=7,
        max_num_batched_tokens=33,
        **options,
    )
    return start_engine(config, host(*specs))


def start(folder: Path, backend: str, *specs: BackendSpec, **options: Any) -> Engine:
    return started(folder, backend, *specs, **options)[0]


def run(engine: Engine, arrive: Callable[[int], int] = lambda place: 0) -> list[Transcript]:
    engine.flush_cache()
    return as_transcripts(drive(engine, CASES, arrive=arrive))


def alone(engine: Engine) -> list[Transcript]:
    found = []
    for case in CASES:
        engine.flush_cache()
        found += as_transcripts(drive(engine, [case]))
    return found


def mixed_steps(engine: Engine) -> list[tuple[int, int]]:
    """Decodes and prefills of each step that has both, from now on."""
    steps: list[tuple[int, int]] = []
    plan = engine.runner.backend.plan

    def counting(batch: Any) -> Any:
        if 0 < batch.num_decodes < batch.num_seqs:
            steps.append((batch.num_decodes, batch.num_seqs - batch.num_decodes))
        return plan(batch)

    engine.runner.backend.plan = counting  # type: ignore[method-assign]
    return steps


@pytest.fixture(scope="module")
def expected(small_folder: Path) -> list[Transcript]:
    return alone(start(small_folder, PAIR))


def test_every_row_has_the_bits_of_the_backend_of_its_phase() -> None:
    """Each phase computed by its backend for all rows, and the rows of the phase picked by hand."""
    names = {"prefill": "torch", "decode": "other"}
    specs = {phase: host().require(name).spec for phase, name in names.items()}
    geometry = Geometry(page_size=7, engine_writes_kv=True)
    prompts, lengths = (40, 1, 17, 130), (45, 6, 30, 133)
    steps = together(
        *(then_decode(i, p, n) for i, (p, n) in enumerate(zip(prompts, lengths, strict=True))),
        delays=(0, 1, 3, 4),
    )
    assert any(step[0].decode and not step[-1].decode for step in steps)
    sequences = tuple(Sequence(length=n, seed=i) for i, n in enumerate(lengths))
    pair = host().require(PAIR).spec
    paired = execute(load_factory(pair), geometry, sequences, Run(steps=steps, audit=True))
    by = {
        phase: execute(load_factory(spec), geometry, sequences, Run(steps=steps))
        for phase, spec in specs.items()
    }
    for index, prompt in enumerate(prompts):
        prefill, decode = by["prefill"].rows[index], by["decode"].rows[index]
        assert torch.equal(paired.rows[index], torch.cat([prefill[:prompt], decode[prompt:]]))
    assert not torch.equal(by["prefill"].rows[3][130:], by["decode"].rows[3][130:])


@pytest.mark.parametrize("gap", [0, 1, 3])
def test_a_request_has_its_bits_alone_and_among_others(
    small_folder: Path, expected: list[Transcript], gap: int
) -> None:
    engine = start(small_folder, PAIR)
    steps = mixed_steps(engine)
    assert run(engine, lambda place: gap * place) == expected
    assert steps


def test_it_is_neither_of_the_two(small_folder: Path, expected: list[Transcript]) -> None:
    for other in ("torch", "other", "prefill=other,decode=torch"):
        assert alone(start(small_folder, other)) != expected


@pytest.mark.parametrize(
    ("backend", "wrong"),
    [
        ("prefill=mutant-tile-by-rows,decode=torch", "mutant-tile-by-rows"),
        ("prefill=torch,decode=mutant-splits-by-batch", "mutant-splits-by-batch"),
    ],
)
def test_a_phase_that_follows_the_batch_is_caught(
    small_folder: Path, backend: str, wrong: str
) -> None:
    """The negative control."""
    engine = start(small_folder, backend, mutant(wrong))
    assert run(engine, lambda place: 2 * place) != alone(engine)


def test_captured_decodes_give_the_bits_of_eager_ones(
    small_folder: Path, expected: list[Transcript]
) -> None:
    def captured(*specs: BackendSpec) -> Engine:
        """Graphs as start-up makes them on a GPU; the matrix refuses them on a CPU."""
        decode = specs[0].name if specs else "other"
        engine = start(small_folder, f"prefill=torch,decode={decode}", *specs)
        runner, size = engine.runner, engine.runner.decoder.config.hidden_size
        runner.graphs = DecodeGraphs(runner.backend, runner.compute, (1, 2, 4), size)
        return engine

    engine = captured()
    graphs, sizes = engine.runner.graphs, set()
    assert graphs is not None
    replay = graphs.replay
    graphs.replay = lambda batch: sizes.add(batch.num_seqs) or replay(batch)  # type: ignore
    for gap in (0, 2, 40):
        assert run(engine, lambda place, gap=gap: gap * place) == expected
    assert sizes == {1, 2, 4}
    stale = captured(mutant("mutant-captured-lengths"))  # the negative control
    assert run(stale) != expected


@pytest.mark.parametrize("scope", [ReuseScope.PREFILL_ONLY, ReuseScope.ALL])
def test_only_pages_that_prefill_wrote_are_reused(small_folder: Path, scope: ReuseScope) -> None:
    """The next turn of a conversation: its answer's pages were written by decoding.

    The negative control hands those out too.
    """
    engine = start(small_folder, PAIR)
    cache, right = engine.scheduler.cache, scope is ReuseScope.PREFILL_ONLY
    assert cache is not None
    assert cache.policy.scope is ReuseScope.PREFILL_ONLY
    cache.policy = replace(cache.policy, scope=scope)

    def ask(tokens: Iterable[int]) -> Any:
        params = SamplingParams(max_tokens=24, ignore_eos=True, logprobs=1)
        (output,) = drive(engine, [Case("a turn", tuple(tokens), params)])
        return output

    prompt = range(3, 24)  # three pages
    turn = [*prompt, *ask(prompt).outputs[0].token_ids, 5, 6]
    warm = ask(turn)
    engine.flush_cache()
    cold = ask(turn)
    assert cold.num_cached_tokens == 0
    assert warm.num_cached_tokens == 21 if right else warm.num_cached_tokens > 21
    assert (as_transcripts([cold]) == as_transcripts([warm])) == right


def test_the_report_and_the_fingerprint_name_both(small_folder: Path) -> None:
    _, report = started(small_folder, PAIR)
    rows = {row[0]: row[1:] for row in report.rows}
    assert rows["attention backend"] == (PAIR, "asked for")
    assert rows["  radix_cache"][1].endswith("only prefill-written tokens (rounded to 1)")
    named = f"{PAIR} (isobit and toy-dist 0 and 1.5)"
    assert report.fingerprint_parts["attention_backend"] == named
    swapped = started(small_folder, "prefill=other,decode=torch")[1]
    assert swapped.fingerprint != report.fingerprint
