"""What the host does for a step does not grow with what waits: counted in instructions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from isobit import LLM, SamplingParams

pytestmark = pytest.mark.usefixtures("one_thread")


def instructions(function: Callable[[], object]) -> int:
    """How many of this package's bytecode instructions run: loops count, clocks do not."""
    count = 0

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal count
        if not frame.f_globals.get("__name__", "").startswith("isobit."):
            return None
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


PARAMS = SamplingParams(max_tokens=10, ignore_eos=True, logprobs=2, prompt_logprobs=0)


def step_costs(llm: LLM, waiting: int) -> list[int]:
    """Of a step, of an abort amid the queue, of a preemption, and of the step after it."""
    engine = llm.engine
    engine.flush_cache()
    for index in range(4):
        engine.add_request(f"runs{index}", [3, 4, index], PARAMS)
    engine.step()
    for index in range(waiting):
        engine.add_request(f"waits{index}", [3, 4], PARAMS)
    costs = [
        instructions(engine.step),
        instructions(lambda: engine.abort(f"waits{waiting // 2}")),
        instructions(lambda: engine.preempt("runs3")),
        instructions(engine.step),
    ]
    for request_id in engine.unfinished_ids():
        engine.abort(request_id)
    return costs


def test_a_step_costs_the_same_however_many_wait(
    small_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(str(small_folder), max_model_len=64, max_num_seqs=4) as llm:
        step_costs(llm, 10)  # what is only done once
        assert step_costs(llm, 10) == step_costs(llm, 3_000)
        scheduler, schedule = llm.engine.scheduler, llm.engine.scheduler.schedule

        def searches(budget: int | None) -> Any:
            exec("sum(1 for _ in waiting)", {"__name__": "isobit.x", "waiting": scheduler._waiting})
            return schedule(budget)

        monkeypatch.setattr(scheduler, "schedule", searches)
        assert step_costs(llm, 10)[0] < step_costs(llm, 3_000)[0]  # the measure can tell


def test_generate_costs_as_much_for_each_prompt(small_folder: Path) -> None:
    """Queueing, stepping and handing out: nothing is done to all requests for each of them."""
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    with LLM(str(small_folder), max_model_len=64, max_num_seqs=4, radix_cache=False) as llm:

        def cost(count: int) -> int:
            prompts = [[3 + index % 50, 4] for index in range(count)]
            return instructions(lambda: llm.generate(prompts, params, use_tqdm=False))

        cost(8)
        few, many = cost(40), cost(400)
    assert many < 10 * few * 1.02
