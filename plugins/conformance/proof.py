"""What the outcomes prove: each declaration of a backend beside a verdict, as data that is kept."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from typing import Any, Literal

import torch
from packaging.requirements import Requirement

from ...backends.capabilities import FEATURES, FLAGS, Capabilities, Conditional, Unsupported
from ...backends.rules import describe_set, installed_version
from .check import CONTRACT, Context
from .corners import GQA_RATIOS, Corners
from .subject import Subject
from .suite import Outcome


@dataclass(frozen=True, slots=True)
class Cell:
    """One declaration beside what the checks say of it.

    verdict: ``proved`` if every trial that speaks of it held; ``failed`` if one did not;
             ``waived`` if a check that speaks of it was not run; ``unproved`` if none was
    trials:  how many spoke of it
    why:     the reason of anything but ``proved``; of what was proved, which values were tried
             where not all were
    """

    declared: str
    verdict: Literal["proved", "failed", "waived", "unproved", "not declared"]
    trials: int
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What a run of the suite proved of one backend, where and with what.

    device:   its name, as people call it
    versions: of what the bits depend on, by distribution
    date:     ISO 8601
    command:  what to type to see it again, with every option that changes a verdict
    cells:    by name, in the order of the matrix
    checks:   one row a check: its name, promise, status, trials, seconds, reason, snippet
    """

    backend: str
    distribution: str
    version: str
    device: str
    device_type: str
    versions: Mapping[str, str]
    date: str
    command: str
    seconds: float
    cells: Mapping[str, Cell] = field(default_factory=dict)
    checks: Sequence[Mapping[str, Any]] = ()

    @property
    def holds(self) -> bool:
        """Whether no check failed."""
        return all(check["status"] != "failed" for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def make_proof(
    context: Context, outcomes: Sequence[Outcome], *, command: str, seconds: float
) -> Proof:
    """The proof that the outcomes of a whole suite are, which took so many seconds."""
    subject, device = context.subject, context.corners.device
    return Proof(
        backend=subject.spec.name,
        distribution=subject.distribution,
        version=subject.version,
        device=context.device_name,
        device_type=device,
        versions=versions_of(subject, device),
        date=date.today().isoformat(),
        command=command,
        seconds=round(seconds, 1),
        cells={
            name: _judge(name, declared, absent, outcomes, context.corners)
            for name, declared, absent in declarations(subject.spec.capabilities)
        },
        checks=[_row(outcome) for outcome in outcomes],
    )


def declarations(offers: Capabilities) -> Iterator[tuple[str, str, str]]:
    """Every cell: its name, what is declared, and why it is not (empty where it is)."""
    yield CONTRACT, "always", ""
    yield "dtypes", describe_set(offers.dtypes), ""
    yield "head_dims", describe_set(offers.head_dims), ""
    yield "page_sizes", describe_set(offers.page_sizes), ""
    yield "gqa", f"{GQA_RATIOS[0]} to {GQA_RATIOS[-1]}", ""
    for name in FLAGS:
        yield name, *(("yes", "") if getattr(offers, name) else ("no", "not declared"))
    absent = "" if offers.chunk_invariant else "not chunk_invariant"
    yield "alignment", str(offers.alignment), absent
    for name in FEATURES:
        cell = offers.cell(name)
        if isinstance(cell, Unsupported):
            yield name, "no", cell.reason
        else:
            yield name, f"yes: {cell.constraint}" if isinstance(cell, Conditional) else "yes", ""


def versions_of(subject: Subject, device: str) -> dict[str, str]:
    """What a result depends on: the backend, what it requires and found, torch and CUDA."""
    from ... import __version__

    required = [Requirement(text).name for text in subject.spec.requires]
    versions = {
        "isobit": __version__,
        subject.distribution: subject.version,
        **{name: installed_version(name) or "not installed" for name in required},
        **({"library": library} if (library := subject.factory.library()) else {}),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device == "cuda":
        versions["cuda"] = torch.version.cuda or "unknown"
        versions["triton"] = installed_version("triton") or "not installed"
    return versions


def _judge(
    name: str, declared: str, absent: str, outcomes: Sequence[Outcome], corners: Corners
) -> Cell:
    if absent:
        return Cell(declared, "not declared", 0, absent)
    speaking = [o for o in outcomes if name in o.cells]
    trials = sum(name in finding.cells for o in speaking for finding in o.findings)
    for verdict in ("failed", "waived"):
        reasons = [f"{o.check.name}: {o.reason}" for o in speaking if o.status == verdict]
        if reasons:
            return Cell(declared, verdict, trials, "; ".join(reasons))
    if trials:
        sampled = corners.tried(name) if name in ("head_dims", "page_sizes") else ""
        return Cell(declared, "proved", trials, sampled)
    idle = [f"{o.check.name}: {o.reason}" for o in speaking if o.reason]
    return Cell(declared, "unproved", 0, "; ".join(idle) or "no check that ran speaks of it")


def _row(outcome: Outcome) -> dict[str, Any]:
    return {
        "check": outcome.check.name,
        "what": outcome.check.what,
        "status": outcome.status,
        "trials": len(outcome.findings),
        "seconds": round(outcome.seconds, 2),
        "reason": outcome.reason,
        "snippet": outcome.snippet,
    }
