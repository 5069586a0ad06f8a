"""The script that runs everything on a GPU: what, where, in which order, and how it ends."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

import isobit
from isobit.cli.main import main

FOLDER = Path(isobit.__file__).parent / "benchmarks"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(FOLDER))
    try:
        import gpu_all

        yield gpu_all
    finally:
        sys.path.remove(str(FOLDER))


def python(script: ModuleType, name: str, program: str, **changes: Any) -> Any:
    return script.Task(name, ("-c", program), **changes)


def test_every_backend_is_judged_verified_and_timed_under_one_name(script: ModuleType) -> None:
    every = script.tasks(16)
    names = [task.name for task in every]
    assert len(set(names)) == len(names)
    for backend in ("triton", "fa3", "flashinfer"):
        for kind in ("conformance of", "verify on", "throughput of", "turns of"):
            assert f"{kind} {backend}" in names
    assert all(task.after in ("", *names[: names.index(task.name)]) for task in every)
    results = [task.result for task in every if task.result]
    assert len(set(results)) == len(results)
    assert all(task.timed for task in every if task.result)


def test_every_command_is_one_that_there_is(script: ModuleType) -> None:
    """With ``--help`` behind it, a command parses what stands before and runs nothing."""
    for task in script.tasks(16):
        if task.command[:2] == ("-m", "isobit.cli.main"):
            result = CliRunner().invoke(main, [*task.command[2:], "--help"])
            assert (result.exit_code, task.name) == (0, task.name), result.output
        elif task.command[0] != "-m":
            assert (FOLDER.parent / task.command[0]).is_file()


def test_what_is_timed_has_the_first_gpu_for_itself(script: ModuleType) -> None:
    running: set[tuple[str, int]] = set()
    seen, lock = [], Lock()

    def run(task: Any, gpu: int) -> Any:
        with lock:
            running.add((task.name, gpu))
            seen.append((task, gpu, {other for other in running if other[1] == gpu}))
        time.sleep(0.02)
        with lock:
            running.remove((task.name, gpu))
        return script.Done(task, "ok")

    chosen = [script.Task(f"t{i}", (), timed=i % 2 == 0) for i in range(10)]
    for gpus in (1, 3):
        seen.clear()
        done = script.share_out(chosen, run, gpus, beside=2)
        assert {d.task.name for d in done} == {task.name for task in chosen}
        for task, gpu, beside in seen:
            assert not task.timed or (gpu == 0 and len(beside) == 1)
            assert task.timed or gpus == 1 or gpu > 0


def test_results_logs_and_states(script: ModuleType, tmp_path: Path) -> None:
    chosen = [
        python(script, "good one", "print('{folder}'); print('last')"),
        python(script, "kept", "print(1)", result="kept.jsonl", timed=True),
        python(script, "bad", "raise SystemExit(3)"),
    ]
    commands = script.Commands(chosen, tmp_path, time.monotonic() + 60)
    good, kept, bad = (commands.run(task, 0) for task in chosen)
    assert (good.state, good.last) == ("ok", "last")
    assert (tmp_path / "log" / "good-one.txt").read_text() == f"{tmp_path}\nlast\n"
    assert (kept.state, (tmp_path / "kept.jsonl").read_text()) == ("ok", "1\n")
    assert bad.state == "status 3"
    assert "good one" in script.summary([good, kept, bad])


def test_what_takes_too_long_ends_with_all_that_it_started(
    script: ModuleType, tmp_path: Path
) -> None:
    child = f"import time; time.sleep(2); open({str(tmp_path / 'alive')!r}, 'w')"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    slow = python(script, "slow", program, timeout=1.0)
    commands = script.Commands([slow], tmp_path, time.monotonic() + 60)
    assert commands.run(slow, 0).state == "cut off"
    time.sleep(2.5)
    assert not (tmp_path / "alive").exists()


def test_nothing_begins_without_time_left(script: ModuleType, tmp_path: Path) -> None:
    late = python(script, "late", "print(1)")
    commands = script.Commands([late], tmp_path, time.monotonic() + 1)
    assert commands.run(late, 0).state == "not run"


def test_a_task_waits_for_the_one_before_it(script: ModuleType, tmp_path: Path) -> None:
    place = str(tmp_path / "made")
    first = python(script, "first", f"import time; time.sleep(0.5); open({place!r}, 'w')")
    second = python(script, "second", f"open({place!r})", after="first")
    commands = script.Commands([first, second], tmp_path, time.monotonic() + 60)
    done = script.share_out([first, second], commands.run, 1, beside=2)
    assert [d.state for d in done] == ["ok", "ok"]
