"""Runs the conformance suite for the commands that show what it proves."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from shlex import join
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from ..plugins.conformance.proof import Proof
    from ..plugins.conformance.subject import Subject
    from ..plugins.conformance.suite import JudgeChecks
    from ..plugins.manager import PluginHost, RegisteredBackend


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
    began, outcomes = time.perf_counter(), []
    for outcome in run_suite(context, waivers=waivers, only=only, judge=judge):
        outcomes.append(outcome)
        click.echo(outcome_line(outcome), err=err)
    command = _command(subject, device, quick, only, waivers or {})
    seconds = time.perf_counter() - began
    proof = make_proof(context, outcomes, command=command, seconds=seconds)
    return proof, failures(outcomes)


def _command(
    subject: Subject, device: str, quick: bool, only: Sequence[str], waivers: Mapping[str, str]
) -> str:
    """What to type to see the proof again: all options but those that change no result."""
    disabled = [r.name for r in subject.host.records() if r.status == "disabled"]
    words = ["isobit", "plugins"]
    words += [word for name in disabled for word in ("--no-plugin", name)]
    words += ["test", subject.spec.name, "--device", device]
    words += ["--quick"] if quick else []
    words += [word for name in only for word in ("--check", name)]
    words += [word for name, why in waivers.items() for word in ("--waive", f"{name}={why}")]
    return join(words)


def prove_all(
    host: PluginHost,
    *,
    quick: bool,
    judge: JudgeChecks,
    pair: RegisteredBackend | None = None,
) -> tuple[list[Proof], list[str]]:
    """The proofs of every backend on every device of this machine that it declares.

    :param pair: a pair of backends to prove besides.
    :returns: the proofs, and what could not be judged or failed, in words.
    """
    from ..errors import ConfigError
    from ..plugins.conformance.subject import find_subject, why_not_here

    proofs, told = [], []
    specs = [b.spec for b in (*host.backends().values(), *([pair] if pair else []))]
    # All are asked for at first: a device that a backend broke tells nothing.
    wanted = [
        (spec.name, device, why_not_here(device, spec))
        for spec in specs
        for device in sorted(spec.capabilities.devices)
    ]
    for name, device, reason in wanted:
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
