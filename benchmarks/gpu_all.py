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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Condition

import torch
from gpu_all_tasks import Task, tasks
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


class Board:
    """Tasks that are to be done; several threads take them.

    :param memory: of one GPU, GiB
    """

    def __init__(self, chosen: Sequence[Task], memory: float) -> None:
        self._left = list(chosen)
        self._unfinished = {task.name for task in chosen}
        self._running: list[tuple[Task, int]] = []
        self._memory = memory
        self._changed = Condition()

    def take(self, gpu: int, *, timed: bool) -> Task | None:
        """The next task for a GPU, waited for where others must end before; None at the end."""
        with self._changed:
            while any(task.timed is timed for task in self._left):
                task = next((t for t in self._left if self._fits(t, gpu, timed)), None)
                if task is not None:
                    self._left.remove(task)
                    self._running.append((task, gpu))
                    return task
                self._changed.wait()
            return None

    def ended(self, task: Task, gpu: int) -> None:
        """What waited for the task, or for its GPU's memory, may begin."""
        with self._changed:
            self._unfinished.remove(task.name)
            self._running.remove((task, gpu))
            self._changed.notify_all()

    def _fits(self, task: Task, gpu: int, timed: bool) -> bool:
        if task.timed is not timed or task.after in self._unfinished:
            return False
        beside = [other.memory for other, where in self._running if where == gpu]
        return not beside or sum(beside) + task.memory <= self._memory


def share_out(
    chosen: Sequence[Task],
    run: Callable[[Task, int], Done],
    gpus: int,
    beside: int,
    memory: float,
) -> list[Done]:
    """Run all: what is timed in turn on the first GPU, others on the other GPUs.

    :param beside: how many others at a time on a GPU
    :param memory: of one GPU, GiB
    """
    board = Board(chosen, memory)

    def work(gpu: int, timed: bool) -> list[Done]:
        done = []
        while (task := board.take(gpu, timed=timed)) is not None:
            try:
                done.append(run(task, gpu))
            finally:
                board.ended(task, gpu)
        return done

    kept = gpus > 1 and any(task.timed for task in chosen)
    others = [gpu for gpu in range(int(kept), gpus) for _ in range(beside)]
    with ThreadPoolExecutor(len(others) + 1) as pool:
        lanes = [pool.submit(work, gpu, False) for gpu in others]
        if gpus == 1:
            for lane in lanes:
                lane.result()
        lanes.append(pool.submit(work, 0, True))
        found = [done for lane in lanes for done in lane.result()]
    return sorted(found, key=lambda done: chosen.index(done.task))


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
