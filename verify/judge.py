"""Runs the proofs and judges them: how many runs, how many distinct results, where they part."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch

from ..core.engine import Engine
from .drive import as_transcripts, drive_alone
from .invariances import Proofs, Run
from .locate import locate
from .restart import RestartSpec, run_in_new_process
from .transcript import Transcript, digest
from .workload import Case

INVARIANCES = ("batch", "order", "chunk", "cache", "preempt", "score", "restart", "rng")


@dataclass(frozen=True, slots=True)
class Verdict:
    """One row of the table.

    ``distinct`` counts the different results over all runs: 1 when the invariance holds.
    ``failure`` says where the first two runs part; ``skipped`` why nothing could be run.
    """

    invariance: str
    runs: int
    distinct: int
    digest: str
    seconds: float
    failure: str | None = None
    skipped: str | None = None

    @property
    def holds(self) -> bool:
        return self.failure is None

    def as_dict(self) -> dict[str, object]:
        return asdict(self) | {"holds": self.holds}


def judge_all(
    engine: Engine, cases: Sequence[Case], restart: RestartSpec | None
) -> Iterator[Verdict]:
    """The verdict on every invariance, one after the other."""
    proofs = Proofs(engine, cases)
    for name in INVARIANCES:
        began = time.perf_counter()
        if name == "cache" and engine.scheduler.cache is None:
            yield _skipped(name, "the radix cache is off")
        elif name == "chunk" and not engine.scheduler.config.chunked_prefill:
            yield _skipped(name, "chunked prefill is off")
        elif name == "score" and not engine.scheduler.config.decode_equals_prefill:
            yield _skipped(name, "the backend does not promise that decoding equals a prefill")
        elif name == "restart":
            yield _judge_restart(proofs, restart, began)
        elif name == "rng":
            yield _judge_rng(proofs, began)
        else:
            yield judge_runs(name, proofs, getattr(proofs, name)(), began)


def judge_runs(name: str, proofs: Proofs, runs: Iterator[Run], began: float) -> Verdict:
    """Execute runs and compare each with what its requests gave alone."""
    results = {digest(proofs.baseline)}
    failure: str | None = None
    count = 0
    for run in runs:
        outputs = run.execute()
        count += 1
        found = run.read(outputs)
        differing = [
            index
            for index, (mine, expected) in enumerate(zip(found, run.expected, strict=True))
            if mine != expected
        ]
        if differing:
            results.add(digest(found))
            failure = failure or _describe(proofs.engine, run, found, differing[0])
        elif not run.exercised(outputs):
            failure = failure or f"{run.label}: nothing was exercised, so nothing is proved"
    return Verdict(
        name, count, len(results), digest(proofs.baseline), time.perf_counter() - began, failure
    )


def _describe(engine: Engine, run: Run, found: Sequence[Transcript], index: int) -> str:
    token = found[index].first_difference(run.expected[index]) or 0
    reference = run.references[index]
    where = locate(
        engine,
        lambda: drive_alone(engine, [reference]),
        reference,
        run.execute,
        run.cases[index],
        token,
    )
    return f"{run.label}: {run.cases[index].name}: token {token}; first differs in {where}"


def _judge_restart(proofs: Proofs, restart: RestartSpec | None, began: float) -> Verdict:
    if restart is None:
        return _skipped("restart", "this engine was not built from options a new process could use")
    results = {digest(proofs.baseline)}
    failure: str | None = None
    again = run_in_new_process(restart, proofs.cases)
    for case, mine, theirs in zip(proofs.cases, proofs.baseline, again, strict=True):
        if mine != theirs and failure is None:
            results.add(digest(again))
            token = mine.first_difference(theirs)
            failure = f"{case.name}: token {token}; ops are not traced across processes"
    seconds = time.perf_counter() - began
    return Verdict("restart", 1, len(results), digest(proofs.baseline), seconds, failure)


def _judge_rng(proofs: Proofs, began: float) -> Verdict:
    """Reseeding the user's generators changes nothing, and they are left as they were."""
    seeders: tuple[Callable[[int], object], ...] = (
        random.seed,
        np.random.seed,
        torch.manual_seed,
    )
    before = rng_states()
    results = {digest(proofs.baseline)}
    failure: str | None = None
    try:
        for seed in (0, 12345):
            for seeder in seeders:
                seeder(seed)
            set_to = rng_states()
            found = as_transcripts(drive_alone(proofs.engine, proofs.cases))
            results.add(digest(found))
            if found != proofs.baseline:
                failure = f"the results follow the global generators (seed {seed})"
            elif rng_states() != set_to:
                failure = "a global generator was read or set during generation"
    finally:
        _restore(before)
    seconds = time.perf_counter() - began
    return Verdict("rng", 2, len(results), digest(proofs.baseline), seconds, failure)


def rng_states() -> tuple[object, ...]:
    """The states of Python's, NumPy's and torch's global generators, comparable by ``==``."""
    name, keys, *rest = np.random.get_state(legacy=True)
    torch_state = bytes(torch.get_rng_state().tolist())
    return (random.getstate(), (name, tuple(keys.tolist()), *rest), torch_state)  # type: ignore[union-attr]


def _restore(states: tuple[object, ...]) -> None:
    python, numpy_state, torch_state = states
    random.setstate(python)  # type: ignore[arg-type]
    np.random.set_state(numpy_state)  # type: ignore[arg-type]
    torch.set_rng_state(torch.tensor(list(torch_state), dtype=torch.uint8))  # type: ignore[call-overload]


def _skipped(name: str, why: str) -> Verdict:
    return Verdict(name, 0, 0, "", 0.0, skipped=why)
