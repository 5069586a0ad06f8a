"""What requests find in the prefix cache, and what they leave there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Make = Callable[..., Any]


def test_a_shared_prompt_is_computed_once(Simulation: Make, shape: Make) -> None:
    simulation = Simulation(page_size=4)
    first = simulation.submit_long(10)
    simulation.step()
    second = simulation.submit(list(first.prompt_token_ids))
    assert shape(simulation.step())[-1] == ("r1", 8, 2, True)
    assert second.num_cached_tokens == 8
    assert second.page_ids[:2] == first.page_ids[:2]


def test_a_whole_prompt_in_the_cache_leaves_one_page_to_compute(
    Simulation: Make, shape: Make
) -> None:
    simulation = Simulation(page_size=4)
    first = simulation.submit_long(8)
    simulation.step()
    simulation.submit(list(first.prompt_token_ids))
    assert shape(simulation.step())[-1] == ("r1", 4, 4, True)


@pytest.mark.parametrize(("equal", "cached"), [(True, 16), (False, 8)])
def test_the_next_turn_finds_what_decoding_wrote(
    Simulation: Make, FakeBackend: Make, equal: bool, cached: int
) -> None:
    simulation = Simulation(FakeBackend(decode_equals_prefill=equal), page_size=4)
    first = simulation.submit_long(8)
    simulation.run()
    turn = simulation.submit(first.prompt_token_ids + first.output_token_ids + [1, 2, 1])
    simulation.run()
    assert turn.num_cached_tokens == cached
    again = simulation.submit(list(turn.prompt_token_ids))
    simulation.run()
    assert again.num_cached_tokens == 20  # by now a prefill wrote all of it


def test_equal_prompts_at_the_same_time_end_up_sharing(Simulation: Make) -> None:
    simulation = Simulation(page_size=4)
    first = simulation.submit_long(10)
    second = simulation.submit(list(first.prompt_token_ids))
    simulation.step()
    assert first.page_ids[:2] == second.page_ids[:2]
    assert first.page_ids[2] != second.page_ids[2]
    simulation.run()


def test_a_prompt_to_be_scored_is_computed_whole_once(Simulation: Make, shape: Make) -> None:
    simulation = Simulation(page_size=4)
    first = simulation.submit_long(10)
    simulation.run()
    scored = simulation.submit(list(first.prompt_token_ids), 8, prompt_logprobs=1)
    assert shape(simulation.step(6)) == [("r1", 0, 6, False)]
    simulation.scheduler.preempt(scored)
    assert shape(simulation.step()) == [("r1", 4, 6, True)]  # scored up to 6, matched up to 4
    simulation.scheduler.preempt(scored)
    assert shape(simulation.step()) == [("r1", 8, 3, True)]
    simulation.run()


def test_cached_pages_give_way_before_requests_do(Simulation: Make) -> None:
    simulation = Simulation(num_pages=6, page_size=2)
    for _ in range(4):
        simulation.submit_long(4, 5)
        simulation.run()
    assert simulation.cache.stats.pages_evicted > 0
    assert simulation.scheduler.stats.preemptions == 0
