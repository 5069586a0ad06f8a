"""The script that proves the invariances on a GPU: what its table covers, what it would notice."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import isobit

FOLDER = Path(isobit.__file__).parent / "benchmarks"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    sys.path.insert(0, str(FOLDER))
    try:
        import gpu_proof

        yield gpu_proof
    finally:
        sys.path.remove(str(FOLDER))


def entry(name: str = "a", **changes: Any) -> dict[str, Any]:
    return {"name": name, "model": "m", "digests": ["d"], "fingerprints": ["f"]} | changes


def test_every_model_meets_every_page_size_chunk_and_has_graphs_on_and_off(
    script: ModuleType,
) -> None:
    for model in {configuration.model.name for configuration in script.TABLE}:
        mine = [c for c in script.TABLE if c.model.name == model]
        assert {c.page_size for c in mine} == {16, 64, 128}
        chunks = {c.chunk for c in mine}
        assert (min(chunks), max(chunks)) == (256, 8192)
        graphs = ["--no-cuda-graph" not in c.flags for c in mine]
        assert {True, False} == set(graphs)
        assert max(c.requests for c in mine) == 300
        assert all(c.requests < c.chunk for c in mine)
    names = [c.name for c in script.TABLE]
    assert len(set(names)) == len(names)


def test_digests_and_fingerprints_that_differ_are_named(script: ModuleType) -> None:
    same = [entry("a"), entry("b"), entry("c", model="n", digests=["e"], fingerprints=["g"])]
    assert script.disagreements(same) == []
    other = script.disagreements([*same, entry("x", digests=["z"])])
    assert other == ["m has 2 digests: d (a), z (x)"]
    assert script.disagreements([*same, entry("x", fingerprints=["z"])]) == [
        "m has 2 fingerprints: f (a), z (x)"
    ]


def test_a_file_keeps_what_other_runs_left(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    names = [configuration.name for configuration in script.TABLE[:2]]
    path.write_text(json.dumps([entry(names[1], seconds=1), entry(names[0], seconds=1)]))
    found = script.merged(path, [entry(names[1], seconds=2)])
    assert [(e["name"], e["seconds"]) for e in found] == [(names[0], 1), (names[1], 2)]


def test_large_ones_run_in_turn_and_memory_is_not_exceeded(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    running: dict[str, float] = {}
    seen: list[list[float]] = []
    lock = Lock()

    def work(configuration: Any) -> dict[str, Any]:
        with lock:
            running[configuration.name] = configuration.memory
            seen.append(list(running.values()))
        time.sleep(0.02)
        with lock:
            del running[configuration.name]
        return {"name": configuration.name}

    found = script.side_by_side(script.TABLE, work, 131.0, 4)
    assert sorted(e["name"] for e in found) == sorted(c.name for c in script.TABLE)
    assert max(map(sum, seen)) <= 131
    assert max(map(len, seen)) > 1
    assert all(sum(memory > script._LARGE for memory in held) <= 1 for held in seen)
    seen.clear()
    monkeypatch.setattr(script.Room, "take", lambda self, amount: None)  # the negative control
    script.side_by_side(script.TABLE, work, 90.0, 4)
    assert max(map(sum, seen)) > 90


def test_a_run_on_the_cpu(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "found.json"
    arguments = ["--device", "cpu", "--only", "tiny-qwen3 page 64", "--output", str(path)]
    assert script.run(arguments) == 0
    (found,) = json.loads(path.read_text())
    assert len(found["held"]) == 8
    assert found["failures"] == []
    assert found["requests"] == 40
    assert "40 at once: 40 decoding in one step" in found["details"]
    assert capsys.readouterr().out.splitlines()[-1].split()[-2] == found["digests"][0]
    assert script.run([*arguments, "--timeout", "0.1"]) == 1
    (found,) = json.loads(path.read_text())
    assert found["failures"] == ["not done after 0.1 s; 0 rows"]


def test_refusals(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="see --list"):
        script.run(["--only", "no-such-model"])
    assert script.run(["--list", "--only", "8b"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_row_that_was_not_run_is_a_failure(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not run for a reason, or not there at all."""
    rows = [
        {
            "invariance": name,
            "holds": True,
            "failure": None,
            "results": [],
            "skipped": "off" if name == "cache" else None,
            "digest": "d",
            "fingerprint": "f",
            "cases": 1,
            "longest_prompt": 1,
        }
        for name in script.INVARIANCES[:-1]
    ]
    printed = "\n".join(map(json.dumps, rows))
    done = SimpleNamespace(returncode=0, stdout=printed, stderr="")
    monkeypatch.setattr(script.subprocess, "run", lambda *args, **options: done)
    found = script.prove(script.TRIAL[0], "cpu", 1.0, "commit")
    assert found["failures"] == ["cache: not run; rng: not run"]
    assert len(found["held"]) == len(script.INVARIANCES) - 2
