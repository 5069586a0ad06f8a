"""The script that runs everything on a GPU: what, where, in which order, and how it ends."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from types import ModuleType
from typing import Any

import click
import pytest

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


def test_every_backend_is_judged_and_timed_under_one_name(script: ModuleType) -> None:
    every = script.tasks(16)
    names = [task.name for task in every]
    assert len(set(names)) == len(names)
    for backend in ("triton", "fa3", "flashinfer"):
        for kind in ("conformance of", "throughput of", "turns of"):
            assert f"{kind} {backend}" in names
    assert all(task.after in ("", *names[: names.index(task.name)]) for task in every)
    results = [task.result for task in every if task.result]
    assert len(set(results)) == len(results)
    assert all(task.timed for task in every if task.result)


def parsed(
    command: click.Command, arguments: list[str], parent: click.Context | None = None
) -> None:
    """Parse the arguments down to the last command, and run none."""
    context = command.make_context(command.name, arguments, parent)
    if isinstance(command, click.Group):
        left = context._protected_args + context.args
        _, inner, rest = command.resolve_command(context, left)
        assert inner is not None
        parsed(inner, rest, context)


def test_every_command_is_one_that_there_is(script: ModuleType) -> None:
    import gpu_proof

    verified: list[str] = []
    for task in script.tasks(16):
        if task.command[:2] == ("-m", "isobit.cli.main"):
            parsed(main, list(task.command[2:]))
        elif task.command[0] == "benchmarks/gpu_proof.py":
            verified.append(gpu_proof.parse(task.command[1:]).configuration)
        elif task.command[0] != "-m":
            assert (FOLDER.parent / task.command[0]).is_file()
    assert sorted(verified) == sorted(c.name for c in gpu_proof.TABLE)
    with pytest.raises(click.BadParameter):
        parsed(main, ["bench", "turns", "--turns", "0"])


@pytest.mark.parametrize(("gpus", "beside"), [(1, 2), (3, 2), (2, 1)])
def test_what_is_timed_has_the_first_gpu_for_itself(
    script: ModuleType, gpus: int, beside: int
) -> None:
    chosen = [script.Task(f"t{i}", (), timed=i % 3 == 0, memory=40 * (i % 3)) for i in range(18)]
    for task, gpu, together in shared_out(script, chosen, gpus, beside, memory=100):
        assert not task.timed or (gpu == 0 and together == [task])
        assert task.timed or gpus == 1 or gpu > 0
        assert len(together) <= beside
        assert sum(other.memory for other in together) <= 100


def test_without_a_measurement_every_gpu_is_used(script: ModuleType) -> None:
    seen = shared_out(script, [script.Task(f"t{i}", ()) for i in range(8)], 2, 2, memory=100)
    assert {gpu for _, gpu, _ in seen} == {0, 1}


def test_what_wants_all_memory_runs_alone(script: ModuleType) -> None:
    chosen = [script.Task("all", (), memory=float("inf"))]
    chosen += [script.Task(f"t{i}", ()) for i in range(6)]
    seen = shared_out(script, chosen, 1, 3, memory=100)
    assert len(seen) == 7
    assert all(together == [chosen[0]] for _, _, together in seen if chosen[0] in together)


def shared_out(
    script: ModuleType, chosen: list[Any], gpus: int, beside: int, memory: float
) -> list[tuple[Any, int, list[Any]]]:
    """Each task, its GPU, and what ran there as it began."""
    running: list[tuple[Any, int]] = []
    seen, lock = [], Lock()

    def run(task: Any, gpu: int) -> Any:
        with lock:
            running.append((task, gpu))
            seen.append((task, gpu, [other for other, where in running if where == gpu]))
        time.sleep(0.02)
        with lock:
            running.remove((task, gpu))
        return script.Done(task, "ok")

    done = script.share_out(chosen, run, gpus, beside, memory)
    assert [d.task for d in done] == chosen
    return seen


def test_results_logs_and_states(script: ModuleType, tmp_path: Path) -> None:
    chosen = [
        python(
            script,
            "good one",
            "import os; print('{folder}', flush=True); os.system('echo last >&2')",
        ),
        python(script, "kept", "print(1)", result="kept.jsonl", timed=True),
        python(script, "bad", "print(2); raise SystemExit(3)", result="bad.jsonl", timed=True),
    ]
    commands = script.Commands(tmp_path, time.monotonic() + 60)
    good, kept, bad = (commands.run(task, 0) for task in chosen)
    assert (good.state, good.last) == ("ok", "last")
    assert (tmp_path / "log" / "good-one.txt").read_text() == f"{tmp_path}\nlast\n"
    assert (kept.state, (tmp_path / "kept.jsonl").read_text()) == ("ok", "1\n")
    assert bad.state == "status 3"
    assert not (tmp_path / "bad.jsonl").exists()  # what is not whole has not the name
    assert (tmp_path / "bad.jsonl.part").read_text() == "2\n"
    assert "good one" in script.summary([good, kept, bad])


def test_what_takes_too_long_ends_with_all_that_it_started(
    script: ModuleType, tmp_path: Path
) -> None:
    child = f"import time; time.sleep(2); open({str(tmp_path / 'alive')!r}, 'w')"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    slow = python(script, "slow", program, timeout=1.0)
    commands = script.Commands(tmp_path, time.monotonic() + 60)
    assert commands.run(slow, 0).state == "cut off"
    time.sleep(2.5)
    assert not (tmp_path / "alive").exists()


@pytest.mark.parametrize("told", [True, False])
def test_what_is_cut_off_ends_what_it_has_cut_off_itself(
    script: ModuleType, tmp_path: Path, told: bool
) -> None:
    """As ``gpu_proof.py`` runs ``verify`` in a session below; untold it would go on."""
    alive = tmp_path / "alive"
    deepest = f"import time; time.sleep(3); open({str(alive)!r}, 'w')"
    program = f"""
import sys
sys.path.insert(0, {str(FOLDER)!r})
from whole_processes import end_on_request, run_whole
if {told}:
    end_on_request()
run_whole([sys.executable, "-c", {deepest!r}], 60)
"""
    slow = python(script, "slow", program, timeout=1.5)
    commands = script.Commands(tmp_path, time.monotonic() + 60)
    began = time.monotonic()
    assert commands.run(slow, 0).state == "cut off"
    time.sleep(max(0.0, 4.5 - (time.monotonic() - began)))
    assert alive.exists() is not told


def test_a_gpu_is_one_of_those_that_may_be_used(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert script.visible(1) == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert script.visible(1) == "5"


def test_nothing_begins_without_time_left(script: ModuleType, tmp_path: Path) -> None:
    late = python(script, "late", "print(1)")
    commands = script.Commands(tmp_path, time.monotonic() + 1)
    assert commands.run(late, 0).state == "not run"


def test_configurations_of_a_model_must_agree(script: ModuleType, tmp_path: Path) -> None:
    entry = {"model": "m", "backend": "b", "digests": ["1"], "fingerprints": ["f"]}
    for name, change in (("a", {}), ("b", {}), ("c", {"backend": "other", "digests": ["2"]})):
        text = json.dumps([entry | {"name": name} | change])
        (tmp_path / f"verify-{name}.json").write_text(text)
    assert script.apart(tmp_path) == []
    (tmp_path / "verify-d.json").write_text(json.dumps([entry | {"name": "d", "digests": ["2"]}]))
    assert script.apart(tmp_path) == ["m on b has 2 digests: 1 (a), 2 (d)"]


def test_nothing_at_a_time_is_refused(script: ModuleType) -> None:
    with pytest.raises(SystemExit, match="--beside was 0; wanted 1 or more"):
        script.run(["--beside", "0"])


def test_what_is_chosen_is_run_in_the_order_asked_for(script: ModuleType) -> None:
    a, b = script.Task("a first", ()), script.Task("b", ())
    c, d = script.Task("c", (), after="b"), script.Task("d first", ())
    assert script.select([a, b, c, d], ["c", "first"]) == [b, c, a, d]
    assert script.select([a, b, c, d], [""]) == [b, a, c, d]
    assert script.select([a, b, c, d], ["none"]) == []


def test_a_task_waits_for_the_one_before_it(script: ModuleType, tmp_path: Path) -> None:
    place = str(tmp_path / "made")
    first = python(script, "first", f"import time; time.sleep(0.5); open({place!r}, 'w')")
    second = python(script, "second", f"open({place!r})", after="first")
    commands = script.Commands(tmp_path, time.monotonic() + 60)
    done = script.share_out([first, second], commands.run, 1, beside=2, memory=100)
    assert [d.state for d in done] == ["ok", "ok"]
