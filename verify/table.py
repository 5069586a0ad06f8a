"""The verdicts as a table for people."""

from __future__ import annotations

from collections.abc import Sequence

from .judge import Verdict

_COLUMNS = ("invariance", "runs", "distinct results", "digest", "seconds", "verdict")


def table(verdicts: Sequence[Verdict]) -> str:
    """One row an invariance; below the rows how much took place in which run, and the failures."""
    rows = [_COLUMNS] + [_row(verdict) for verdict in verdicts]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines += [
        f"{v.invariance}, {r.label}: {r.detail}" for v in verdicts for r in v.results if r.detail
    ]
    lines += [f"{v.invariance}: {v.failure}" for v in verdicts if v.failure]
    return "\n".join(lines)


def _row(verdict: Verdict) -> tuple[str, ...]:
    if verdict.skipped is not None:
        return (verdict.invariance, "-", "-", "-", "-", f"not run: {verdict.skipped}")
    return (
        verdict.invariance,
        str(verdict.runs),
        str(verdict.distinct),
        verdict.digest,
        f"{verdict.seconds:.1f}",
        "holds" if verdict.holds else "FAILS",
    )
