"""The compatibility matrix as a table: for ``isobit backends``, its JSON and the documentation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .capabilities import (
    FEATURES,
    FLAGS,
    Cell,
    Conditional,
    Refusal,
    Requirements,
    Supported,
    Unsupported,
)
from .matrix import objections
from .rules import Installed, cell_for, describe_set, installed_version

if TYPE_CHECKING:
    from ..plugins.manager import PluginHost, RegisteredBackend

Row = dict[str, Any]
"""One backend, JSON-able; its keys are those that ``_row`` writes."""


def matrix_rows(
    host: PluginHost,
    requirements: Requirements | None = None,
    *,
    pair: RegisteredBackend | None = None,
    installed: Installed = installed_version,
) -> list[Row]:
    """One row a usable backend, sorted by name; last that of a pair, if one is given.

    With ``requirements``, cells say what holds under them and ``refusals`` lists all objections;
    without, cells are as declared and ``refusals`` is ``None``.
    """
    backends = [*host.backends().values(), *([pair] if pair else [])]
    return [_row(backend, host, requirements, installed) for backend in backends]


def text_table(rows: list[Row]) -> str:
    """The matrix for a terminal: a column a backend, the reasons below."""
    lines, notes = _grid(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    body = [
        "  ".join(f"{text:{width}}" for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join([*body, *(f"[{i}] {note}" for i, note in enumerate(notes, 1))])


def markdown_table(
    rows: list[Row], marks: Callable[[str, str], str] = lambda backend, cell: ""
) -> str:
    """The matrix for the documentation: a column a backend, the reasons below.

    :param marks: what is put behind a cell, by the backend's name and the cell's.
    """
    lines, notes = _grid(rows)
    names = lines[0]
    lines[1:] = [
        [line[0], *(t + marks(n, line[0]) for t, n in zip(line[1:], names[1:], strict=True))]
        for line in lines[1:]
    ]
    escaped = [[text.replace("|", r"\|") for text in line] for line in lines]
    body = [f"| {' | '.join(line)} |" for line in escaped]
    rule = f"|{' --- |' * len(lines[0])}"
    footer = ["", *(f"- [{i}] {note}" for i, note in enumerate(notes, 1))] if notes else []
    return "\n".join([body[0], rule, *body[1:], *footer])


def _row(
    backend: RegisteredBackend,
    host: PluginHost,
    requirements: Requirements | None,
    installed: Installed,
) -> Row:
    spec, offers = backend.spec, backend.spec.capabilities
    reasons = None
    if requirements is not None:
        reasons = objections(requirements, spec, host, installed=installed)
    lowest, highest = offers.compute_capability, offers.highest_compute_capability
    return {
        "backend": spec.name,
        "plugin": backend.plugin,
        "distribution": backend.distribution,
        "version": backend.version,
        "api": spec.api,
        "requires": list(spec.requires),
        "also_requires": spec.also_requires,
        "devices": sorted(offers.devices),
        "compute_capability": None if lowest is None else list(lowest),
        "highest_compute_capability": None if highest is None else list(highest),
        "gpus": offers.gpus,
        "dtypes": sorted(offers.dtypes),
        "head_dims": None if offers.head_dims is None else sorted(offers.head_dims),
        "page_sizes": None if offers.page_sizes is None else sorted(offers.page_sizes),
        "deterministic": offers.deterministic,
        "chunk_invariant": offers.chunk_invariant,
        "alignment": offers.alignment,
        "decode_equals_prefill": offers.decode_equals_prefill,
        "engine_writes_kv": offers.engine_writes_kv,
        "unproved": spec.unproved,
        "features": {
            name: _cell(cell_for(name, requirements, spec) if requirements else offers.cell(name))
            for name in FEATURES
        },
        "refusals": None if reasons is None else [asdict(reason) for reason in reasons],
    }


def _cell(cell: Cell) -> dict[str, str]:
    match cell:
        case Supported():
            return {"state": "supported", "why": ""}
        case Conditional(constraint):
            return {"state": "conditional", "why": constraint}
        case Unsupported(reason):
            return {"state": "unsupported", "why": reason}


def _grid(rows: list[Row]) -> tuple[list[list[str]], list[str]]:
    """The table's lines, heading first, and the notes that its cells point to."""
    notes: list[str] = []
    lines = [
        ["", *(row["backend"] for row in rows)],
        ["from", *(row["distribution"] for row in rows)],
        ["requires", *(_requires(row) for row in rows)],
        ["devices", *(_devices(row) for row in rows)],
        *(
            [name, *(_set(row[name]) for row in rows)]
            for name in ("dtypes", "head_dims", "page_sizes")
        ),
        *([name, *("yes" if row[name] else "no" for row in rows)] for name in FLAGS),
        ["alignment", *(str(row["alignment"]) for row in rows)],
        *([name, *(_feature(name, row, notes) for row in rows)] for name in FEATURES),
    ]
    if any(row["unproved"] for row in rows):
        lines.append(["taken by auto", *(_by_auto(row, notes) for row in rows)])
    if any(row["refusals"] is not None for row in rows):
        lines.append(["serves what is asked", *(_verdict(row, notes) for row in rows)])
    return lines, notes


def _requires(row: Row) -> str:
    return ", ".join(filter(None, [*row["requires"], row["also_requires"]])) or "nothing"


def _devices(row: Row) -> str:
    suffix = f" (compute capability {row['gpus']})" if row["gpus"] else ""
    return ", ".join(row["devices"]) + suffix


def _set(values: list[int] | list[str] | None) -> str:
    return describe_set(None if values is None else frozenset(values))


def _feature(name: str, row: Row, notes: list[str]) -> str:
    cell = row["features"][name]
    word = {"supported": "yes", "conditional": "yes", "unsupported": "no"}[cell["state"]]
    return word + _point(f"{row['backend']}, {name}: {cell['why']}" if cell["why"] else "", notes)


def _by_auto(row: Row, notes: list[str]) -> str:
    why = f"{row['backend']}: {row['unproved']}" if row["unproved"] else ""
    return ("no" if why else "yes") + _point(why, notes)


def _verdict(row: Row, notes: list[str]) -> str:
    if not row["refusals"]:
        return "yes"
    reasons = [f"{row['backend']}: {Refusal(**refusal)}" for refusal in row["refusals"]]
    return "no" + "".join(_point(reason, notes) for reason in reasons)


def _point(note: str, notes: list[str]) -> str:
    """Add a note and return its mark; the empty note has none."""
    if not note:
        return ""
    notes.append(note)
    return f" [{len(notes)}]"
