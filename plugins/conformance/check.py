"""A check: a promise of the contract or of a declaration, and what is run to judge it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from .corners import Corners
from .judge import Judge, shrink
from .scenario import Trial
from .snippet import snippet
from .subject import Subject

CONTRACT = "contract"
"""The cell of what every backend must hold, whatever it declares."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What came of one trial.

    failure: what was wrong, in words; empty where it held
    snippet: a program that repeats the failure
    """

    label: str
    cells: tuple[str, ...]
    failure: str = ""
    snippet: str = ""


@dataclass(frozen=True, slots=True)
class Context:
    """What a check is run on.

    device_name: as people call it; asked for before any trial, as a lost device tells nothing
    """

    subject: Subject
    corners: Corners
    judge: Judge
    device_name: str


Gate = Callable[[Corners], str | None]


@dataclass(frozen=True, slots=True)
class Check:
    """One check.

    what:  the promise, in a sentence
    cells: the declarations that it is evidence for
    gate:  why it does not apply to a backend, or ``None`` where it does
    run:   its findings, the smallest trial first
    elsewhere: why it cannot be run on this device, or ``None``
    trials: what ``run`` judges one by one until one fails; ``None`` of a check that is not made so
    """

    name: str
    what: str
    cells: tuple[str, ...]
    gate: Gate
    run: Callable[[Context], Iterator[Finding]]
    elsewhere: Gate = lambda corners: None
    trials: Callable[[Corners], Iterator[Trial]] | None = None


def judge_trial(context: Context, trial: Trial) -> Finding:
    """What came of one trial, made as small as can be where it failed.

    One that left the device unusable is told as it is: nothing smaller could be judged.
    """
    difference = context.judge.judge(trial)
    if difference is None:
        return Finding(trial.label, trial.cells)
    smallest = trial
    if context.judge.device_usable():
        smallest, difference = shrink(context.judge, trial, difference)
    return Finding(trial.label, trial.cells, difference.message, snippet(context.subject, smallest))


def mark_lost(judge: Judge, check: str, findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """The findings of a check that ran; a failure that left the device unusable says so.

    The judge then has in ``lost_to`` why nothing can be judged any more.
    """
    failed = next((finding for finding in findings if finding.failure), None)
    if failed is None or judge.device_usable():
        return tuple(findings)
    judge.lost_to = f"{check}: {failed.label}"
    told = replace(failed, failure=f"{failed.failure} (the device was left unusable)")
    return tuple(told if finding is failed else finding for finding in findings)


def trial_check(
    name: str,
    what: str,
    cells: tuple[str, ...],
    trials: Callable[[Corners], Iterator[Trial]],
    gate: Gate = lambda corners: None,
) -> Check:
    """A check made of trials; it ends at its first failure."""

    def run(context: Context) -> Iterator[Finding]:
        for trial in trials(context.corners):
            finding = judge_trial(context, trial)
            yield finding
            if finding.failure:
                return

    return Check(name, what, cells, gate, run, trials=trials)


def all_of(*gates: Gate) -> Gate:
    """The first reason that any of the gates gives."""

    def gate(corners: Corners) -> str | None:
        return next((reason for g in gates if (reason := g(corners)) is not None), None)

    return gate


def needs(declaration: str) -> Gate:
    """A gate for a boolean declaration such as ``chunk_invariant``."""

    def gate(corners: Corners) -> str | None:
        return None if getattr(corners.capabilities, declaration) else f"not {declaration}"

    return gate


def needs_feature(feature: str) -> Gate:
    """A gate for a cell of ``features``."""
    return lambda corners: corners.lacks(feature)
