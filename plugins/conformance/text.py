"""Outcomes and proofs as text, for a terminal."""

from __future__ import annotations

from collections.abc import Iterable

from .proof import Proof
from .suite import Outcome


def outcome_line(outcome: Outcome) -> str:
    """One check in a line: its name, what came of it, its promise or the reason."""
    trials = f"{len(outcome.findings)} trials, {outcome.seconds:.1f} s"
    told = trials if outcome.status == "passed" else outcome.reason
    return f"{outcome.check.name:12} {outcome.status:12} {told}"


def failures(outcomes: Iterable[Outcome]) -> str:
    """Every failed check: the promise, how it was broken, and a program that repeats it."""
    parts = []
    for outcome in outcomes:
        if outcome.status == "failed":
            program = f"\nTo repeat it:\n\n{_indented(outcome.snippet)}" if outcome.snippet else ""
            parts.append(
                f"{outcome.check.name} FAILS: {outcome.check.what}.\n{outcome.reason}.{program}"
            )
    return "\n\n".join(parts)


def proof_table(proof: Proof) -> str:
    """Declared beside proved, a line a cell."""
    rows = [("", "declared", "verdict", "trials", "why")]
    rows += [
        (name, cell.declared, cell.verdict, str(cell.trials or "-"), cell.why)
        for name, cell in proof.cells.items()
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [
        "  ".join([f"{text:{width}}" for text, width in zip(row, widths, strict=False)] + [row[4]])
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def verdict(proof: Proof) -> str:
    """One sentence: does it hold what it declares."""
    counts = {s: sum(c["status"] == s for c in proof.checks) for s in ("failed", "waived")}
    where = f"on {proof.device} ({proof.seconds:.0f} s)"
    if counts["failed"]:
        return f"{proof.backend} FAILS {counts['failed']} of {len(proof.checks)} checks {where}."
    waived = f"; {counts['waived']} waived" if counts["waived"] else ""
    return f"{proof.backend} holds what was tried of its declaration{waived}, {where}."


def _indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())
