"""Tables of what was measured on a GPU, out of the files that the commands wrote.

A generation cannot repeat these runs. ``benchmarks/results`` has their output as it came, and the
pages name the commands beside the tables.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tables import table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
GPU_PROOF = RESULTS / "h200-verify.json"
_PEERS = ("vLLM", "vLLM, batch-invariant", "SGLang", "SGLang, deterministic")
_BACKENDS = {
    "triton": "triton",
    "fa3": "fa3",
    "flashinfer": "flashinfer",
    "prefill=fa3,decode=triton": "fa3-triton",
    "prefill=flashinfer,decode=triton": "flashinfer-triton",
}
"""Attention backends in the order of the tables, and how the names of their files end."""
_NOTHING = "Not recorded yet.\n"


def gpu_throughput() -> str:
    """``isobit bench throughput --compare``: the engine, with the constraints lifted, and what
    peers took on the same card."""
    rows = _lines("h200-qwen3-8b-throughput.jsonl")
    held, lifted = (
        _complete([row for row in rows if row["deterministic"] is deterministic], "throughput")
        for deterministic in (True, False)
    )
    lines = []
    for peer in _peers():
        row = held[peer["workload"]]
        ours = _figure(row, peer)
        fastest = min(time for time in (ours, *(peer[name] for name in _PEERS)) if time)
        lines.append(
            (
                _spelt(peer),
                peer["unit"],
                _cell(ours, bold=ours == fastest),
                _cell(_figure(lifted[peer["workload"]], peer)),
                *(_cell(peer[name], bold=peer[name] == fastest) for name in _PEERS),
                f"{row['share_of_limit']:.0%}",
                f"{row['device_idle_share']:.1%}",
            )
        )
    head = ("requests x input → output", "unit", "Isobit", "Isobit, lifted")
    return table((*head, *_PEERS, "of the limit", "device idle"), lines)


def gpu_backends() -> str:
    """``isobit bench throughput`` on every backend whose rows are recorded, and the peers. One
    backend alone stands beside the peers in ``gpu_throughput``."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for backend, rows in _of_backends("h200-qwen3-8b-throughput", unnamed="triton").items():
        found[backend] = _complete([row for row in rows if row["deterministic"]], backend)
    if len(found) < 2:
        return _NOTHING
    lines = []
    for peer in _peers():
        times = [_figure(rows[peer["workload"]], peer) for rows in found.values()]
        ours = [_cell(time, bold=time == min(times)) for time in times]
        lines.append((_spelt(peer), peer["unit"], *ours, *_figures(peer)))
    names = [f"`{backend}`" for backend in found]
    return table(("requests x input → output", "unit", *names, *_PEERS), lines)


def gpu_turns() -> str:
    """``isobit bench turns`` on every backend whose rows are recorded.

    :raises SystemExit: two were given other conversations, or a run was cut off.
    """
    found = _of_backends("h200-turns")
    if not found:
        return _NOTHING
    lines, shapes = [], {}
    for backend, rows in found.items():
        *turns, total = rows
        if total["turn"] != "total":
            raise SystemExit(f"the recorded turns of {backend} were cut off: measure them again")
        shapes.setdefault(tuple((row["turn"], row["prompt_tokens"]) for row in rows), backend)
        lines.append(
            (
                f"`{backend}`",
                *(f"{row['hit_rate']:.0%}" for row in rows),
                f"{total['possible_hit_rate']:.0%}",
                f"{turns[-1]['time_to_first_token_ms']:.0f}",
                f"{total['seconds']:.2f}",
            )
        )
    if len(shapes) > 1:
        raise SystemExit(f"{' and '.join(shapes.values())} were given other conversations")
    numbers = [f"turn {row['turn']}" for row in turns]
    head = ("backend", *numbers, "all turns", "possible")
    return table((*head, "first token of the last turn, ms", "seconds"), lines)


def _complete(rows: list[dict[str, Any]], run: str) -> dict[str, dict[str, Any]]:
    """The rows by workload.

    :raises SystemExit: one of the peers' workloads is not there: the run was cut off.
    """
    found = {_workload(row): row for row in rows}
    lacking = [peer["workload"] for peer in _peers() if peer["workload"] not in found]
    if lacking:
        raise SystemExit(f"the recorded run {run} lacks {', '.join(lacking)}: measure it again")
    return found


def _of_backends(stem: str, unnamed: str = "") -> dict[str, list[dict[str, Any]]]:
    """The rows of every backend that has a file, ``{stem}-{backend}.jsonl``.

    :param unnamed: the backend whose file is ``{stem}.jsonl``.
    :raises SystemExit: a file has rows of another backend.
    """
    found = {}
    for backend, ending in _BACKENDS.items():
        name = f"{stem}.jsonl" if backend == unnamed else f"{stem}-{ending}.jsonl"
        if not (RESULTS / name).exists():
            continue
        found[backend] = _lines(name)
        others = {row["attention_backend"] for row in found[backend]} - {backend}
        if others:
            raise SystemExit(f"{name} has rows of {' and '.join(sorted(others))}")
    return found


def _peers() -> list[dict[str, Any]]:
    """What other engines took, by workload, in the order of the tables."""
    peers: list[dict[str, Any]] = json.loads((RESULTS / "h200-peers.json").read_text())
    return peers


def _spelt(peer: dict[str, Any]) -> str:
    requests, before, after = map(int, peer["workload"].split(":"))
    return f"{requests} x {before:,} → {after}"


def _cell(time: float | None, *, bold: bool = False) -> str:
    if time is None:
        return "-"
    return f"**{time:.2f}**" if bold else f"{time:.2f}"


def _figures(peer: dict[str, Any]) -> list[str]:
    return [_cell(peer[name]) for name in _PEERS]


def _workload(row: dict[str, Any]) -> str:
    return "{requests}:{input_len}:{output_len}".format(**row)


def _figure(row: dict[str, Any], peer: dict[str, Any]) -> float:
    """In the peer's unit."""
    figure: float = row["seconds"] if peer["unit"] == "s" else row["inter_token_ms"]
    return figure


def gpu_steps() -> str:
    """``isobit bench step``: milliseconds of each op in some steps, and its share of its limit."""
    phases = ("decode", "prefill")
    steps = [step for phase in phases for step in _lines(f"h200-qwen3-8b-steps-{phase}.jsonl")]
    names = list(dict.fromkeys(op["op"] for step in steps for op in step["ops"]))
    largest = {
        name: max(op["ms"] for step in steps for op in step["ops"] if op["op"] == name)
        for name in names
    }
    lines = [
        (f"`{name}`", *(_op(step, name) for step in steps))
        for name in sorted(names, key=lambda name: -largest[name])
    ]
    lines += [
        ("the device in all", *(f"{step['device_ms']:.2f}" for step in steps)),
        ("the step, with the host's part", *(f"{step['step_ms']:.2f}" for step in steps)),
        (
            "at least, by the limit",
            *(f"{step['floor_ms']:.2f} ({step['limit']})" for step in steps),
        ),
        ("kernels launched", *(f"{step['launches']:.0f}" for step in steps)),
    ]
    return table(("ms (share of the op's limit)", *map(_kind, steps)), lines)


def _kind(step: dict[str, Any]) -> str:
    if step["phase"] == "decode":
        return f"decode of {step['batch']}, {step['context']:,} before"
    return f"prefill of {step['batch']} x {step['tokens']:,}"


def _op(step: dict[str, Any], name: str) -> str:
    for op in step["ops"]:
        if op["op"] == name:
            share = op["share_of_limit"]
            return f"{op['ms']:.2f}" + (f" ({share:.0%})" if share is not None else "")
    return "-"


def gpu_startup() -> str:
    """``isobit bench startup``: seconds of each phase of a first and a second start."""
    starts = _lines("h200-qwen3-8b-startup.jsonl")
    phases = list(starts[0]["phases"])
    lines = [
        (
            ("first", "second")[index],
            *(f"{start['phases'][phase]:.1f}" for phase in phases),
            f"{start['engine'] - start['phases']['weights']:.1f}",
            f"{start['without_weights']:.1f}",
        )
        for index, start in enumerate(starts)
    ]
    head = ("start, seconds", *phases, "engine without weights", "process without weights")
    return table(head, lines)


def gpu_proof() -> str:
    """A recorded run of ``benchmarks/gpu_proof.py``, why rows were skipped, what it ran on."""
    entries = json.loads(GPU_PROOF.read_text())
    notes: dict[str, int] = {}  # by what is said, so that a backend's stands there once
    for said in (note for e in entries for note in _skipped(e)):
        notes.setdefault(said, len(notes) + 1)
    rows = [
        (
            f"`{e['model']}`",
            f"`{e['backend']}`",
            str(e["page_size"]),
            f"{e['chunk']:,}",
            f"`{e['flags']}`" if e["flags"] else "defaults",
            f"{e['requests']:,}",
            f"{e['longest_prompt']:,}",
            f"{len(e['held'])}"
            + "".join(f" [{notes[said]}]" for said in _skipped(e))
            + (f", **{len(e['failures'])} failed**" if e["failures"] else ""),
            ", ".join(f"`{digest}`" for digest in e["digests"]) or "-",
            f"{e['seconds']:.0f}",
        )
        for e in entries
    ]
    head = ("model", "backend", "pages of", "chunks of", "options", "requests at once")
    lines = "".join(f"- [{number}] {said}\n" for said, number in notes.items())
    return (
        table((*head, "longest prompt", "rows held", "digest", "seconds"), rows)
        + (f"\n{lines}" if lines else "")
        + f"\n{_not_run(entries)}{_provenance(entries)}\n"
    )


def _not_run(entries: list[dict[str, Any]]) -> str:
    """How many configurations of the table are not recorded, and which."""
    names = {entry["name"] for entry in entries}
    lacking = [f"`{name}`" for name in _configurations() if name not in names]
    if not lacking:
        return ""
    return (
        f"{len(lacking)} of the table's configurations are not recorded: {', '.join(lacking)}.\n\n"
    )


def _configurations() -> list[str]:
    """The names in the table of ``benchmarks/gpu_proof.py``."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from gpu_proof_table import TABLE
    finally:
        sys.path.pop(0)
    return [configuration.name for configuration in TABLE]


def _skipped(entry: dict[str, Any]) -> list[str]:
    skipped: dict[str, str] = entry["skipped"]
    return [f"{entry['backend']}, {row}: not run, {why}" for row, why in skipped.items()]


def _provenance(entries: list[dict[str, Any]]) -> str:
    """Device, versions, commits and dates of all entries, and the command of the first."""
    where = dict.fromkeys(
        f"{e['device']}, {', '.join(f'{k} {v}' for k, v in e['versions'].items())}; commit "
        f"`{e['commit']}`, {e['date']}"
        for e in entries
    )
    return f"{'. '.join(where)}. The first row is\n`{entries[0]['command']}`."


def _lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]
