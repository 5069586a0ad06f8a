"""A step by op: what is launched in an op is its own, and nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from isobit import LLM
from isobit.bench.limits import Limits
from isobit.bench.one_step import measure_step, steps_needed
from isobit.bench.op_profile import op_ranges, read_trace
from isobit.bench.steady import StepKind, max_model_len
from isobit.bench.workload import fixed_length, random_prompts
from isobit.errors import ConfigError, EngineError

LIMITS = Limits(1e10, 1e11, "float32")
OPS = {"norm", "qkv_proj", "rope", "attention", "o_proj", "gate_up_proj", "act", "down_proj"}
OPS |= {"lm_head", "sampling", "other"}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny-qwen3", load_format="random", max_model_len=256) as loaded:
        yield loaded


@pytest.mark.parametrize(
    "kind",
    [StepKind(3, 40, 1, True), StepKind(2, 0, 24, False), StepKind(2, 32, 24, False)],
    ids=["decode", "prefill", "prefill after a context"],
)
def test_the_ops_add_up_to_the_step(llm: LLM, kind: StepKind) -> None:
    report = measure_step(llm.engine, kind, LIMITS, steps=2, seed=0, temperature=0.0).as_dict()
    rows = {row["op"]: row for row in report["ops"]}
    assert rows.keys() == OPS
    layers = llm.engine.runner.decoder.config.num_layers
    for op in ("qkv_proj", "rope", "attention", "o_proj", "gate_up_proj", "act", "down_proj"):
        assert rows[op]["calls"] == layers
    assert rows["norm"]["calls"] == 2 * layers + 1
    assert rows["lm_head"]["calls"] == rows["sampling"]["calls"] == 1
    assert all(row["ms"] > 0 for row in rows.values())
    assert sum(row["ms"] for row in rows.values()) == pytest.approx(report["profiled_step_ms"])
    assert sum(row["share_of_step"] for row in rows.values()) == pytest.approx(1)
    assert report["step_ms"] > 0
    assert report["share_of_limit"] == pytest.approx(report["floor_ms"] / report["step_ms"])
    for figure in ("device_ms", "device_idle_share", "launches"):
        assert report[figure] is None
    assert not llm.engine.has_unfinished()


class Graphs:
    """Stands for captured steps of up to two sequences; none is ever held."""

    asked = 0

    def padding(self, num_seqs: int) -> int | None:
        return 2 - num_seqs if num_seqs <= 2 else None

    def holds(self, batch: Any) -> bool:
        self.asked += 1
        return False


@pytest.mark.parametrize(("batch", "replayed"), [(2, True), (3, False)])
def test_a_step_is_timed_with_graphs_and_taken_apart_without(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, batch: int, replayed: bool
) -> None:
    runner, graphs = llm.engine.runner, Graphs()
    monkeypatch.setattr(runner, "graphs", graphs)
    plan, with_graphs = runner.backend.plan, []

    def watched(batch: Any) -> Any:
        with_graphs.append(runner.graphs is graphs)
        return plan(batch)

    monkeypatch.setattr(runner.backend, "plan", watched)
    kind = StepKind(batch, 40, 1, True)
    report = measure_step(llm.engine, kind, LIMITS, steps=2, seed=0, temperature=0.0)
    assert report.as_dict()["replayed"] == replayed
    assert with_graphs[-4:] == [True, False, False, False]  # the profiler's start takes one
    assert graphs.asked
    assert runner.graphs is graphs


class Pieces:
    """Stands for captured pieces of steps of up to ten tokens; none is ever held."""

    sizes = (10,)
    asked = 0

    def holds(self, batch: Any) -> bool:
        self.asked += 1
        return False


@pytest.mark.parametrize(("tokens", "replayed"), [(5, True), (6, False)])
def test_so_is_a_step_with_a_prefill(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, tokens: int, replayed: bool
) -> None:
    runner, pieces = llm.engine.runner, Pieces()
    monkeypatch.setattr(runner, "pieces", pieces)
    plan, with_pieces = runner.backend.plan, []

    def watched(batch: Any) -> Any:
        with_pieces.append(runner.pieces is pieces)
        return plan(batch)

    monkeypatch.setattr(runner.backend, "plan", watched)
    kind = StepKind(2, 0, tokens, False)
    report = measure_step(llm.engine, kind, LIMITS, steps=2, seed=0, temperature=0.0)
    assert report.as_dict()["replayed"] == replayed
    assert with_pieces[-4:] == [True, False, False, False]
    assert pieces.asked
    assert runner.pieces is pieces


def test_ranges_change_neither_the_bits_nor_the_engine(llm: LLM) -> None:
    def outputs() -> list[Any]:
        prompts = random_prompts(llm.engine.vocab_size, 3, 20, seed=1)
        return [o.outputs for o in llm.generate(prompts, fixed_length(6), use_tqdm=False)]

    before = outputs()
    decoder = llm.engine.runner.decoder
    owners = [llm.engine, llm.engine.runner, llm.engine.runner.backend, decoder, *decoder.layers]
    attributes = [dict(vars(owner)) for owner in owners]
    with op_ranges(llm.engine):
        assert outputs() == before
        assert [dict(vars(owner)) for owner in owners] != attributes
    for owner, kept in zip(owners, attributes, strict=True):
        assert vars(owner).keys() == kept.keys()
        assert all(
            vars(owner)[name] is kept[name]
            for name in kept
            if name not in ("_groups", "_last", "_ready")
        )


def test_a_step_of_another_kind_is_refused(llm: LLM) -> None:
    between_pages = StepKind(2, 33, 24, False)
    with pytest.raises(ConfigError, match=r"33 earlier.*32 earlier and 25 new.*page_size"):
        measure_step(llm.engine, between_pages, LIMITS, steps=1, seed=0, temperature=0.0)
    assert not llm.engine.has_unfinished()


def test_decodes_fit_also_where_prefill_takes_many_steps() -> None:
    kind, budget = StepKind(5, 60, 1, True), 32
    length = max_model_len(kind, steps_needed(1), budget)
    with LLM(
        "tiny-llama",
        load_format="random",
        radix_cache=False,
        max_num_batched_tokens=budget,
        max_model_len=length,
    ) as llm:
        measure_step(llm.engine, kind, LIMITS, steps=1, seed=0, temperature=0.7)


def event(cat: str, name: str, ts: float, dur: float, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": args}


def cuda_trace() -> list[dict[str, Any]]:
    """Two steps of 100 us; kernels run long after the range in which they were launched."""
    events = [event("cpu_op", "aten::mm", 1, 2)]
    for number, begin in enumerate((0, 200)):
        events += [
            event("user_annotation", "isobit:step", begin, 100),
            event("user_annotation", "isobit:launch", begin + 10, 80),
            event("user_annotation", "isobit:qkv_proj", begin + 20, 10),
            event("user_annotation", "isobit:attention", begin + 30, 10),
            event("user_annotation", "isobit:qkv_proj", begin + 40, 10),
            event("user_annotation", "isobit:lm_head", begin + 60, 10),
            event("gpu_user_annotation", "isobit:qkv_proj", begin + 50, 40),
        ]
        for index, (launch, dur) in enumerate(
            [(15, 1), (25, 5), (35, 7), (36, 2), (45, 5), (65, 9), (75, 3), (150, 50)]
        ):
            correlation = 100 * number + index
            runtime = "cuda_driver" if index % 2 else "cuda_runtime"
            kind = "gpu_memcpy" if index == 0 else "kernel"
            events += [
                event(runtime, "launch", begin + launch, 1, correlation=correlation),
                event(kind, "work", begin + launch + 300, dur, correlation=correlation),
            ]
    return events


def test_kernels_belong_to_the_op_that_launched_them() -> None:
    profile = read_trace(cuda_trace(), cuda=True)
    assert profile.steps == 1  # the first pays for the profiler's start
    assert profile.seconds == pytest.approx(100e-6)
    found = {
        op: (round(1e6 * time.seconds, 6), time.calls, time.launches)
        for op, time in profile.ops.items()
    }
    assert found == {
        "qkv_proj": (10, 2, 2),
        "attention": (9, 1, 2),
        "lm_head": (9, 1, 1),
        "sampling": (3, 1, 1),
        "other": (1, 1, 1),
    }


def test_a_trace_without_steps() -> None:
    with pytest.raises(EngineError, match="fewer than two"):
        read_trace(cuda_trace()[:1], cuda=True)


def test_profiling_touches_no_global_generator(llm: LLM) -> None:
    state = torch.get_rng_state()
    measure_step(llm.engine, StepKind(1, 8, 1, True), LIMITS, steps=1, seed=0, temperature=0.8)
    assert torch.equal(torch.get_rng_state(), state)
