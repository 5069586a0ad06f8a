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
from .locate import Divergence, locate
from .restart import RestartSpec, run_in_new_process
from .transcript import Transcript, digest
from .workload import Case

INVARIANCES = ("batch", "order", "chunk", "cache", "preempt", "score", "restart", "rng")


@dataclass(frozen=True, slots=True)
class RunResult:
    """One run of a proof.

    ``digest`` is over the run's own ``requests`` results; ``equal`` says whether each is what the
    request gives alone, ``exercised`` whether what the proof is about took place in the run,
    ``detail`` how much of it, such as the number of sequences that decoded at once.
    """

    label: str
    requests: int
    digest: str
    equal: bool
    exercised: bool = True
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One row of the table.

    ``distinct`` counts the different results over all runs: 1 when the invariance holds.
    ``failure`` says where the first two runs part, ``divergence`` the same as data where their ops
    could be traced; ``skipped`` why nothing could be run.
    """

    invariance: str
    results: tuple[RunResult, ...]
    distinct: int
    digest: str
    seconds: float
    failure: str | None = None
    divergence: Divergence | None = None
    skipped: str | None = None

    @property
    def runs(self) -> int:
        return len(self.results)

    @property
    def holds(self) -> bool:
        return self.failure is None

    def as_dict(self) -> dict[str, object]:
        """The row for JSON; of the divergence all but its grid, which may have 100,000 cells."""
        row = asdict(self) | {"runs": self.runs, "holds": self.holds}
        return row | {"divergence": self.divergence and self.divergence.as_dict()}


def judge_all(
    engine: Engine,
    cases: Sequence[Case],
    restart: RestartSpec | None,
    *,
    requests: int | None = None,
) -> Iterator[Verdict]:
    """The verdict on every invariance, one after the other.

    :param requests: so many at once in one run of ``batch``, beside the usual ones.
    :raises ConfigError: a step has no room for so many.
    """
    proofs = Proofs(engine, cases, requests)
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
    distinct = {digest(proofs.baseline)}
    results: list[RunResult] = []
    failure: str | None = None
    divergence: Divergence | None = None
    for run in runs:
        outputs = run.execute()
        found = run.read(outputs)
        difference = _first_difference(found, run.expected)
        equal, exercised = difference is None, run.exercised(outputs)
        detail = run.detail(outputs)
        result = RunResult(run.label, len(found), digest(found), equal, exercised, detail)
        results.append(result)
        if difference is not None:
            distinct.add(result.digest)
            if failure is None:
                divergence = locate(proofs.engine, run, *difference)
                failure = str(divergence)
        elif not result.exercised:
            failure = failure or _not_exercised(result)
    return Verdict(
        name,
        tuple(results),
        len(distinct),
        digest(proofs.baseline),
        time.perf_counter() - began,
        failure,
        divergence,
    )


def _not_exercised(result: RunResult) -> str:
    about = f" ({result.detail})" if result.detail else ""
    return f"{result.label}: what it is about did not take place{about}, so nothing is proved"


def _first_difference(
    found: Sequence[Transcript], expected: Sequence[Transcript]
) -> tuple[int, int] | None:
    """The first request with another transcript, by its index, and the first token there."""
    for index, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        token = mine.first_difference(theirs)
        if token is not None:
            return index, token
    return None


def _judge_restart(proofs: Proofs, restart: RestartSpec | None, began: float) -> Verdict:
    if restart is None:
        return _skipped("restart", "this engine was not built from options a new process could use")
    failure: str | None = None
    again = run_in_new_process(restart, proofs.cases)
    difference = _first_difference(again, proofs.baseline)
    if difference is not None:
        index, token = difference
        name = proofs.cases[index].name
        failure = f"{name}: token {token}; ops are not traced across processes"
    result = RunResult("in a new process", len(again), digest(again), difference is None)
    distinct = len({digest(proofs.baseline), result.digest})
    seconds = time.perf_counter() - began
    return Verdict("restart", (result,), distinct, digest(proofs.baseline), seconds, failure)


def _judge_rng(proofs: Proofs, began: float) -> Verdict:
    """Reseeding the user's generators changes nothing, and they are left as they were."""
    seeders: tuple[Callable[[int], object], ...] = (
        random.seed,
        np.random.seed,
        torch.manual_seed,
    )
    before = rng_states()
    results: list[RunResult] = []
    failure: str | None = None
    try:
        for seed in (0, 12345):
            for seeder in seeders:
                seeder(seed)
            set_to = rng_states()
            found = as_transcripts(drive_alone(proofs.engine, proofs.cases))
            equal = found == proofs.baseline
            label = f"generators seeded with {seed}"
            results.append(RunResult(label, len(found), digest(found), equal))
            if not equal:
                failure = f"the results follow the global generators (seed {seed})"
            elif rng_states() != set_to:
                failure = "a global generator was read or set during generation"
    finally:
        _restore(before)
    distinct = len({digest(proofs.baseline), *(result.digest for result in results)})
    seconds = time.perf_counter() - began
    return Verdict("rng", tuple(results), distinct, digest(proofs.baseline), seconds, failure)


def rng_states() -> tuple[object, ...]:
    """The states of Python's, NumPy's and torch's global generators, comparable by ``==``.

    torch's are that of the CPU and, once CUDA is in use, that of the current device.
    """
    name, keys, *rest = np.random.get_state(legacy=True)
    torch_states = [bytes(torch.get_rng_state().tolist())]
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch_states.append(bytes(torch.cuda.get_rng_state().tolist()))
    return (random.getstate(), (name, tuple(keys.tolist()), *rest), *torch_states)  # type: ignore[union-attr]


def _restore(states: tuple[object, ...]) -> None:
    python, numpy_state, *torch_states = states
    random.setstate(python)  # type: ignore[arg-type]
    np.random.set_state(numpy_state)  # type: ignore[arg-type]
    setters = (torch.set_rng_state, torch.cuda.set_rng_state)
    for setter, state in zip(setters, torch_states, strict=False):
        setter(torch.tensor(list(state), dtype=torch.uint8))  # type: ignore[call-overload]


def _skipped(name: str, why: str) -> Verdict:
    return Verdict(name, (), 0, "", 0.0, skipped=why)
