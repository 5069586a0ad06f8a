"""``isobit bench`` on the command line: its rows, its tables and its refusals."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from isobit import LLM
from isobit.cli.main import main
from isobit.core.phases import OTHER, PHASES

TINY = ["--model-config", "tiny-llama", "--load-format", "random", "--threads", "1"]


def rows(*args: str) -> list[dict[str, Any]]:
    done = CliRunner().invoke(main, ["bench", *args, *TINY, "--json"])
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("options", [(), ("--no-deterministic-inference", "--temperature", "0.8")])
def test_a_line_of_json_a_workload(options: tuple[str, ...]) -> None:
    found = rows("throughput", "--workloads", "3:20:5,1:40:1", *options)
    for row, (requests, inputs, outputs) in zip(found, [(3, 20, 5), (1, 40, 1)], strict=True):
        assert (row["requests"], row["input_len"], row["output_len"]) == (requests, inputs, outputs)
        assert row["output_tokens"] == requests * outputs
        assert row["output_tokens_per_s"] == pytest.approx(requests * outputs / row["seconds"])
        assert row["total_tokens_per_s"] > row["output_tokens_per_s"] > 0
        first, last = row["time_to_first_token_ms"], row["time_to_first_token_max_ms"]
        assert 0 < first <= last <= 1e3 * row["seconds"]
        assert row["share_of_limit"] == pytest.approx(row["floor_seconds"] / row["seconds"])
        assert row["limit"] in ("copy", "matrix")
        assert row["device"] == "cpu"
        assert row["device_idle_share"] is None
        assert row["deterministic"] is not bool(options)
        assert row["preemptions"] == 0
        assert row["fingerprint"].startswith("ib-")
        assert min(row["copy_gb_per_s"], row["matrix_tflop_per_s"]) > 0
    assert found[0]["inter_token_ms"] > 0
    assert found[1]["inter_token_ms"] is None


def test_both_ways_side_by_side() -> None:
    args = ("throughput", "--workloads", "1:8:4,2:9:3", "--compare", "--warmup", "0")
    found = rows(*args)
    assert [row["deterministic"] for row in found] == [True, True, False, False]
    assert [row["requests"] for row in found] == [1, 2, 1, 2]
    assert len({row["fingerprint"] for row in found}) == 2
    for held, lifted in zip(found[:2], found[2:], strict=True):
        ratio = held["output_tokens_per_s"] / lifted["output_tokens_per_s"]
        assert lifted["of_lifted_tokens_per_s"] == pytest.approx(ratio)
        assert "of_lifted_tokens_per_s" not in held
    plain = CliRunner().invoke(main, ["bench", *args, *TINY])
    assert plain.exit_code == 0, plain.output
    *_, heading, first, second, third, fourth = plain.stdout.splitlines()
    assert heading.startswith("constraints")
    assert heading.endswith("constrained/lifted")
    expected = [["held", "1"], ["lifted", "1"], ["held", "2"], ["lifted", "2"]]
    assert [line.split()[:2] for line in (first, second, third, fourth)] == expected
    assert plain.stderr == ""
    assert "\x1b" not in plain.output


def test_the_first_engine_is_gone_before_the_second_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    original = LLM.__init__
    decoders: list[weakref.ref[Any]] = []
    alive = []

    def init(self: LLM, *args: Any, **options: Any) -> None:
        alive.append(sum(decoder() is not None for decoder in decoders))
        original(self, *args, **options)
        decoders.append(weakref.ref(self.engine.runner.decoder))

    monkeypatch.setattr(LLM, "__init__", init)
    rows("throughput", "--workloads", "1:8:4", "--compare")
    assert alive == [0, 0]


def test_a_step_by_op() -> None:
    (report,) = rows("step", "--batch", "2", "--context", "48", "--steps", "2")
    assert (report["phase"], report["tokens"], report["batch"]) == ("decode", 1, 2)
    assert report["step_ms"] > 0
    total = sum(row["ms"] for row in report["ops"])
    assert total == pytest.approx(report["profiled_step_ms"])
    args = ["bench", "step", *TINY, "--phase", "prefill", "--tokens", "40", "--steps", "1"]
    plain = CliRunner().invoke(main, args)
    assert plain.exit_code == 0, plain.output
    assert "prefill of 1 x 40 tokens after 0" in plain.stdout
    assert "gate_up_proj" in plain.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["bench"], "throughput"),
        (["bench", "speed"], "No such command"),
        (["bench", "throughput", "--workloads", "16"], "requests:input:output"),
        (["bench", "throughput", "--workloads", "1:2:3,"], "requests:input:output"),
        (["bench", "throughput", "--workloads", "0:1:1"], "at least 1"),
        (["bench", "throughput", "--repeat", "0"], "--repeat"),
        (["bench", "throughput", *TINY, "--workloads", "1:5000:1"], "max_model_len"),
        (["bench", "throughput", "--compare", "--no-deterministic-inference"], "--compare"),
        (["bench", "throughput", "--model", "qwen3-30b-a3b"], "mixture of experts"),
        (["bench", "step", "--tokens", "4"], "--phase prefill"),
        (["bench", "step", "--context", "0"], "at least 1"),
        (["bench", "step", *TINY, "--cuda-graph"], "cuda_graph"),
        (["bench", "step", "--phase", "decode", "--tokens", "1"], "one new token a sequence"),
        (["bench", "step", "--phase", "verify"], "--phase"),
        (["bench", "startup", "--threads", "1"], "OMP_NUM_THREADS"),
        (["bench", "startup", "--starts", "0"], "--starts"),
        (["bench", "startup", *TINY[:4], "--page-size", "999"], "Error: page_size was 999"),
    ],
)
def test_usage_errors_exit_2(args: list[str], message: str) -> None:
    done = CliRunner().invoke(main, args)
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.output.split())


def test_a_start_by_phase(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of two has empty caches, whatever the user's own hold; both give one engine."""
    monkeypatch.setenv("ISOBIT_CACHE", str(tmp_path / "own"))
    args = ["bench", "startup", *TINY[:4]]
    done = CliRunner().invoke(main, [*args, "--json"])
    assert done.exit_code == 0, done.output
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert (first["start"], second["start"]) == (1, 2)
    assert first["fingerprint"] == second["fingerprint"]
    for row in (first, second):
        assert set(row["phases"]) == {*PHASES, OTHER}
        assert row["process"] == pytest.approx(row["imports"] + row["engine"])
        assert sum(row["phases"].values()) <= row["engine"]
        without = row["process"] - row["phases"]["weights"]
        assert row["without_weights"] == pytest.approx(without)
    assert not (tmp_path / "own").exists()
    plain = CliRunner().invoke(main, [*args, "--starts", "1", "--own-caches"])
    assert plain.exit_code == 0, plain.output
    heading, row = plain.stdout.splitlines()
    assert heading.split()[:3] == ["start", "process", "imports"]
    assert row.split()[0] == "1"


@pytest.mark.parametrize("verb", ["throughput", "step", "startup", "turns"])
def test_help_has_an_example(verb: str) -> None:
    assert "Example: isobit bench" in CliRunner().invoke(main, ["bench", verb, "--help"]).output
