"""Proves every invariance on a GPU over a table of configurations: ``isobit verify`` in each.

    python benchmarks/gpu_proof.py --list
    python benchmarks/gpu_proof.py                       # all, several at a time
    python benchmarks/gpu_proof.py --only qwen3-8b smollm2
    python benchmarks/gpu_proof.py --backend fa3 prefill=fa3,decode=triton
    python benchmarks/gpu_proof.py --configuration "qwen3-8b page 16 chunk 2048 on fa3"

Each configuration is a process of its own: as many at a time as the memory holds, the largest
first.

All of one model run the same requests, so all on one backend must give one digest: bits that
followed the page size, the chunks, the graphs or the number of neighbours would show even where
every row holds. Two backends may have two digests. What was found goes into a JSON file, beside
what other runs left there under other names. The exit status is 1 if a row failed, or was not run
though the backend's declaration promises what it is about, a process did not end well, or two
digests or fingerprints of a model on a backend differ.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from gpu_lanes import share_out
from gpu_proof_table import TABLE, TRIAL, Configuration
from whole_processes import end_on_request, run_whole

from isobit.backends.capabilities import Capabilities, Unsupported
from isobit.cli.columns import columns
from isobit.errors import ConfigError
from isobit.plugins.conformance.proof import versions_of
from isobit.plugins.conformance.subject import device_name, find_subject
from isobit.plugins.manager import PluginHost
from isobit.verify.judge import INVARIANCES

ROOT = Path(__file__).parent.parent
OUTPUT = ROOT / "benchmarks" / "results" / "h200-verify.json"


def prove(configuration: Configuration, device: str, timeout: float, commit: str) -> dict[str, Any]:
    """Run one configuration; what it found, as an entry of the file."""
    arguments = configuration.arguments(device)
    began, rows, problem = time.perf_counter(), [], ""
    try:
        done = run_whole(
            [sys.executable, "-m", "isobit.cli.main", *arguments],
            timeout,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode != 0:
            tail = " ".join(done.stderr.splitlines()[-3:])
            problem = f"exit status {done.returncode}: {tail}"
    except subprocess.TimeoutExpired as expired:
        problem = (
            f"not done after {timeout:g} s; {len(str(expired.stdout or '').splitlines())} rows"
        )
    excused = not_promised(PluginHost().require(configuration.backend).spec.capabilities)
    skipped = {
        row["invariance"]: row["skipped"]
        for row in rows
        if row["skipped"] and row["invariance"] in excused
    }
    held = [row["invariance"] for row in rows if row["holds"] and not row["skipped"]]
    failures = [f"{row['invariance']}: {row['failure']}" for row in rows if not row["holds"]]
    known = {row["invariance"] for row in rows if not row["skipped"]} | set(skipped)
    problem = problem or "; ".join(f"{name}: not run" for name in INVARIANCES if name not in known)
    runs = [run for row in rows for run in row["results"]]
    return {
        "name": configuration.name,
        "model": configuration.model.name,
        "backend": configuration.backend,
        "page_size": configuration.page_size,
        "chunk": configuration.chunk,
        "flags": " ".join(configuration.flags),
        "command": " ".join(["isobit", *arguments]),
        "held": held,
        "skipped": skipped,
        "failures": [*failures, *([problem] if problem and not failures else [])],
        "digests": sorted({row["digest"] for row in rows if not row["skipped"]}),
        "fingerprints": sorted({row["fingerprint"] for row in rows}),
        "cases": max((row["cases"] for row in rows), default=0),
        "requests": max((run["requests"] for run in runs), default=0),
        "runs": len(runs),
        "longest_prompt": max((row["longest_prompt"] for row in rows), default=0),
        "details": [f"{run['label']}: {run['detail']}" for run in runs if run["detail"]],
        "seconds": round(time.perf_counter() - began, 1),
        "commit": commit,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": device_name(device),
        "versions": _versions(configuration.backend, device),
    }


def not_promised(capabilities: Capabilities) -> set[str]:
    """The rows that ``verify`` does not run on a backend, as its declaration lacks what they are
    about."""
    lacking = {
        "score": not capabilities.decode_equals_prefill,
        "chunk": _uncut("chunked_prefill", capabilities),
        "cache": _uncut("radix_cache", capabilities),
    }
    return {row for row, lacks in lacking.items() if lacks}


def _uncut(feature: str, capabilities: Capabilities) -> bool:
    """Whether a deterministic engine is without a feature that cuts prompts in two."""
    cell = capabilities.cell(feature)
    return isinstance(cell, Unsupported) or not capabilities.chunk_invariant


def _versions(backend: str, device: str) -> dict[str, str]:
    """None where the backend cannot be loaded, of which ``verify`` has said why."""
    try:
        return versions_of(find_subject(backend, PluginHost()), device)
    except ConfigError:
        return {}


def disagreements(entries: Iterable[dict[str, Any]]) -> list[str]:
    """What must be one and the same for a model on a backend and is not."""
    found: dict[tuple[str, str, str], dict[str, str]] = {}
    for entry in entries:
        for kind in ("digests", "fingerprints"):
            for value in entry[kind]:
                key = (entry["model"], entry["backend"], kind)
                found.setdefault(key, {}).setdefault(value, entry["name"])
    return [
        f"{model} on {backend} has {len(values)} {kind}: "
        + ", ".join(f"{value} ({name})" for value, name in values.items())
        for (model, backend, kind), values in found.items()
        if len(values) > 1
    ]


def merged(path: Path, new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The file's entries, those of the same name replaced, in the order of the table."""
    old = json.loads(path.read_text()) if path.exists() else []
    entries = {entry["name"]: entry for entry in [*old, *new]}
    order = [configuration.name for configuration in TABLE]
    return sorted(
        entries.values(), key=lambda e: order.index(e["name"]) if e["name"] in order else -1
    )


def summary(entries: Iterable[dict[str, Any]]) -> str:
    head = ["configuration", "held", "at once", "longest", "digest", "seconds"]
    rows = [
        [
            entry["name"],
            _held(entry) + (" FAILED" if entry["failures"] else ""),
            str(entry["requests"]),
            str(entry["longest_prompt"]),
            " ".join(entry["digests"]) or "-",
            str(entry["seconds"]),
        ]
        for entry in entries
    ]
    return columns([head, *rows])


def _held(entry: dict[str, Any]) -> str:
    skipped = f" without {', '.join(entry['skipped'])}" if entry["skipped"] else ""
    return f"{len(entry['held'])}{skipped}"


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--list", action="store_true", help="the configurations; run nothing")
    parser.add_argument("--only", nargs="+", default=[""], help="names that contain one of these")
    parser.add_argument(
        "--backend",
        nargs="+",
        metavar="NAME",
        choices=list(dict.fromkeys(c.backend for c in TABLE)),
        help="attention backends, or pairs of them; default: all",
    )
    parser.add_argument("--configuration", metavar="NAME", help="this one alone, by its whole name")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--jobs", type=int, default=4, help="processes at a time")
    parser.add_argument("--memory", type=float, help="GiB for all; default: 0.85 of the GPU's")
    parser.add_argument("--timeout", type=float, default=400, help="seconds of one process")
    parser.add_argument("--commit", default=None, help="where there is no git to ask")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--merge", nargs="+", type=Path, help="take these files' entries; run none")
    return parser.parse_args(arguments)


def run(arguments: Sequence[str] | None = None) -> int:
    asked = parse(arguments)
    if asked.merge:
        new = [entry for path in asked.merge for entry in json.loads(path.read_text())]
        asked.output.write_text(json.dumps(merged(asked.output, new), indent=1) + "\n")
        return judged(asked.output, new)
    if asked.jobs < 1:
        raise SystemExit(f"--jobs was {asked.jobs}; wanted 1 or more processes at a time")
    named = asked.only != [""] or asked.configuration
    pool = TABLE + TRIAL if named else TABLE
    chosen = [
        c
        for c in pool
        if any(text in c.name for text in asked.only)
        and asked.configuration in (None, c.name)
        and (asked.backend is None or c.backend in asked.backend)
    ]
    if not chosen:
        on = f" on {' or '.join(asked.backend)}" if asked.backend else ""
        called = asked.configuration or f"with {' or '.join(asked.only)} in its name"
        raise SystemExit(f"there is no configuration{on} {called}; see --list")
    if asked.list:
        print("\n".join(f"{c.name}: {c.requests} requests, {c.memory:.0f} GiB" for c in chosen))
        return 0
    if asked.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "there is no CUDA device; --device cpu --only tiny tries the script itself"
        )
    memory = asked.memory or (
        0.85 * torch.cuda.mem_get_info()[1] / 2**30 if asked.device == "cuda" else 8.0 * asked.jobs
    )
    commit, writing = asked.commit or _commit(), Lock()

    def one(configuration: Configuration, gpu: int) -> dict[str, Any]:
        entry = prove(configuration, asked.device, asked.timeout, commit)
        with writing:  # as soon as it is known: the whole may be cut short
            asked.output.write_text(json.dumps(merged(asked.output, [entry]), indent=1) + "\n")
        state = "; ".join(entry["failures"]) or f"{_held(entry)} held"
        print(f"{configuration.name}: {entry['seconds']} s, {state}", flush=True)
        return entry

    chosen.sort(key=lambda configuration: -configuration.memory)
    return judged(asked.output, share_out(chosen, one, 1, asked.jobs, memory))


def judged(path: Path, new: Sequence[dict[str, Any]]) -> int:
    """Print the file's entries and what disagrees; the exit status."""
    entries = merged(path, new)
    problems = disagreements(entries)
    print("\n".join(problems))
    print(summary(entries))
    return 1 if problems or any(entry["failures"] for entry in new) else 0


if __name__ == "__main__":
    end_on_request()
    sys.exit(run())
