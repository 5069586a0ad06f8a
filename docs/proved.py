"""The matrix of the documentation, with where each of its cells was proved.

``docs/proofs/*.json`` are records of the conformance suite, each written by its own command with
``--save``. A record that proves another declaration than today's makes the generation fail.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from isobit.backends.table import markdown_table, matrix_rows
from isobit.plugins.conformance.proof import declarations
from isobit.plugins.discovery import Candidate
from isobit.plugins.manager import PluginHost

FOLDER = Path(__file__).parent / "proofs"


def proved_matrix(candidates: Iterable[Candidate]) -> str:
    """The matrix of the candidates' backends; a letter in a cell points to its proof below.

    A backend whose plugin says that it is unproved is left out.
    """
    host = PluginHost(candidates=list(candidates))
    records = read_records(host)
    letters = dict(zip(ascii_lowercase, records, strict=False))
    backends = host.backends()
    rows = [row for row in matrix_rows(host) if not backends[row["backend"]].spec.unproved]
    table = markdown_table(rows, lambda row, cell: marks(letters, row, cell))
    lines = [f"- ({letter}) {where(record)}" for letter, record in letters.items()]
    return f"{table}\n\nProved, by letter:\n\n" + "\n".join(lines) + "\n" if lines else table + "\n"


def read_records(host: PluginHost) -> list[dict[str, Any]]:
    """The records of the host's backends, by backend and device.

    :raises SystemExit: one is of another declaration, or failed.
    """
    found = []
    for path in sorted(FOLDER.glob("*.json")):
        record = json.loads(path.read_text())
        backend = host.backends().get(record["backend"])
        if backend is None:
            continue
        declared = declarations(backend.spec.capabilities)
        today = {name: said for name, said, absent in declared if not absent}
        cells = record["cells"].items()
        then = {n: cell["declared"] for n, cell in cells if cell["verdict"] != "not declared"}
        if today != then:
            changed = sorted(n for n in today | then if today.get(n) != then.get(n))
            raise SystemExit(
                f"{path.name} proves another declaration of {', '.join(changed)}: run "
                f"{record['command']} --save docs/proofs/{path.name}"
            )
        found.append(record)
    return found


def marks(letters: dict[str, dict[str, Any]], backend: str, cell: str) -> str:
    """`` (a, b)``: the proofs of a backend's cell; and by name what they found wrong."""
    proved, failed = [], []
    for letter, record in letters.items():
        verdict = record["cells"].get(cell, {}).get("verdict")
        if record["backend"] == backend and verdict in ("proved", "failed"):
            (proved if verdict == "proved" else failed).append(letter)
    text = f" ✓ ({', '.join(proved)})" if proved else ""
    return text + (f" ✗ ({', '.join(failed)})" if failed else "")


def where(record: dict[str, Any]) -> str:
    """A proof in a line: the device, the versions, the date, the command, and what was tried."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    trials = sum(check["trials"] for check in record["checks"])
    tried = [f"{n}: {c['why']}" for n, c in record["cells"].items() if c["why"].endswith("tried")]
    waived = [
        f"{c['check']} waived: {c['reason']}" for c in record["checks"] if c["status"] == "waived"
    ]
    more = "".join(f"; {text}" for text in (*tried, *waived))
    return (
        f"{record['backend']} on {record['device']}, {record['date']}, {versions}: "
        f"`{record['command']}`, {trials} trials in {record['seconds']:.0f} s{more}"
    )
