"""Timing an engine: it counts what it should, blames whom it should, and changes nothing."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from isobit import LLM
from isobit.bench.limits import Limits
from isobit.bench.measure import Measurement, measure, percentile, warm_up
from isobit.bench.step_times import timed_steps
from isobit.bench.workload import Workload, fixed_length, random_prompts
from isobit.errors import ConfigError, RequestError
from isobit.kernels.threads import one_thread


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
    assert len(seen) == result.tokens == 3 * 5 * 2
    assert len(result.steps.total) == len(result.steps.away) == 5 * 2
    assert all(host > 0 for host in result.steps.host)
    assert all(model > 0 for model in result.steps.away)
    assert sum(result.steps.total) <= sum(result.runs)


def test_rates_and_medians() -> None:
    result = Measurement(
        Workload(2, 10, 3), [4.0, 1.0, 2.0], [0.5] * 5 + [1.0], [0.25, 0.5, 0.75], 18
    )
    result.steps.total, result.steps.away = [0.5, 0.25, 1.0], [0.25, 0.125, 0.5]
    row = result.row()
    assert row["seconds"] == 2.0
    assert row["output_tokens_per_s"] == 3.0
    assert row["total_tokens_per_s"] == 13.0
    assert row["output_tokens"] == 6
    assert row["time_to_first_token_ms"] == 500.0
    assert row["time_to_first_token_max_ms"] == 1000.0
    assert row["inter_token_ms"] == 500.0
    assert row["inter_token_p99_ms"] == 750.0
    assert row["host_ms_per_step"] == 250.0
    assert row["device_idle_share"] is None
    result.steps.device = [3.0, 0.5, 1.75]
    assert result.row()["device_idle_share"] == 0.25


def test_the_share_is_that_of_the_least_time(llm: LLM) -> None:
    result = measure(llm.engine, Workload(2, 16, 4), repeat=2)
    slow, fast = (result.against(llm.engine, Limits(rate, 1e15, "float32")) for rate in (1e6, 1e9))
    assert slow["limit"] == "copy"
    assert slow["share_of_limit"] == pytest.approx(1000 * fast["share_of_limit"])
    assert fast["share_of_limit"] == pytest.approx(2 * fast["floor_seconds"] / sum(result.runs))


def test_a_warm_up_meets_the_batch_sizes_and_not_the_length(llm: LLM) -> None:
    with timed_steps(llm.engine) as steps:
        warm_up(llm.engine, Workload(20, 16, 100), seed=0, temperature=0.0)
    decodes = {len(shape.seqs) for shape in steps.shapes if shape.tokens == len(shape.seqs)}
    assert decodes >= {20, 10, 5, 2, 1}
    assert len(steps.shapes) < 20
    assert not llm.engine.has_unfinished()


def test_prompts_share_no_prefix(llm: LLM) -> None:
    prompts = random_prompts(50, 40, 3, seed=0)
    assert len({prompt[0] for prompt in prompts}) == 40
    assert len(random_prompts(5, 40, 1, seed=0)) == 40
    before = llm.stats().cache_tokens
    measure(llm.engine, Workload(6, 40, 3), warmup=1, repeat=2)
    assert llm.stats().cache_tokens == before


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
        assert not {"step", "launch", "read", "forward", "logits"} & vars(owner).keys()


@pytest.mark.parametrize(
    ("owner", "method", "is_host"),
    [("runner", "forward", False), ("runner", "prepare", True), ("scheduler", "schedule", True)],
)
def test_time_is_put_down_to_the_one_who_took_it(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, owner: str, method: str, is_host: bool
) -> None:
    nap = 0.15  # well above what a loaded machine adds to a step of one thread
    target = getattr(llm.engine, owner)
    original = getattr(target, method)

    def slow(*args: Any) -> Any:
        time.sleep(nap)
        return original(*args)

    monkeypatch.setattr(target, method, slow)
    with one_thread():
        result = measure(llm.engine, Workload(1, 4, 3))
    assert all((host >= nap) == is_host for host in result.steps.host)
    assert all((model >= nap) != is_host for model in result.steps.away)


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
    with pytest.raises(ConfigError, match=r"workload.*16:128:64"):
        Workload.parse(text)
