"""Random use of pool, tree and scheduler; and proof that these checks see what breaks them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from isobit.cache.radix import Match, RadixCache, RadixNode
from isobit.cache.reuse import Provenance, ReusePolicy, ReuseScope
from isobit.core.paging import Paging
from isobit.core.request import Request
from isobit.core.scheduler import ScheduledSeq, Scheduler, Step
from isobit.errors import EngineError

NUM_CONTROL_PROGRAMS = 300

PROMISES: tuple[dict[str, Any], ...] = (
    {},
    {"alignment": 4},
    {"alignment": 3, "decode_equals_prefill": False},
    {"decode_equals_prefill": False},
    {"chunk_invariant": False},
    {"chunk_invariant": False, "decode_equals_prefill": False},
)


def run_random_program(Simulation: Any, FakeBackend: Any, rng: Random, **broken: Any) -> Any:
    """A random engine under random use, run to its end; ``broken`` replaces parts of it.

    :raises WrongBitsError, EngineError: what broke.
    """
    page_size = rng.choice((1, 2, 3, 4, 16))
    options: dict[str, Any] = {
        "backend": FakeBackend(**rng.choice(PROMISES)),
        "page_size": page_size,
        "num_pages": -(-rng.choice((26, 40, 80)) // page_size),
        "radix": rng.random() < 0.8,
        "max_num_seqs": rng.choice((1, 2, 3, 6)),
        "max_num_batched_tokens": rng.choice((16, 24, 64)),
        "steps_ahead": rng.choice((0, 1)),
    }
    simulation = Simulation(**(options | broken))
    scheduler = simulation.scheduler
    for _ in range(60):
        kind = rng.random()
        running = scheduler.running
        if kind < 0.3:
            simulation.submit(
                _random_prompt(rng, simulation),
                rng.randint(1, 8),
                rng.choice((None, None, None, 1)),
            )
        elif kind < 0.35 and simulation.requests:
            scheduler.abort(rng.choice(simulation.requests).request_id)
        elif kind < 0.42 and running:
            scheduler.preempt(rng.choice(running))
        elif kind < 0.47 and simulation.cache:
            simulation.cache.evict(rng.randint(1, 5))
        elif kind < 0.49 and simulation.cache:
            simulation.cache.flush()
        elif kind < 0.55:
            simulation.step(None, lambda step: _disturb(rng, scheduler, step))
        else:
            simulation.step(rng.choice((None, None, 1, 3, 7)))
    simulation.run()
    return simulation


def _disturb(rng: Random, scheduler: Scheduler, step: Step) -> None:
    """Abort or preempt some of the requests whose step is on its way."""
    for seq in step.seqs:
        if rng.random() < 0.3:
            scheduler.preempt(seq.request)
        elif rng.random() < 0.1:
            scheduler.abort(seq.request.request_id)


def _random_prompt(rng: Random, simulation: Any) -> list[int]:
    """Often what an earlier request held, cut somewhere, and some more: a shared prefix."""
    prompt: list[int] = []
    if simulation.requests and rng.random() < 0.7:
        earlier = rng.choice(simulation.requests)
        prompt = earlier.token_slice(0, earlier.num_tokens)[: rng.randint(0, 14)]
    limit = min(16 - len(prompt), simulation.max_num_batched_tokens)
    return prompt + [rng.randint(1, 2) for _ in range(rng.randint(1, max(1, limit)))]


@pytest.fixture
def random_program(Simulation: Any, FakeBackend: Any) -> Callable[..., Any]:
    return partial(run_random_program, Simulation, FakeBackend)


@given(rng=st.randoms(use_true_random=False))
@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_every_output_is_the_one_alone(random_program: Callable[..., Any], rng: Random) -> None:
    simulation = random_program(rng)
    if simulation.cache:
        simulation.cache.flush()
    assert simulation.scheduler.pool.num_free == simulation.num_pages
    arrivals = [request.arrival for request in simulation.admitted]
    assert arrivals == sorted(arrivals)  # first admissions: nobody was overtaken


def test_the_programs_reach_what_they_are_for(random_program: Callable[..., Any]) -> None:
    """Hits, hits on decoded pages, evictions and preemptions do happen in them."""
    simulations = [random_program(Random(seed)) for seed in range(150)]
    caches = [simulation.cache.stats for simulation in simulations if simulation.cache]
    assert sum(stats.hits for stats in caches) > 100
    assert sum(stats.decode_tokens_matched for stats in caches) > 10
    assert sum(stats.pages_evicted for stats in caches) > 100
    assert sum(simulation.scheduler.stats.preemptions for simulation in simulations) > 100
    assert any(request.num_preemptions > 2 for s in simulations for request in s.requests)


def test_a_program_runs_the_same_again(random_program: Callable[..., Any]) -> None:
    """Nothing depends on time or on hash seeds: the same calls make the same steps."""
    for seed in range(20):
        first, second = (random_program(Random(seed)) for _ in range(2))
        assert first.scheduler.stats == second.scheduler.stats
        assert [r.request_id for r in first.admitted] == [r.request_id for r in second.admitted]
        assert first.cache is None or first.cache.stats == second.cache.stats


class EvictsLockedLeaves(RadixCache):
    def evict(self, count: int) -> int:
        for node in [node for node in self.nodes() if not node.children][:count]:
            assert node.parent is not None
            del node.parent.children[node.tokens]
            self.pool.free([node.page])
        return count


class SharesPartialPages(RadixCache):
    def match(self, tokens: Sequence[int]) -> Match:
        found = super().match(tokens)
        rest = list(tokens[found.num_tokens :])
        for key, child in found.node.children.items():
            if rest and list(key[: len(rest)]) == rest:
                return Match(child, [*found.pages, child.page], len(tokens), 0)
        return found


class ForgetsProvenance(RadixCache):
    def insert(
        self,
        node: RadixNode,
        tokens: Sequence[int],
        pages: Sequence[int],
        provenance: Iterable[Provenance],
    ) -> tuple[RadixNode, list[int]]:
        return super().insert(node, tokens, pages, [Provenance.PREFILL for _ in provenance])


class KeepsOneTokenOnly(RadixCache):
    """Takes a page by its first token alone."""

    def _page_keys(self, tokens: Sequence[int]) -> Any:
        for key in super()._page_keys(tokens):
            yield (key[0],) * len(key)


class NeverUnlocks(RadixCache):
    def unlock(self, node: RadixNode) -> None:
        pass


class RecomputesByPrefill(Scheduler):
    def _prefill_end(self, request: Request) -> int:
        return request.num_tokens


class IgnoresAlignment(Scheduler):
    def _chunk(self, request: Request, start: int, budget: int) -> int:
        return min(budget, max(1, request.prefill_end - start))


class _MatchesBeyondThePrompt(Paging):
    """Reuses prefilled pages where the request's own run decodes."""

    def match(self, request: Request) -> Match | None:
        if self.cache is None:
            return None
        limit = request.num_tokens - 1
        if request.params.prompt_logprobs is not None:
            limit = min(limit, request.num_scored_tokens)
        return self.cache.match(request.token_slice(0, limit))


class MatchesBeyondThePrompt(Scheduler):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._paging = _MatchesBeyondThePrompt(self.pool, self.cache)


class _SkipsScoring(Paging):
    def match(self, request: Request) -> Match | None:
        if self.cache is None:
            return None
        limit = min(request.num_tokens - 1, request.prefill_end)
        return self.cache.match(request.token_slice(0, limit))


class SkipsScoring(Scheduler):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._paging = _SkipsScoring(self.pool, self.cache)


class LeaksOnPreemption(Scheduler):
    def preempt(self, request: Request) -> None:
        request.page_ids = request.page_ids[:-1]
        super().preempt(request)


ALL = ReusePolicy(ReuseScope.ALL)
WEAK = {"decode_equals_prefill": False}
CUT = {"chunk_invariant": False}


@pytest.mark.parametrize(
    ("backend", "broken", "symptom"),
    [
        ({}, {"cache_class": EvictsLockedLeaves}, "wrong KV"),
        ({}, {"cache_class": SharesPartialPages}, "wrong KV|writes into a shared page"),
        ({}, {"cache_class": KeepsOneTokenOnly}, "wrong KV"),
        (WEAK, {"cache_class": ForgetsProvenance}, "wrong KV"),
        (WEAK, {"scheduler_class": RecomputesByPrefill}, "wrong KV|other tokens"),
        (WEAK, {"scheduler_class": MatchesBeyondThePrompt}, "wrong KV"),
        (WEAK, {"policy": ALL}, "wrong KV"),
        (CUT, {"policy": ALL}, "wrong KV|other tokens"),
        (CUT, {"chunked_prefill": True}, "wrong KV|other tokens"),
        ({"alignment": 3}, {"policy": ALL, "page_size": 4}, "off the alignment|wrong KV"),
        ({"alignment": 3}, {"scheduler_class": IgnoresAlignment}, "off the alignment"),
        ({}, {"scheduler_class": SkipsScoring}, "without logits"),
    ],
)
def test_wrong_bits_are_seen(
    random_program: Callable[..., Any],
    FakeBackend: type,
    wrong_bits: type[Exception],
    backend: dict[str, Any],
    broken: dict[str, Any],
    symptom: str,
) -> None:
    """Negative controls. The accounts are not checked, so only the KV's contents can tell."""
    options = {"radix": True} | broken | {"backend": FakeBackend(**backend), "check_pages": False}

    def programs() -> None:
        for seed in range(NUM_CONTROL_PROGRAMS):
            with suppress(EngineError, KeyError):  # seen by the engine itself, here by accident
                random_program(Random(seed), **options)

    with pytest.raises(wrong_bits, match=symptom):
        programs()


def test_a_token_of_before_a_preemption_is_seen_where_it_is_counted(
    random_program: Callable[..., Any], wrong_bits: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: a step ahead whose request was preempted and runs anew."""
    monkeypatch.setattr(ScheduledSeq, "counts", property(lambda seq: seq.request.running))

    def programs() -> None:
        for seed in range(NUM_CONTROL_PROGRAMS):
            with suppress(EngineError, KeyError):
                random_program(Random(seed), steps_ahead=1, check_pages=False)

    with pytest.raises(wrong_bits):
        programs()


@pytest.mark.parametrize(
    "broken",
    [
        {"cache_class": EvictsLockedLeaves},
        {"cache_class": NeverUnlocks},
        {"scheduler_class": LeaksOnPreemption},
    ],
)
def test_wrong_accounts_are_seen(
    random_program: Callable[..., Any], broken: dict[str, Any]
) -> None:
    """Negative controls: the same programs, checked by ``check_integrity``."""

    def programs() -> None:
        for seed in range(NUM_CONTROL_PROGRAMS):
            random_program(Random(seed), radix=True, **broken)

    with pytest.raises(EngineError):
        programs()
