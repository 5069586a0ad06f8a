"""Correctness, invariances and speed on a GPU in one call, with a short table last.

    python benchmarks/gpu_all.py --list
    python benchmarks/gpu_all.py --output results             # every backend, every GPU there is
    python benchmarks/gpu_all.py --output results --only fa3 "GPU tests"

The first GPU is kept for what is timed, one command after the other. Everything else runs on the
others, some at a time; where there is only one GPU, before. What is to be kept lands in the folder
under the names of ``benchmarks/results`` and ``docs/proofs``, and every command's output in its
``log``. With ``--seconds`` no command begins that could not end in time, and those under way are
ended. The exit status is 1 if a command failed or was not run.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from threading import Event, Lock
from typing import Any

import torch
from gpu_all_tasks import Task, tasks

from isobit.cli.columns import columns

ROOT = Path(__file__).parent.parent
_LEAST = 20.0
"""Seconds below which nothing more is begun."""


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

    def __init__(self, chosen: Sequence[Task], folder: Path, end: float) -> None:
        self._folder, self._end = folder, end
        self._ended = {task.name: Event() for task in chosen}
        self._memory: dict[int, Lock] = defaultdict(Lock)
        (folder / "log").mkdir(parents=True, exist_ok=True)

    def run(self, task: Task, gpu: int) -> Done:
        """Wait for the task that must be before, then run this one."""
        try:
            if task.after in self._ended:
                self._ended[task.after].wait(max(0.0, self._left()))
            with self._memory[gpu] if task.large else nullcontext():
                if self._left() < _LEAST:
                    return Done(task, "not run")
                return self._run(task, gpu)
        finally:
            self._ended[task.name].set()

    def _left(self) -> float:
        return self._end - time.monotonic()

    def _run(self, task: Task, gpu: int) -> Done:
        began = time.monotonic()
        command = [part.replace("{folder}", str(self._folder)) for part in task.command]
        name = "".join(c if c.isalnum() else "-" for c in task.name)
        log = self._folder / "log" / f"{name}.txt"
        out = self._folder / task.result if task.result else log
        with log.open("w") as errors, out.open("a" if out == log else "w") as output:
            state = _state(
                [sys.executable, *command],
                {"CUDA_VISIBLE_DEVICES": str(gpu), "ISOBIT_CACHE": str(_cache(task))},
                output,
                errors,
                min(task.timeout, self._left()),
            )
        seconds = time.monotonic() - began
        print(f"{task.name}: {state}, {seconds:.0f} s", flush=True)
        lines = [line for line in out.read_text().splitlines() if line.strip()]
        return Done(task, state, seconds, lines[-1] if lines and not task.result else "")


def _cache(task: Task) -> Path:
    """What is chosen by measuring beside other work must not serve what is timed."""
    return Path.home() / ".cache" / ("isobit" if task.timed else "isobit-beside-other-work")


def _state(
    command: Sequence[str], changes: dict[str, str], output: Any, errors: Any, timeout: float
) -> str:
    process = subprocess.Popen(
        command,
        env=os.environ | changes,
        cwd=ROOT,
        stdout=output,
        stderr=errors,
        start_new_session=True,
    )
    try:
        status = process.wait(timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # and all that it started
        process.wait()
        return "cut off"
    return "ok" if status == 0 else f"status {status}"


def share_out(
    chosen: Sequence[Task], run: Callable[[Task, int], Done], gpus: int, beside: int
) -> list[Done]:
    """Run all: what is timed in turn on the first GPU, ``beside`` others on each other one."""
    timed = [task for task in chosen if task.timed]
    others = [task for task in chosen if not task.timed]
    free = range(1, gpus) if gpus > 1 else range(1)
    with ThreadPoolExecutor(1) as alone, ThreadPoolExecutor(beside * len(free)) as together:
        waiting = [together.submit(run, t, g) for t, g in zip(others, cycle(free), strict=False)]
        if gpus == 1:
            for future in waiting:
                future.result()
        in_turn = [alone.submit(run, task, 0) for task in timed]
        return [future.result() for future in (*waiting, *in_turn)]


def summary(done: Sequence[Done]) -> str:
    head = ("task", "state", "seconds", "last line")
    return columns([head, *((d.task.name, d.state, f"{d.seconds:.0f}", d.last[:80]) for d in done)])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--list", action="store_true", help="the commands; run nothing")
    parser.add_argument("--only", nargs="+", default=[""], help="names that contain one of these")
    parser.add_argument("--output", type=Path, default=Path("gpu-results"), help="a folder")
    parser.add_argument("--seconds", type=float, default=3600, help="for all of it")
    parser.add_argument("--beside", type=int, default=2, help="untimed commands at a time on a GPU")
    return parser.parse_args(arguments)


def run(arguments: Sequence[str] | None = None) -> int:
    asked = parse(arguments)
    every = tasks(os.cpu_count() or 1)
    chosen = [task for task in every if any(text in task.name for text in asked.only)]
    needed = {task.after for task in chosen}
    chosen = [task for task in every if task in chosen or task.name in needed]
    if not chosen:
        raise SystemExit(f"no task contains {' or '.join(asked.only)}; see --list")
    if asked.list:
        print("\n".join(f"{task.name}: {' '.join(task.command)}" for task in chosen))
        return 0
    if not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device; --list shows what would run on one")
    commands = Commands(chosen, asked.output.absolute(), time.monotonic() + asked.seconds)
    done = share_out(chosen, commands.run, torch.cuda.device_count(), asked.beside)
    print(summary(done))
    return 0 if all(d.state == "ok" for d in done) else 1


if __name__ == "__main__":
    sys.exit(run())
