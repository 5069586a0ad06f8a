"""Correctness, invariances and speed on a GPU in one call, with a short table last.

    python benchmarks/gpu_all.py --list
    python benchmarks/gpu_all.py --output results             # every backend, every GPU there is
    python benchmarks/gpu_all.py --output results --only fa3 "GPU tests"

The first GPU is kept for what is timed, one command after the other. Everything else runs on the
others, some at a time, as their memory allows: before it where there is one GPU only, on all where
nothing is timed. ``--only`` says the order too, of what is timed and of the rest apart.

What is to be kept lands in the folder: measurements under the names of ``benchmarks/results``,
proofs under those of ``docs/proofs``, and ``verify-*.json`` for ``gpu_proof.py --merge``. Every
command's output is in its ``log``. With ``--seconds`` no command begins when hardly any time is
left, and those under way are ended. The exit status is 1 if a command failed or was not run, or
if two configurations of a model on a backend have other digests.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from gpu_all_tasks import Task, tasks
from gpu_lanes import share_out
from gpu_proof import disagreements
from whole_processes import run_whole

from isobit.cli.columns import columns

ROOT = Path(__file__).parent.parent
_LEAST = 20.0
"""Seconds below which nothing more is begun."""
_OF_MEMORY = 0.95
"""The part of a GPU's memory that is shared out."""


@dataclass(frozen=True, slots=True)
class Done:
    """How a command ended: ``state`` is ``ok``, ``status 1``, ``cut off`` or ``not run``."""

    task: Task
    state: str
    seconds: float = 0.0
    last: str = ""


class Commands:
    """Runs commands, each on one GPU, until the time is up.

    :param folder: where results and outputs go
    :param end: of ``time.monotonic``
    """

    def __init__(self, folder: Path, end: float) -> None:
        self._folder, self._end = folder, end
        (folder / "log").mkdir(parents=True, exist_ok=True)

    def run(self, task: Task, gpu: int) -> Done:
        left = self._end - time.monotonic()
        if left < _LEAST:
            return Done(task, "not run")
        began = time.monotonic()
        name = "".join(c if c.isalnum() else "-" for c in task.name)
        log = self._folder / "log" / f"{name}.txt"
        state = self._state(task, gpu, min(task.timeout, left), log)
        seconds = time.monotonic() - began
        print(f"{task.name}: {state}, {seconds:.0f} s", flush=True)
        lines = [line for line in log.read_text().splitlines() if line.strip()]
        return Done(task, state, seconds, lines[-1] if lines else "")

    def _state(self, task: Task, gpu: int, timeout: float, log: Path) -> str:
        """A result has its name only once it is whole."""
        command = [part.replace("{folder}", str(self._folder)) for part in task.command]
        environment = {"CUDA_VISIBLE_DEVICES": visible(gpu), "ISOBIT_CACHE": str(_cache(task))}
        part = self._folder / f"{task.result}.part"
        with (
            log.open("w") as output,
            part.open("w") if task.result else nullcontext(output) as kept,
        ):
            try:
                done = run_whole(
                    [sys.executable, *command],
                    timeout,
                    env=os.environ | environment,
                    cwd=ROOT,
                    stdout=kept,
                    stderr=output,
                )
            except subprocess.TimeoutExpired:
                return "cut off"
        if done.returncode != 0:
            return f"status {done.returncode}"
        if task.result:
            part.replace(self._folder / task.result)
        return "ok"


def visible(gpu: int) -> str:
    """What ``CUDA_VISIBLE_DEVICES`` calls the ``gpu``-th of those that this process may use."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",")[gpu] if given else str(gpu)


def _cache(task: Task) -> Path:
    """What is chosen by measuring beside other work must not serve what is timed."""
    return Path.home() / ".cache" / ("isobit" if task.timed else "isobit-beside-other-work")


def apart(folder: Path) -> list[str]:
    """What the configurations of a model on a backend should have in common, and have not."""
    files = sorted(folder.glob("verify-*.json"))
    found: list[str] = disagreements(entry for f in files for entry in json.loads(f.read_text()))
    return found


def summary(done: Sequence[Done]) -> str:
    head = ("task", "state", "seconds", "last line")
    return columns([head, *((d.task.name, d.state, f"{d.seconds:.0f}", d.last[:80]) for d in done)])


def select(every: Sequence[Task], texts: Sequence[str]) -> list[Task]:
    """The tasks whose names contain a text, in the order of the texts, behind what they need."""
    named = [task for text in texts for task in every if text in task.name]
    needed = {task.after for task in named}
    return list(dict.fromkeys([*(task for task in every if task.name in needed), *named]))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--list", action="store_true", help="the commands; run nothing")
    parser.add_argument(
        "--only",
        nargs="+",
        default=[""],
        help="names that contain one of these; what comes first runs first",
    )
    parser.add_argument("--output", type=Path, default=Path("gpu-results"), help="a folder")
    parser.add_argument("--seconds", type=float, default=10_000, help="for all of it")
    parser.add_argument("--beside", type=int, default=2, help="untimed commands at a time on a GPU")
    return parser.parse_args(arguments)


def run(arguments: Sequence[str] | None = None) -> int:
    asked = parse(arguments)
    if asked.beside < 1:
        raise SystemExit(f"--beside was {asked.beside}; wanted 1 or more commands at a time")
    chosen = select(tasks(os.cpu_count() or 1), asked.only)
    if not chosen:
        raise SystemExit(f"no task contains {' or '.join(asked.only)}; see --list")
    if asked.list:
        print("\n".join(f"{task.name}: {' '.join(task.command)}" for task in chosen))
        return 0
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; --list shows what would run on one")
    commands = Commands(asked.output.absolute(), time.monotonic() + asked.seconds)
    memory = _OF_MEMORY * torch.cuda.get_device_properties(0).total_memory / 2**30
    done = share_out(chosen, commands.run, torch.cuda.device_count(), asked.beside, memory)
    problems = apart(asked.output)
    print("\n".join([summary(done), *problems]))
    return 0 if all(d.state == "ok" for d in done) and not problems else 1


if __name__ == "__main__":
    sys.exit(run())
