"""What a step computes: budgets, chunks, seats, order; and what each step costs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from isobit.core.request import Request
from isobit.errors import ConfigError
from isobit.sampling.params import SamplingParams

Make = Callable[..., Any]


def test_decodes_come_first_and_prefills_fill_the_budget(Simulation: Make, shape: Make) -> None:
    simulation = Simulation(max_num_batched_tokens=8, radix=False)
    simulation.submit_long(3)
    assert shape(simulation.step()) == [("r0", 0, 3, True)]
    simulation.submit_long(20)
    assert shape(simulation.step()) == [("r0", 3, 1, True), ("r1", 0, 7, False)]
    assert shape(simulation.step()) == [("r0", 4, 1, True), ("r1", 7, 7, False)]
    assert shape(simulation.step()) == [("r0", 5, 1, True), ("r1", 14, 6, True)]
    assert shape(simulation.step()) == [("r0", 6, 1, True), ("r1", 20, 1, True)]


def test_a_step_budget_overrides_the_limit(Simulation: Make, shape: Make) -> None:
    simulation = Simulation(max_num_batched_tokens=8, radix=False)
    simulation.submit_long(20)
    assert shape(simulation.step(3)) == [("r0", 0, 3, False)]
    assert shape(simulation.step(12)) == [("r0", 3, 12, False)]
    with pytest.raises(ConfigError, match="token_budget was 0"):
        simulation.step(0)
    simulation.run()


def test_cuts_fall_on_the_alignment(Simulation: Make, shape: Make, FakeBackend: Make) -> None:
    simulation = Simulation(FakeBackend(alignment=4), max_num_batched_tokens=10, radix=False)
    simulation.submit_long(3)
    simulation.submit_long(17)
    assert shape(simulation.step()) == [("r0", 0, 3, True), ("r1", 0, 4, False)]
    assert shape(simulation.step()) == [("r0", 3, 1, True), ("r1", 4, 8, False)]
    assert shape(simulation.step(4)) == [("r0", 4, 1, True)]  # 3 tokens reach no boundary
    assert shape(simulation.step()) == [("r0", 5, 1, True), ("r1", 12, 5, True)]


def test_an_older_prefill_leaves_younger_decodes_their_tokens(
    Simulation: Make, shape: Make
) -> None:
    simulation = Simulation(max_num_batched_tokens=12, radix=False)
    first = simulation.submit_long(8)
    simulation.submit_long(2)
    simulation.step()
    simulation.scheduler.preempt(first)
    assert shape(simulation.step(4)) == [("r1", 2, 1, True), ("r0", 0, 3, False)]
    assert shape(simulation.step(4)) == [("r1", 3, 1, True), ("r0", 3, 3, False)]
    simulation.run()


def test_a_tight_budget_serves_the_oldest_decodes(Simulation: Make, shape: Make) -> None:
    simulation = Simulation(radix=False)
    for _ in range(3):
        simulation.submit_long(2)
    simulation.step()
    assert shape(simulation.step(2)) == [("r0", 2, 1, True), ("r1", 2, 1, True)]
    assert shape(simulation.step(1)) == [("r0", 3, 1, True)]
    simulation.run()


def test_a_cut_prefill_holds_newcomers_back(
    Simulation: Make, shape: Make, FakeBackend: Make
) -> None:
    """Or a stream of short requests could eat the budget that its next chunk needs."""
    simulation = Simulation(FakeBackend(alignment=8), max_num_batched_tokens=12, radix=False)
    simulation.submit_long(28)
    simulation.submit_long(2)
    assert shape(simulation.step()) == [("r0", 0, 8, False)]  # 4 tokens of budget stay unused,
    assert shape(simulation.step()) == [("r0", 8, 8, False)]  # where r1 would fit
    assert shape(simulation.step()) == [("r0", 16, 12, True)]
    assert shape(simulation.step())[-1] == ("r1", 0, 2, True)


def test_without_chunks_a_prompt_waits_for_room(Simulation: Make, shape: Make) -> None:
    simulation = Simulation(chunked_prefill=False, max_num_batched_tokens=10, radix=False)
    simulation.submit_long(6)
    simulation.submit_long(5)
    simulation.submit_long(2)
    assert shape(simulation.step()) == [("r0", 0, 6, True)]  # r2 would fit, but is behind r1
    step = shape(simulation.step())
    assert step == [("r0", 6, 1, True), ("r1", 0, 5, True), ("r2", 0, 2, True)]


def test_seats_are_limited(Simulation: Make) -> None:
    simulation = Simulation(max_num_seqs=2)
    for _ in range(3):
        simulation.submit_long(2)
    simulation.step()
    assert (simulation.scheduler.num_running, simulation.scheduler.num_waiting) == (2, 1)


def calls_of(function: Callable[[], object]) -> int:
    """How many calls ``function`` makes, Python's and C's: a measure that needs no clock."""
    count = 0

    def profile(frame: FrameType, event: str, arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def test_a_step_costs_the_same_however_many_wait(Simulation: Make) -> None:
    costs = []
    for waiting in (10, 5_000):
        simulation = Simulation(max_num_seqs=4, check_pages=False)
        for _ in range(4):
            simulation.submit_long(6)
        simulation.step()
        for index in range(waiting):
            simulation.scheduler.add(Request(f"w{index}", [1, 2], SamplingParams()))
        scheduler = simulation.scheduler
        last = f"w{waiting - 1}"
        costs.append(
            (
                calls_of(simulation.step),
                calls_of(lambda scheduler=scheduler, last=last: scheduler.abort(last)),
                calls_of(lambda scheduler=scheduler: scheduler.preempt(scheduler.running[-1])),
                calls_of(simulation.step),
            )
        )
    assert costs[0] == costs[1]
