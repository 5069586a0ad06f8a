"""Runs the checks on one backend."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from .check import Check, Context, Finding, mark_lost
from .corners import Corners
from .judge import Judge
from .registry import CHECKS
from .subject import Subject, device_name
from .waivers import check_waivers, known_check

Status = Literal["passed", "failed", "waived", "not declared", "not here"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one check gave.

    findings: its trials; none unless it ran
    reason:   why it did not run, or what failed
    snippet:  a program that repeats the failure, where there is one
    """

    check: Check
    status: Status
    findings: tuple[Finding, ...] = ()
    reason: str = ""
    snippet: str = ""
    seconds: float = 0.0

    @property
    def cells(self) -> set[str]:
        """The declarations that it speaks of; of a failed check, those of the trial that failed."""
        failed = {cell for finding in self.findings if finding.failure for cell in finding.cells}
        tried = {cell for finding in self.findings for cell in finding.cells}
        return failed or tried | set(self.check.cells)


Judged = tuple[tuple[Finding, ...], float]
"""What running a check gave: its findings, the smallest trial first, and the seconds it took."""

JudgeChecks = Callable[[Sequence[Check], Context], Iterator[Judged]]
"""Runs checks; yields what each gave, in their order, as soon as it is known."""


def judge_here(checks: Sequence[Check], context: Context) -> Iterator[Judged]:
    """Run the checks one after the other in this process.

    Those after one that left the device unusable fail without being run.
    """
    judge = context.judge
    if not judge.lost_to and not judge.device_usable():
        judge.lost_to = "what this process ran before"
    for check in checks:
        began = time.perf_counter()
        if judge.lost_to:
            yield (_not_judged(check, judge.lost_to),), 0.0
        else:
            findings = mark_lost(judge, check.name, tuple(check.run(context)))
            yield findings, time.perf_counter() - began


def _not_judged(check: Check, lost_to: str) -> Finding:
    failure = f"not judged: the device was left unusable by {lost_to}"
    return Finding("every trial", check.cells, failure)


def run_check(check: Check, context: Context, waivers: Mapping[str, str]) -> Outcome:
    """Run one check, or say why it is not run."""
    idle = _not_run(check, context.corners, waivers)
    return idle or _outcome(check, *next(judge_here([check], context)))


def _not_run(check: Check, corners: Corners, waivers: Mapping[str, str]) -> Outcome | None:
    """The outcome of a check that is not to be run."""
    waiver = waivers.get(check.name)
    if waiver is not None:
        return Outcome(check, "waived", reason=waiver)
    undeclared = check.gate(corners)
    if undeclared is not None:
        return Outcome(check, "not declared", reason=undeclared)
    elsewhere = check.elsewhere(corners)
    if elsewhere is not None:
        return Outcome(check, "not here", reason=elsewhere)
    return None


def _outcome(check: Check, findings: tuple[Finding, ...], seconds: float) -> Outcome:
    """The outcome of a check that ran."""
    failed = next((finding for finding in findings if finding.failure), None)
    if not findings:
        return Outcome(check, "failed", reason="nothing was tried, so nothing is proved")
    return Outcome(
        check,
        "passed" if failed is None else "failed",
        findings,
        "" if failed is None else f"{failed.label}: {failed.failure}",
        "" if failed is None else failed.snippet,
        seconds,
    )


def run_suite(
    context: Context,
    *,
    waivers: Mapping[str, str] | None = None,
    only: Iterable[str] = (),
    judge: JudgeChecks = judge_here,
) -> Iterator[Outcome]:
    """The outcome of every check, as it comes.

    :param waivers: checks that are not run, each with the reason, which the report shows.
    :param only: names of the checks to run; empty for all.
    :param judge: runs those that are to be run: here, or as ``workers.Processes``.
    :raises ConfigError: a check that does not exist, or a waiver without a reason.
    """
    waivers = check_waivers(waivers or {})
    chosen = [known_check(name) for name in only] or CHECKS
    idle = [_not_run(check, context.corners, waivers) for check in chosen]
    to_run = [check for check, outcome in zip(chosen, idle, strict=True) if outcome is None]
    judged = judge(to_run, context)
    for check, outcome in zip(chosen, idle, strict=True):
        yield outcome or _outcome(check, *next(judged))


def make_context(
    subject: Subject, device: str, *, quick: bool, probe: Callable[[], None] | None = None
) -> Context:
    """What the checks of one backend share.

    :param quick: shorter sequences and fewer values.
    :param probe: raises where this process cannot use the device any more; can be pickled. By
        default it waits for a GPU.
    """
    if probe is None and device == "cuda":
        probe = torch.cuda.synchronize
    corners, judge = Corners(subject.spec, device, quick), Judge(subject.factory, probe)
    return Context(subject, corners, judge, device_name(device))
