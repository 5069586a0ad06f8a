"""Runs the conformance suite for the commands that show what it proves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ..plugins.conformance.proof import Proof
    from ..plugins.conformance.subject import Subject
    from ..plugins.conformance.suite import JudgeChecks
    from ..plugins.manager import PluginHost


def judge_in(jobs: int, make_host: Callable[[], PluginHost]) -> JudgeChecks:
    """How checks are run: in this process for one job, else in as many as there are jobs.

    :param make_host: makes the plugin host anew in each of them; can be pickled.
    """
    from ..plugins.conformance.suite import judge_here
    from ..plugins.conformance.workers import Processes

    return judge_here if jobs == 1 else Processes(jobs, make_host)


def prove(
    subject: Subject,
    device: str,
    *,
    quick: bool,
    judge: JudgeChecks,
    waivers: Mapping[str, str] | None = None,
    only: Sequence[str] = (),
    err: bool,
) -> tuple[Proof, str]:
    """The proof of one backend on one device, and its failures in words; empty if there are none.

    A line a check is printed as it ends, with ``err`` on standard error.
    """
    from ..plugins.conformance.proof import make_proof
    from ..plugins.conformance.suite import make_context, run_suite
    from ..plugins.conformance.text import failures, outcome_line

    context = make_context(subject, device, quick=quick)
    outcomes = []
    for outcome in run_suite(context, waivers=waivers, only=only, judge=judge):
        outcomes.append(outcome)
        click.echo(outcome_line(outcome), err=err)
    line = f"isobit plugins test {subject.spec.name} --device {device}"
    proof = make_proof(context, outcomes, command=line + (" --quick" if quick else ""))
    return proof, failures(outcomes)


def prove_all(
    host: PluginHost, *, quick: bool, judge: JudgeChecks
) -> tuple[list[Proof], list[str]]:
    """The proofs of every backend on every device of this machine that it declares.

    :returns: the proofs, and what could not be judged or failed, in words.
    """
    from ..errors import ConfigError
    from ..plugins.conformance.subject import find_subject, why_not_here

    proofs, told = [], []
    for name, backend in host.backends().items():
        for device in sorted(backend.spec.capabilities.devices):
            reason = why_not_here(device, backend.spec)
            if reason is not None:
                told.append(f"{name} is not judged on {device}: {reason}.")
                continue
            try:
                subject = find_subject(name, host)
            except ConfigError as error:
                told.append(f"{name} is not judged on {device}: {error}")
                continue
            click.echo(f"{name} on {device}", err=True)
            proof, failed = prove(subject, device, quick=quick, judge=judge, err=True)
            proofs.append(proof)
            told += [failed] if failed else []
    return proofs, told
