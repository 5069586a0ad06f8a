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
from isobit.backends.capabilities import Capabilities, Supported
from isobit.plugins.manager import PluginHost
from isobit.verify.judge import INVARIANCES

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
    same = {"model": "m", "backend": "triton", "digests": ["d"], "fingerprints": ["f"]}
    return {"name": name} | same | changes


def printed(*skipped: str, without: str = "") -> SimpleNamespace:
    """What ``isobit verify --json`` leaves: every row, some not run, one not there at all."""
    rows = [
        {
            "invariance": name,
            "holds": True,
            "failure": None,
            "results": [],
            "skipped": f"no {name}" if name in skipped else None,
            "digest": "" if name in skipped else "d",
            "fingerprint": "f",
            "cases": 1,
            "longest_prompt": 1,
        }
        for name in INVARIANCES
        if name != without
    ]
    return SimpleNamespace(returncode=0, stdout="\n".join(map(json.dumps, rows)), stderr="")


@pytest.mark.parametrize("backend", ["triton", "fa3", "flashinfer"])
def test_every_model_meets_every_page_size_chunk_and_has_graphs_on_and_off(
    script: ModuleType, backend: str
) -> None:
    alone = [c for c in script.TABLE if c.backend == backend]
    models = {c.model.name for c in script.TABLE}
    assert {c.model.name for c in alone} == models
    assert len(models) == 4
    for model in models:
        mine = [c for c in alone if c.model.name == model]
        assert {c.page_size for c in mine} == {16, 64, 32 if backend == "fa3" else 128}
        chunks = {c.chunk for c in mine}
        assert (min(chunks), max(chunks)) == (256, 8192)
        graphs = ["--no-cuda-graph" not in c.flags for c in mine]
        assert {True, False} == set(graphs)
        assert max(c.requests for c in mine) == 300
        assert all(c.requests < c.chunk for c in mine)
    flags = [flag for c in alone for flag in c.flags]
    assert {"--cuda-graph-max-bs", "--no-async-scheduling"} <= set(flags)


def test_both_pairs_meet_a_large_and_a_small_model(script: ModuleType) -> None:
    for prefill in ("fa3", "flashinfer"):
        pair = f"prefill={prefill},decode=triton"
        models = [c.model.name for c in script.TABLE if c.backend == pair]
        assert models == ["qwen3-8b", "llama-3.2-1b"]


def test_a_name_is_one_configuration_and_says_its_backend(script: ModuleType) -> None:
    names = [c.name for c in script.TABLE]
    assert len(set(names)) == len(names)
    assert names[0] == "qwen3-8b page 16 chunk 2048"
    assert "qwen3-8b page 16 chunk 2048 on prefill=fa3,decode=triton" in names
    for c in script.TABLE:
        arguments = c.arguments("cuda")
        assert arguments[arguments.index("--attention-backend") + 1] == c.backend


def test_every_backend_declares_the_pages_that_it_is_given(script: ModuleType) -> None:
    host = PluginHost()
    for c in script.TABLE:
        pages = host.require(c.backend).spec.capabilities.page_sizes
        assert pages is None or c.page_size in pages


def test_digests_and_fingerprints_that_differ_are_named(script: ModuleType) -> None:
    same = [entry("a"), entry("b"), entry("c", model="n", digests=["e"], fingerprints=["g"])]
    assert script.disagreements(same) == []
    other = script.disagreements([*same, entry("x", digests=["z"])])
    assert other == ["m on triton has 2 digests: d (a), z (x)"]
    assert script.disagreements([*same, entry("x", fingerprints=["z"])]) == [
        "m on triton has 2 fingerprints: f (a), z (x)"
    ]


def test_two_backends_may_have_two_digests_but_not_one_of_them(script: ModuleType) -> None:
    theirs = {"backend": "fa3", "digests": ["e"], "fingerprints": ["g"]}
    two = [entry("a"), entry("b", **theirs), entry("c", **theirs)]
    assert script.disagreements(two) == []
    assert script.disagreements([*two, entry("x", **(theirs | {"digests": ["z"]}))]) == [
        "m on fa3 has 2 digests: e (b), z (x)"
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

    def work(configuration: Any, gpu: int) -> dict[str, Any]:
        with lock:
            running[configuration.name] = configuration.memory
            seen.append(list(running.values()))
        time.sleep(0.02)
        with lock:
            del running[configuration.name]
        return {"name": configuration.name}

    found = script.share_out(script.TABLE, work, 1, 4, 131.0)
    assert sorted(e["name"] for e in found) == sorted(c.name for c in script.TABLE)
    assert max(map(sum, seen)) <= 131
    assert max(map(len, seen)) > 1
    assert all(sum(memory > 50 for memory in held) <= 1 for held in seen)
    seen.clear()
    board = sys.modules["gpu_lanes"].Board
    monkeypatch.setattr(board, "_fits", lambda *arguments: True)  # the negative control
    script.share_out(script.TABLE, work, 1, 4, 90.0)
    assert max(map(sum, seen)) > 90


def test_a_run_on_the_cpu(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "found.json"
    arguments = ["--device", "cpu", "--only", "tiny-qwen3 page 64", "--output", str(path)]
    assert script.run(arguments) == 0
    (found,) = json.loads(path.read_text())
    assert len(found["held"]) == 8
    assert found["backend"] == "torch"
    assert found["skipped"] == {}
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
    names = capsys.readouterr().out.splitlines()
    assert len(names) == 3 * 3 + 2
    assert script.run(["--list", "--only", "8b", "--backend", "triton"]) == 0
    assert capsys.readouterr().out.splitlines() == names[:3]
    pair = "prefill=fa3,decode=triton"
    assert script.run(["--list", "--backend", "fa3", pair]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 12 + 2
    with pytest.raises(SystemExit, match=f"on {pair} with smollm2 in its name; see --list"):
        script.run(["--backend", pair, "--only", "smollm2"])
    whole = "qwen3-8b page 16 chunk 2048"  # the beginning of others' names
    assert script.run(["--list", "--configuration", whole]) == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [whole]
    assert script.run(["--list", "--configuration", "tiny-qwen3 page 16 chunk 2048 on torch"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1
    with pytest.raises(SystemExit, match="--jobs was 0; wanted 1 or more"):
        script.run(["--jobs", "0"])
    with pytest.raises(SystemExit, match="no configuration qwen3-8b; see --list"):
        script.run(["--configuration", "qwen3-8b"])
    with pytest.raises(SystemExit):
        script.run(["--list", "--backend", "fa4"])
    assert "fa4" in capsys.readouterr().err


def test_a_row_that_was_not_run_is_a_failure(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not run for a reason, or not there at all."""
    done = printed("cache", without="rng")
    monkeypatch.setattr(script, "run_whole", lambda *args, **options: done)
    found = script.prove(script.TRIAL[0], "cpu", 1.0, "commit")
    assert found["failures"] == ["cache: not run; rng: not run"]
    assert found["skipped"] == {}
    assert len(found["held"]) == len(INVARIANCES) - 2


@pytest.mark.parametrize("backend", ["flashinfer", "prefill=fa3,decode=triton"])
def test_a_row_that_the_declaration_excuses_is_none(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    configuration = next(c for c in script.TABLE if c.backend == backend)
    done = printed("score")
    monkeypatch.setattr(script, "run_whole", lambda *args, **options: done)
    found = script.prove(configuration, "cpu", 1.0, "commit")
    assert found["failures"] == []
    assert found["skipped"] == {"score": "no score"}
    assert len(found["held"]) == len(INVARIANCES) - 1
    assert "7 without score" in script.summary([found])
    done = printed("score", "cache")  # of which the declaration says nothing
    found = script.prove(configuration, "cpu", 1.0, "commit")
    assert found["failures"] == ["cache: not run"]
    assert found["skipped"] == {"score": "no score"}


@pytest.mark.parametrize("backend", ["triton", "fa3"])
def test_a_backend_that_promises_all_is_excused_from_nothing(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    configuration = next(c for c in script.TABLE if c.backend == backend)
    done = printed("score")
    monkeypatch.setattr(script, "run_whole", lambda *args, **options: done)
    found = script.prove(configuration, "cpu", 1.0, "commit")
    assert found["failures"] == ["score: not run"]


def test_what_a_declaration_excuses(script: ModuleType) -> None:
    features = {"chunked_prefill": Supported(), "radix_cache": Supported()}

    def excused(**promises: Any) -> set[str]:
        given = {"features": features, "chunk_invariant": True, "decode_equals_prefill": True}
        offered = Capabilities(dtypes={"float32"}, devices={"cpu"}, **(given | promises))
        return script.not_promised(offered)

    assert excused() == set()
    assert excused(decode_equals_prefill=False) == {"score"}
    assert excused(chunk_invariant=False) == {"chunk", "cache"}
    assert excused(features={"radix_cache": Supported()}) == {"chunk"}
    assert excused(features={"chunked_prefill": Supported()}) == {"cache"}
