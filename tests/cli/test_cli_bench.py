"""``isobit bench``: it counts what it should, blames whom it should, and changes nothing."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from isobit import LLM
from isobit.cli.main import main
from isobit.cli.measure import (
    Measurement,
    Workload,
    fixed_length,
    measure,
    percentile,
    random_prompts,
    timed_steps,
)
from isobit.errors import ConfigError, RequestError

TINY = ["--model", "tiny-llama", "--load-format", "random", "--threads", "1"]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny-llama", load_format="random", max_model_len=128) as loaded:
        yield loaded


def test_every_token_is_counted_once(llm: LLM) -> None:
    seen = []
    result = measure(
        llm.engine, Workload(3, 20, 5), warmup=1, repeat=2, on_token=lambda: seen.append(1)
    )
    assert len(result.runs) == 2
    assert len(result.firsts) == 3 * 2
    assert len(result.gaps) == 3 * 4 * 2
    assert len(seen) == 3 * 5 * 3
    assert len(result.steps.total) == len(result.steps.model) == 5 * 2
    assert all(host > 0 for host in result.steps.host)
    assert all(model > 0 for model in result.steps.model)
    assert sum(result.steps.total) <= sum(result.runs)


def test_rates_and_medians() -> None:
    result = Measurement(Workload(2, 10, 3), [4.0, 1.0, 2.0], [0.5] * 6, [0.25, 0.5, 0.75])
    result.steps.total, result.steps.model = [0.5, 0.25, 1.0], [0.25, 0.125, 0.5]
    row = result.row()
    assert row["seconds"] == 2.0
    assert row["output_tokens_per_s"] == 3.0
    assert row["total_tokens_per_s"] == 13.0
    assert row["time_to_first_token_ms"] == 500.0
    assert row["inter_token_ms"] == 500.0
    assert row["inter_token_p99_ms"] == 750.0
    assert row["host_ms_per_step"] == 250.0


def test_percentile_is_a_value_that_occurred() -> None:
    assert percentile(range(1, 101), 99) == 99
    assert percentile(range(1, 1001), 99) == 990
    assert percentile([3.0], 99) == 3.0


def outputs(llm: LLM) -> list[Any]:
    prompts = random_prompts(llm.engine.vocab_size, 3, 20, seed=1)
    return [o.outputs for o in llm.generate(prompts, fixed_length(6), use_tqdm=False)]


def test_timing_changes_neither_the_bits_nor_the_engine(llm: LLM) -> None:
    before = outputs(llm)
    with timed_steps(llm.engine):
        assert outputs(llm) == before
    for owner in (llm.engine, llm.engine.runner, llm.engine.runner.decoder):
        assert not {"step", "forward", "logits"} & vars(owner).keys()


@pytest.mark.parametrize(
    ("owner", "method", "is_host"),
    [("runner", "forward", False), ("runner", "prepare", True), ("scheduler", "schedule", True)],
)
def test_time_is_put_down_to_the_one_who_took_it(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, owner: str, method: str, is_host: bool
) -> None:
    nap = 0.02
    target = getattr(llm.engine, owner)
    original = getattr(target, method)

    def slow(*args: Any) -> Any:
        time.sleep(nap)
        return original(*args)

    monkeypatch.setattr(target, method, slow)
    result = measure(llm.engine, Workload(1, 4, 3))
    assert all((host >= nap) == is_host for host in result.steps.host)
    assert all((model >= nap) != is_host for model in result.steps.model)


def test_no_global_generator_is_touched(llm: LLM) -> None:
    states = (random.getstate(), torch.get_rng_state())
    measure(llm.engine, Workload(2, 4, 2))
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert random_prompts(50, 2, 9, seed=4) == random_prompts(50, 2, 9, seed=4)
    assert random_prompts(50, 2, 9, seed=4) != random_prompts(50, 2, 9, seed=5)


def test_a_workload_that_does_not_fit_leaves_the_engine_clean(llm: LLM) -> None:
    with pytest.raises(RequestError, match="max_model_len"):
        measure(llm.engine, Workload(2, 100, 100))
    assert not llm.engine.has_unfinished()


@pytest.mark.parametrize("text", ["", "1:2", "1:2:3:4", "0:1:1", "1:-2:3", "a:b:c", "1:2:²"])
def test_workloads_that_mean_nothing(text: str) -> None:
    with pytest.raises(ConfigError, match="workload"):
        Workload.parse(text)


def test_throughput_prints_a_row_a_workload() -> None:
    args = ["bench", "throughput", *TINY, "--workloads", "1:8:4,2:9:3", "--warmup", "0"]
    plain = CliRunner().invoke(main, args)
    assert plain.exit_code == 0, plain.output
    about, heading, first, second = plain.stdout.splitlines()
    assert about.startswith("tiny-llama, 1 threads, ib-")
    assert heading.startswith("requests")
    assert first.split()[:3] == ["1", "8", "4"]
    assert second.split()[:3] == ["2", "9", "3"]
    assert plain.stderr == ""
    assert "\x1b" not in plain.output


def test_latency_as_json() -> None:
    args = ["bench", "latency", *TINY, "--input-len", "8", "--output-len", "1", "--json"]
    done = CliRunner().invoke(main, args)
    assert done.exit_code == 0, done.output
    row = json.loads(done.stdout)
    assert (row["requests"], row["runs"], row["steps"]) == (1, 5, 1)
    assert row["inter_token_ms"] is None
    assert row["fingerprint"].startswith("ib-")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["bench"], "throughput"),
        (["bench", "speed"], "No such command"),
        (["bench", "throughput", "--workloads", "16"], "requests:input:output"),
        (["bench", "throughput", "--workloads", "1:2:3", "--input-len", "4"], "--input-len"),
        (["bench", "throughput", "--num-prompts", "0"], "at least 1"),
        (["bench", "latency", "--repeat", "0"], "--repeat"),
        (["bench", "latency", *TINY, "--input-len", "5000"], "max_model_len"),
    ],
)
def test_usage_errors_exit_2(args: list[str], message: str) -> None:
    done = CliRunner().invoke(main, args)
    assert done.exit_code == 2, done.output
    assert message in done.output


@pytest.mark.parametrize("verb", ["throughput", "latency"])
def test_help_has_an_example(verb: str) -> None:
    assert "Example: isobit bench" in CliRunner().invoke(main, ["bench", verb, "--help"]).output
