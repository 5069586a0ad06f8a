"""The HTML report: one self-contained page of proofs, which loads nothing from anywhere.

``verify_page`` shows what ``isobit verify`` found, ``matrix_page`` the compatibility matrix with
what was proved of it.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ..backends.capabilities import FEATURES, FLAGS
from ..backends.rules import describe_set
from .plot import plot

if TYPE_CHECKING:
    from ..core.report import StartupReport
    from .judge import Verdict
    from .locate import Divergence
    from .modes import ModeResult

TEMPLATES = Path(__file__).parent / "templates"

MEANINGS = {
    "batch": "alone or with any neighbours",
    "order": "in any order of submission and completion",
    "chunk": "wherever prefills are cut",
    "cache": "from a cold, warm or half-evicted prefix cache",
    "preempt": "after being evicted and recomputed",
    "score": "scored as a prompt or decoded",
    "restart": "in a new process",
    "rng": "whatever the global generators are set to, and leaving them alone",
}
"""How the bits stay the same, by invariance."""

_SETS = ("dtypes", "head_dims", "page_sizes")
CELLS = ("contract", *_SETS, "gqa", *FLAGS, "alignment", *FEATURES)
"""The matrix's rows: everything that can be declared and proved."""


def verify_page(
    report: StartupReport,
    *,
    command: str,
    verdicts: Sequence[Verdict] = (),
    modes: Sequence[ModeResult] = (),
) -> str:
    """The page of ``isobit verify``.

    :param report: of the engine that was tried.
    :param command: as the user typed it.
    :param verdicts: of ``--test-mode all``.
    :param modes: the results of any other mode.
    """
    parts = report.fingerprint_parts
    failed = [v.invariance for v in verdicts if not v.holds]
    failed += [mode.label or "the prompt" for mode in modes if mode.unique > 1]
    facts = {
        "command": command,
        "fingerprint": report.fingerprint,
        "device": parts["device"],
        "attention": parts["attention_backend"],
        "kernels": parts["kernels"],
        "versions": f"isobit {parts['isobit']}, torch {parts['torch']}, {_python()}",
        "date": _now(),
    }
    return _render(
        "verify.html.j2",
        title="Same request, same bits?",
        clean=not failed,
        sentence=_verify_sentence(verdicts, modes, failed),
        facts=facts,
        report=report,
        verdicts=verdicts,
        modes=modes,
        meanings=MEANINGS,
        plots={v.invariance: plot(v.divergence) for v in verdicts if v.divergence},
        by_layer={v.invariance: _by_layer(v.divergence) for v in verdicts if v.divergence},
    )


def matrix_page(
    rows: Sequence[Mapping[str, Any]], proofs: Sequence[Mapping[str, Any]], *, command: str
) -> str:
    """The page of the compatibility matrix: declared beside proved.

    :param rows: as ``backends.table.matrix_rows`` returns them.
    :param proofs: one for each backend and device that was proved; a backend may have several or
        none. Each has ``backend``, ``distribution``, ``version``, ``device``, ``device_type``,
        ``versions`` (by name), ``date``, ``command``, ``seconds``; ``cells``, by a name of
        ``CELLS``, with ``declared``, ``verdict``, ``trials`` and ``why``; and ``checks``, each with
        ``check``, ``what``, ``status``, ``trials``, ``seconds``, ``reason`` and ``snippet``.
    :param command: as the user typed it.
    """
    verdicts = [cell["verdict"] for proof in proofs for cell in proof["cells"].values()]
    failed = "failed" in verdicts or any(
        check["status"] == "failed" for proof in proofs for check in proof["checks"]
    )
    return _render(
        "matrix.html.j2",
        title="Compatibility matrix",
        clean=not failed,
        sentence=_matrix_sentence(verdicts),
        facts={"command": command, "date": _now()},
        names=CELLS,
        features=FEATURES,
        columns=[_column(row, proofs) for row in rows],
        proofs=proofs,
    )


def _render(template: str, **values: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)


def _verify_sentence(
    verdicts: Sequence[Verdict], modes: Sequence[ModeResult], failed: Sequence[str]
) -> str:
    tried = len([v for v in verdicts if v.skipped is None])
    tried += len([mode for mode in modes if mode.samples])
    what = "invariances" if verdicts else "prompts"
    if failed:
        how = "do not hold" if verdicts else "gave more than one result"
        return f"{len(failed)} of {tried} {what} {how}: {', '.join(failed)}."
    runs = sum(v.runs for v in verdicts) + sum(mode.samples for mode in modes)
    skipped = [v.invariance for v in verdicts if v.skipped is not None]
    how = "hold" if verdicts else "gave one result each"
    text = f"All {tried} {what} {how}: the same bits in {runs} runs."
    return text + (f" Not run: {', '.join(skipped)}." if skipped else "")


def _matrix_sentence(verdicts: Sequence[str]) -> str:
    if not verdicts:
        return "What each backend declares. Nothing was proved in this run."
    claims = [verdict for verdict in verdicts if verdict != "not declared"]
    counts = [
        f"{claims.count(verdict)} {word}"
        for verdict, word in (
            ("failed", "failed"),
            ("waived", "waived"),
            ("unproved", "not proved"),
        )
        if verdict in claims
    ]
    proved = f"{claims.count('proved')} of {len(claims)} claims proved"
    return ", ".join([proved, *counts]) + "."


def _by_layer(divergence: Divergence) -> list[tuple[str, int, str, int, int]]:
    """Of each layer that differs: its name, first position and op there, and how many of how many
    positions differ."""
    found = []
    for layer, row in zip(divergence.layers, divergence.grid, strict=True):
        differing = [(position, op) for position, op in enumerate(row) if op]
        compared = sum(op is not None for op in row)
        if differing:
            found.append((layer, *differing[0], len(differing), compared))
    return found


def _column(row: Mapping[str, Any], proofs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A backend's cells: by name what it declares, and its proofs."""
    mine = [proof for proof in proofs if proof["backend"] == row["backend"]]
    return {
        "row": row,
        "proofs": mine,
        "declared": {name: _declared(name, row, mine) for name in CELLS},
    }


def _declared(
    name: str, row: Mapping[str, Any], proofs: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """One declared cell as a state, a text and a reason; what has no field a proof must say."""
    if name in FEATURES:
        cell = row["features"][name]
        text = {"supported": "yes", "conditional": "yes, if", "unsupported": "no"}[cell["state"]]
        return {"state": cell["state"], "text": text, "why": cell["why"]}
    if name in FLAGS:
        state = "supported" if row[name] else "unsupported"
        return {"state": state, "text": "yes" if row[name] else "no", "why": ""}
    if name in _SETS:
        values = row[name]
        text = describe_set(None if values is None else frozenset(values))
    elif name in row:
        text = str(row[name])
    else:
        texts = [proof["cells"][name]["declared"] for proof in proofs if name in proof["cells"]]
        text = texts[0] if texts else "not declared"
    return {"state": "value", "text": text, "why": ""}


def _python() -> str:
    return f"Python {platform.python_version()}"


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
