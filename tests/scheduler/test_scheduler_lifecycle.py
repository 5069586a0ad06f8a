"""A request's way through the scheduler: refused, aborted, preempted, finished."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from isobit.cache.pages import PagePool
from isobit.core.request import Request, RequestStatus
from isobit.core.scheduler import Scheduler, SchedulerConfig, Step
from isobit.errors import ConfigError, EngineError, RequestError
from isobit.sampling.params import SamplingParams
from isobit.sampling.stopping import FinishReason

Make = Callable[..., Any]


@pytest.mark.parametrize(
    ("options", "prompt", "max_tokens", "message"),
    [
        ({}, 0, 8, "the prompt has no tokens"),
        ({"max_model_len": 32}, 32, 1, "the prompt has 32 tokens; .* at most 31 .*Shorten"),
        ({"max_model_len": 32}, 30, 8, "together 38; max_model_len is 32. Lower max_tokens to 2"),
        ({"num_pages": 4}, 10, 8, "take 5 KV pages of 4 tokens; the cache has 4"),
        (
            {"chunked_prefill": False, "max_num_batched_tokens": 16},
            17,
            1,
            "without chunked prefill a step takes at most max_num_batched_tokens = 16",
        ),
    ],
)
def test_what_never_fits_is_refused(
    Simulation: Make, options: dict[str, Any], prompt: int, max_tokens: int, message: str
) -> None:
    simulation = Simulation(**options)
    with pytest.raises(RequestError, match=message):
        simulation.submit([1] * prompt, max_tokens)
    assert not simulation.scheduler.has_unfinished


@pytest.mark.parametrize(
    ("options", "prompt", "max_tokens"),
    [
        ({"max_model_len": 32}, 31, 1),
        ({"num_pages": 4}, 10, 7),  # the last token is sampled, never stored
        ({"chunked_prefill": False, "max_num_batched_tokens": 16}, 16, 40),
    ],
)
def test_what_just_fits_is_served(
    Simulation: Make, options: dict[str, Any], prompt: int, max_tokens: int
) -> None:
    simulation = Simulation(**options)
    simulation.submit([1] * prompt, max_tokens)
    simulation.run()


def test_open_ended_output_must_fit_the_context() -> None:
    config = SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=64, max_model_len=32)
    request = Request("a", [1] * 8, SamplingParams(max_tokens=None))
    Scheduler(config, PagePool(8, 4)).add(request)
    with pytest.raises(RequestError, match="up to 24 output tokens take 8 KV pages"):
        Scheduler(config, PagePool(7, 4)).add(request)


def test_an_id_in_use_is_refused(Simulation: Make) -> None:
    scheduler = Simulation().scheduler
    scheduler.add(Request("a", [1], SamplingParams()))
    with pytest.raises(RequestError, match="'a' is in use"):
        scheduler.add(Request("a", [1], SamplingParams()))
    scheduler.abort("a")
    scheduler.add(Request("a", [1], SamplingParams()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs was 0"),
        ({"alignment": 65}, "chunks end at multiples of 65 tokens. Pass at least 65"),
    ],
)
def test_limits_that_serve_nobody(options: dict[str, int], message: str) -> None:
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "max_model_len": 64}
    with pytest.raises(ConfigError, match=message):
        SchedulerConfig(**(limits | options))
    SchedulerConfig(**(limits | {"alignment": 65}), chunked_prefill=False)


def test_the_youngest_makes_room_and_comes_back_first(Simulation: Make) -> None:
    simulation = Simulation(num_pages=9, page_size=2, radix=False, max_num_seqs=3)
    requests = [simulation.submit_long(4, 8) for _ in range(3)]
    late = simulation.submit_long(1, 1)
    while not simulation.step().preempted:
        pass
    assert requests[0].num_preemptions == requests[1].num_preemptions == 0
    assert requests[2].num_preemptions == 1
    assert requests[2].status is RequestStatus.WAITING
    assert requests[2].page_ids == []
    while requests[2].status is RequestStatus.WAITING:
        simulation.step()
        assert late.status is RequestStatus.WAITING or requests[2].running
    simulation.run()
    assert requests[0].num_preemptions == 0


@pytest.mark.parametrize("equal", [True, False])
def test_outputs_are_recomputed_as_the_backend_allows(
    Simulation: Make, shape: Make, FakeBackend: Make, equal: bool
) -> None:
    simulation = Simulation(FakeBackend(decode_equals_prefill=equal), radix=False)
    request = simulation.submit_long(6)
    for _ in range(4):
        simulation.step()
    simulation.scheduler.preempt(request)
    if equal:
        assert shape(simulation.step()) == [("r0", 0, 10, True)]
    else:
        assert shape(simulation.step()) == [("r0", 0, 6, False)]
        for position in (6, 7, 8):
            step = simulation.step()
            assert shape(step) == [("r0", position, 1, False)]
            assert step.seqs[0].is_decode
        assert shape(simulation.step()) == [("r0", 9, 1, True)]
    simulation.run()


def test_without_chunks_a_long_output_is_decoded_again(Simulation: Make, shape: Make) -> None:
    simulation = Simulation(chunked_prefill=False, max_num_batched_tokens=8, radix=False)
    request = simulation.submit_long(6)
    for _ in range(5):
        simulation.step()
    simulation.scheduler.preempt(request)  # 11 tokens no longer fit one chunk
    assert shape(simulation.step()) == [("r0", 0, 6, False)]
    simulation.run()


def test_preempted_pages_are_found_again(Simulation: Make, shape: Make) -> None:
    simulation = Simulation(page_size=2)
    request = simulation.submit_long(6)
    for _ in range(4):
        simulation.step()
    simulation.scheduler.preempt(request)
    assert shape(simulation.step()) == [("r0", 8, 2, True)]
    assert request.num_cached_tokens == 0  # that of the first admission


def test_an_admission_leaves_a_page_for_each_that_runs(Simulation: Make) -> None:
    simulation = Simulation(num_pages=6, page_size=2, radix=False)
    simulation.submit_long(4, 4)
    second = simulation.submit_long(8, 1)
    simulation.step()
    assert second.status is RequestStatus.WAITING
    simulation.run()
    assert simulation.scheduler.stats.preemptions == 0


def test_abort_in_every_state(Simulation: Make, shape: Make) -> None:
    simulation = Simulation(max_num_seqs=1, radix=False)
    running, waiting, last = (simulation.submit_long(4) for _ in range(3))
    simulation.step()
    scheduler = simulation.scheduler
    assert not scheduler.abort("nobody")
    assert scheduler.abort(waiting.request_id)
    assert (waiting.finish_reason, scheduler.num_waiting) == (FinishReason.ABORT, 1)
    assert scheduler.abort(running.request_id)
    assert not scheduler.abort(running.request_id)
    assert scheduler.pool.num_free == scheduler.pool.num_pages
    assert shape(simulation.step()) == [(last.request_id, 0, 4, True)]


def test_finish_says_why_and_frees(Simulation: Make) -> None:
    simulation = Simulation(radix=False)
    request = simulation.submit_long(4)
    simulation.step()
    simulation.scheduler.finish(request, FinishReason.STOP, 7)
    assert request.finished
    assert (request.finish_reason, request.stop_reason) == (FinishReason.STOP, 7)
    assert not simulation.scheduler.has_unfinished
    with pytest.raises(EngineError, match="finished twice"):
        simulation.scheduler.finish(request, FinishReason.STOP)
    with pytest.raises(EngineError, match="does not run"):
        simulation.scheduler.preempt(request)


def test_steps_alternate_with_completions(Simulation: Make) -> None:
    simulation = Simulation()
    simulation.submit_long(4)
    step = simulation.scheduler.schedule()
    with pytest.raises(EngineError, match="before complete"):
        simulation.scheduler.schedule()
    with pytest.raises(EngineError, match="2 tokens do not fit"):
        simulation.scheduler.complete(step, [1, 2])
    with pytest.raises(EngineError, match="another step than the oldest"):
        simulation.scheduler.complete(Step(), [])


def test_a_token_for_who_no_longer_runs_is_dropped(Simulation: Make) -> None:
    simulation = Simulation()
    preempted, aborted = simulation.submit_long(4), simulation.submit_long(4)

    def meanwhile(_: Step) -> None:
        simulation.scheduler.preempt(preempted)
        simulation.scheduler.abort(aborted.request_id)

    simulation.step(None, meanwhile)
    assert preempted.output_token_ids == aborted.output_token_ids == []
    simulation.run()
