"""Tables of what was measured on a GPU, out of the files that the commands wrote.

A generation cannot repeat these runs. ``benchmarks/results`` has their output as it came, and the
pages name the commands beside the tables.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tables import table

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
GPU_PROOF = RESULTS / "h200-verify.json"
_PEERS = ("vLLM", "vLLM, batch-invariant", "SGLang", "SGLang, deterministic")


def gpu_throughput() -> str:
    """``isobit bench throughput``, and what peers took on the same card; with ``--compare`` also
    the engine whose constraints are lifted."""
    rows = _lines("h200-qwen3-8b-throughput.jsonl")
    lifted = {_workload(row): row for row in rows if not row["deterministic"]}
    measured = json.loads((RESULTS / "h200-peers.json").read_text())
    peers = {peer["workload"]: peer for peer in measured}
    lines = []
    for row in (row for row in rows if row["deterministic"]):
        peer = peers[_workload(row)]
        lines.append(
            (
                f"{row['requests']} x {row['input_len']:,} → {row['output_len']}",
                f"**{_figure(row, peer)}** {peer['unit']}",
                *([_figure(lifted[_workload(row)], peer)] if lifted else []),
                *("-" if peer[name] is None else f"{peer[name]:.2f}" for name in _PEERS),
                f"{row['share_of_limit']:.0%}",
                f"{row['device_idle_share']:.1%}",
            )
        )
    ours = ("Isobit", "Isobit, lifted") if lifted else ("Isobit",)
    return table(
        ("requests x input → output", *ours, *_PEERS, "of the limit", "device idle"), lines
    )


def _workload(row: dict[str, Any]) -> str:
    return "{requests}:{input_len}:{output_len}".format(**row)


def _figure(row: dict[str, Any], peer: dict[str, Any]) -> str:
    return f"{row['seconds'] if peer['unit'] == 's' else row['inter_token_ms']:.2f}"


def gpu_steps() -> str:
    """``isobit bench step``: milliseconds of each op in some steps, and its share of its limit."""
    steps = _lines("h200-qwen3-8b-steps.jsonl")
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
    """A recorded run of ``benchmarks/gpu_proof.py``, and what it ran on."""
    entries = json.loads(GPU_PROOF.read_text())
    rows = [
        (
            f"`{e['model']}`",
            str(e["page_size"]),
            f"{e['chunk']:,}",
            f"`{e['flags']}`" if e["flags"] else "defaults",
            f"{e['requests']:,}",
            f"{e['longest_prompt']:,}",
            f"{len(e['held'])}" + (f", **{len(e['failures'])} failed**" if e["failures"] else ""),
            ", ".join(f"`{digest}`" for digest in e["digests"]) or "-",
            f"{e['seconds']:.0f}",
        )
        for e in entries
    ]
    head = ("model", "pages of", "chunks of", "options", "requests at once", "longest prompt")
    return table((*head, "rows held", "digest", "seconds"), rows) + f"\n{_provenance(entries)}\n"


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
