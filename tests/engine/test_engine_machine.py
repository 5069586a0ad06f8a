"""The whole engine under random use: whatever happens, every output is the one of a run alone.

A state machine submits, aborts, preempts, evicts, flushes and steps a real engine with a small
model, tiny pages and a pool that is always short. Each finished request, with all its logprobs, is
compared bit for bit with the same request alone on an emptied engine. Unwritten KV is NaN, so that
whoever reads it shows.

``pytest --long`` runs ten times as many programs. Each broken engine at the end of the file must
be found by the same machine within the programs of a plain run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from isobit import LLM, SamplingParams
from isobit.backends.base import Batch
from isobit.cache.radix import Match, RadixCache
from isobit.core.engine import Engine, group_id
from isobit.core.outputs import RequestOutput, StreamChunk
from isobit.core.request import Request
from isobit.core.runner import SeqResult
from isobit.core.scheduler import ScheduledSeq, Step
from isobit.errors import EngineError
from isobit.kernels.kernel_set import Linear
from isobit.sampling.sampler import SamplingRow
from isobit.verify.transcript import Transcript, transcripts

NUM_PROGRAMS = 30
STEPS_OF_A_PROGRAM = 50
MAX_MODEL_LEN = 48
BYTES_PER_TOKEN = 2 * 2 * 16 * 4  # K and V, 2 layers, 1 head of 16, fp32

Break = Callable[[Engine], None]
"""Damages an engine that has just been made."""

token_ids = st.integers(3, 6)  # few, so that prompts share prefixes and outputs meet prompts
sampling_params = st.builds(
    SamplingParams,
    n=st.sampled_from((1, 1, 1, 2, 3)),
    temperature=st.sampled_from((0.0, 0.0, 0.8, 1.0, 1.7)),
    top_p=st.sampled_from((1.0, 0.9, 0.4)),
    top_k=st.sampled_from((-1, 1, 7)),
    min_p=st.sampled_from((0.0, 0.05)),
    seed=st.sampled_from((None, 0, 1, -7)),
    max_tokens=st.sampled_from((1, 8, 24, 32)),
    min_tokens=st.sampled_from((0, 1)),
    stop_token_ids=st.sampled_from(((), (9,), (4, 30))),
    ignore_eos=st.booleans(),
    logprobs=st.sampled_from((None, 0, 2)),
    prompt_logprobs=st.sampled_from((None, None, None, 0, 3)),
    presence_penalty=st.sampled_from((0.0, 0.5)),
    frequency_penalty=st.sampled_from((0.0, -0.3)),
    repetition_penalty=st.sampled_from((1.0, 1.2)),
    logit_bias=st.sampled_from((None, {3: 4.0, 5: -100.0}, {4: 1.5})),
)
submissions = st.tuples(
    st.integers(0, 10**6),  # which earlier text to begin with
    st.integers(0, 40),  # how much of it
    st.lists(token_ids, min_size=1, max_size=12),
    sampling_params,
)


def start(folder: Path, broken: Break | None, **options: Any) -> LLM:
    """An engine of the small model whose unwritten KV is NaN."""
    llm = LLM(str(folder), max_model_len=MAX_MODEL_LEN, **options)
    for layer in llm.engine.runner.layers:
        layer.k.fill_(torch.nan)
        layer.v.fill_(torch.nan)
    if broken is not None:
        broken(llm.engine)
    return llm


DISTURBANCES = ("preempt", "preempt", "preempt", "evict", "evict", "abort", "abort", "flush")


class Alone:
    """What each request gives by itself on an engine, broken or not, with an empty cache."""

    def __init__(self, folder: Path, broken: Break | None = None) -> None:
        self.folder = folder
        self.broken = broken
        self._llm = start(folder, broken)
        self._known: dict[tuple[tuple[int, ...], SamplingParams], list[Transcript]] = {}

    def __call__(self, prompt: tuple[int, ...], params: SamplingParams) -> list[Transcript]:
        if (prompt, params) not in self._known:
            self._llm.engine.flush_cache()
            (output,) = self._llm.generate([list(prompt)], params, use_tqdm=False)
            self._known[prompt, params] = transcripts(output)
        return self._known[prompt, params]


class EngineMachine(RuleBasedStateMachine):
    """One program. ``counts`` says what the programs reached, over all of them."""

    def __init__(self, alone: Alone, counts: Counter[str], check_pages: bool = True) -> None:
        super().__init__()
        self.alone = alone
        self.counts = counts
        self.check_pages = check_pages
        self.llm: LLM | None = None
        self.submitted: dict[str, tuple[tuple[int, ...], SamplingParams]] = {}
        self.streamed: dict[tuple[str, int], list[int]] = {}
        self.texts: list[tuple[int, ...]] = []
        self.failed = False

    @property
    def engine(self) -> Engine:
        assert self.llm is not None
        return self.llm.engine

    @initialize(
        page_size=st.sampled_from((1, 2, 3, 4, 8)),
        requests=st.sampled_from((1.0, 1.3, 2.0)),
        options=st.fixed_dictionaries(
            {
                "max_num_seqs": st.sampled_from((8, 8, 3, 1)),
                "max_num_batched_tokens": st.sampled_from((64, 16, 5)),
                "radix_cache": st.sampled_from((True, True, True, False)),
            }
        ),
    )
    def start(self, page_size: int, requests: float, options: dict[str, Any]) -> None:
        """The pool holds this many requests of full length."""
        pages = -(-int(requests * MAX_MODEL_LEN) // page_size)
        self.llm = start(
            self.alone.folder,
            self.alone.broken,
            page_size=page_size,
            kv_cache_memory=pages * page_size * BYTES_PER_TOKEN,
            **options,
        )
        assert self.engine.scheduler.pool.num_pages == pages

    @rule(several=st.lists(submissions, min_size=1, max_size=6))
    def submit(self, several: list[tuple[int, int, list[int], SamplingParams]]) -> None:
        """New prompts, or such that begin as an earlier one, with or without its output."""
        for earlier, cut, tail, params in several:
            prompt = tuple(tail)
            if self.texts:
                prompt = (*self.texts[earlier % len(self.texts)][:cut], *tail)
            prompt = prompt[: MAX_MODEL_LEN - (params.max_tokens or 1)]
            request_id = f"r{len(self.submitted)}"
            self.engine.add_request(request_id, prompt, params)
            self.submitted[request_id] = prompt, params
            self.texts.append(prompt)
            self.counts["requests"] += 1

    @rule(budget=st.sampled_from((None, None, 1, 2, 3, 7, 20)), times=st.sampled_from((1, 1, 2, 5)))
    def step(self, budget: int | None, times: int) -> None:
        for _ in range(times):
            self._step(budget)

    @rule(kind=st.sampled_from(DISTURBANCES), which=st.integers(0, 40))
    def disturb(self, kind: str, which: int) -> None:
        """One rule for all, as hypothesis leaves whole rules out of many programs."""
        scheduler, unfinished = self.engine.scheduler, self.engine.unfinished_ids()
        if kind == "abort" and unfinished:
            assert self.engine.abort(unfinished[which % len(unfinished)])
            self.counts["aborts"] += 1
        elif kind == "preempt" and scheduler.running:
            running = scheduler.running[which % len(scheduler.running)]
            self.counts["forced preemptions"] += self.engine.preempt(group_id(running))
        elif kind == "evict" and scheduler.cache is not None:
            self.counts["forced evictions"] += scheduler.cache.evict(1 + which)
        elif kind == "flush":
            self.counts["flushes"] += self.engine.flush_cache() > 0

    def teardown(self) -> None:
        """Run to the end; afterwards every page must be free again."""
        if self.llm is None or self.failed:
            return
        for _ in range(20_000):
            if not self.engine.has_unfinished():
                break
            self._step(None)
        assert not self.engine.has_unfinished(), "the engine makes no progress"
        scheduler = self.engine.scheduler
        self.counts["preemptions"] += scheduler.stats.preemptions
        if scheduler.cache is not None:
            self.counts["pages evicted"] += scheduler.cache.stats.pages_evicted
            self.counts["hits"] += scheduler.cache.stats.hits
            self.counts["decoded tokens reused"] += scheduler.cache.stats.decode_tokens_matched
            self.engine.flush_cache()
        if self.check_pages:
            assert scheduler.pool.num_free == scheduler.pool.num_pages

    def _step(self, budget: int | None) -> None:
        self.failed = True  # until the step is over and found right
        self.counts["steps"] += 1
        for chunk in self.engine.step(budget):
            self._receive(chunk)
        if self.check_pages:
            self.engine.scheduler.check_integrity()
        self.failed = False

    def _receive(self, chunk: StreamChunk) -> None:
        tokens = self.streamed.setdefault((chunk.request_id, chunk.index), [])
        tokens += chunk.token_ids
        if chunk.output is not None:
            self._compare(chunk.output)

    def _compare(self, output: RequestOutput) -> None:
        prompt, params = self.submitted[output.request_id]
        expected = self.alone(prompt, params)
        assert len(output.outputs) == params.n
        for got, want, choice in zip(transcripts(output), expected, output.outputs, strict=True):
            difference = got.first_difference(want)
            assert difference is None, f"other bits than alone, from token {difference} on"
            assert self.streamed[output.request_id, choice.index] == list(choice.token_ids)
            self.texts.append((*prompt, *choice.token_ids))
            self.counts["outputs"] += 1


def run_programs(
    alone: Alone, count: int, *, shrink: bool = True, check_pages: bool = True
) -> Counter[str]:
    """Run ``count`` random programs; without ``shrink`` always the same ones.

    :raises AssertionError, EngineError: what broke, with the program that shows it.
    """
    counts: Counter[str] = Counter()
    phases = {} if shrink else {"phases": [Phase.generate], "database": None}
    run_state_machine_as_test(
        lambda: EngineMachine(alone, counts, check_pages),
        settings=settings(
            max_examples=count,
            stateful_step_count=STEPS_OF_A_PROGRAM,
            deadline=None,
            derandomize=not shrink,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
            **phases,
        ),
    )
    return counts


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model only loses by threads; their number changes no bit (see ``verify``)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_output_is_the_one_alone(small_folder: Path, request: pytest.FixtureRequest) -> None:
    count = NUM_PROGRAMS * (10 if request.config.getoption("--long") else 1)
    run_programs(Alone(small_folder), count)


def test_the_programs_reach_what_they_are_for(small_folder: Path) -> None:
    counts = run_programs(Alone(small_folder), NUM_PROGRAMS // 2, shrink=False)
    wanted = {
        "steps": 2_000,
        "outputs": 150,
        "preemptions": 40,
        "forced preemptions": 4,
        "forced evictions": 1,
        "pages evicted": 300,
        "hits": 60,
        "decoded tokens reused": 60,
        "aborts": 2,
    }
    assert {name: counts[name] for name in wanted if counts[name] < wanted[name]} == {}, counts


# Negative controls. The page accounts are not checked in these, so that bits alone can tell, and
# "alone" is computed by an engine broken in the same way: only its inconsistency is to be found.


class _EvictsLockedPages(RadixCache):
    def evict(self, count: int) -> int:
        for node in [node for node in self.nodes() if not node.children][:count]:
            if node in self._evictable:
                super().evict(1)
                continue
            assert node.parent is not None
            del node.parent.children[node.tokens]
            self.pool.free([node.page])
        return count


class _MatchesOnePageTooLong(RadixCache):
    def match(self, tokens: Sequence[int]) -> Match:
        found = super().match(tokens)
        left = len(tokens) - found.num_tokens
        for child in found.node.children.values():
            if left >= self.page_size:
                pages = [*found.pages, child.page]
                return Match(child, pages, found.num_tokens + self.page_size, 0)
        return found


def frees_pages_in_use(engine: Engine) -> None:
    """Eviction does not ask for locks."""
    if engine.scheduler.cache is not None:
        engine.scheduler.cache.__class__ = _EvictsLockedPages


def matches_one_page_too_long(engine: Engine) -> None:
    """The page after the matched prefix is taken too, whatever it holds."""
    if engine.scheduler.cache is not None:
        engine.scheduler.cache.__class__ = _MatchesOnePageTooLong


def writes_one_slot_off(engine: Engine) -> None:
    """K and V of one page's last row go into the slot before."""
    size = engine.scheduler.pool.page_size
    prepare = engine.runner.prepare

    def off(seqs: Sequence[ScheduledSeq]) -> Batch:
        batch = prepare(seqs)
        batch.slot_mapping[batch.slot_mapping == 4 * size - 1] -= 1
        return batch

    engine.runner.prepare = off


def forgets_the_last_token_of_the_preempted(engine: Engine) -> None:
    """Whoever comes back has the K and V of its last token not written."""
    prepare = engine.runner.prepare

    def forgets(seqs: Sequence[ScheduledSeq]) -> Batch:
        batch = prepare(seqs)
        for seq, stop in zip(seqs, batch.cu_seqlens_q.tolist()[1:], strict=True):
            if seq.request.num_preemptions and seq.samples and seq.num_tokens > 1:
                batch.slot_mapping[stop - 1] = batch.slot_mapping[stop - 2]
        return batch

    engine.runner.prepare = forgets


def counts_positions_from_the_chunk(engine: Engine) -> None:
    """The noise of a sampled token is that of its place in the chunk."""
    row = engine.runner._sampling_row

    def counts(seq: ScheduledSeq) -> SamplingRow:
        return replace(row(seq), position=seq.num_tokens)

    engine.runner._sampling_row = counts


def penalises_by_a_neighbour(engine: Engine) -> None:
    """Penalties look at the output of the first running request."""
    row = engine.runner._sampling_row

    def penalises(seq: ScheduledSeq) -> SamplingRow:
        first = engine.scheduler.running[0]
        return replace(row(seq), output_token_ids=first.output_token_ids)

    engine.runner._sampling_row = penalises


def sums_by_the_batch(engine: Engine) -> None:
    """A linear that splits K where the batch is small."""
    layer = engine.runner.decoder.layers[0]
    layer.down_proj = _BatchVariantLinear(layer.down_proj)


class _BatchVariantLinear:
    def __init__(self, linear: Linear) -> None:
        self._linear = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def __call__(self, x: Tensor) -> Tensor:
        return self.accumulators(x)

    def accumulators(self, x: Tensor) -> Tensor:
        if len(x) > 3:
            return self._linear.accumulators(x)
        low, high = x.clone(), x.clone()
        low[:, self.in_features // 2 :] = 0
        high[:, : self.in_features // 2] = 0
        return self._linear.accumulators(low) + self._linear.accumulators(high)


def reverses_the_scores_of_a_chunk(engine: Engine) -> None:
    """Prompt logprobs of a chunk come back last first."""
    execute = engine.runner.execute

    def reverses(step: Step) -> list[SeqResult]:
        results = execute(step)
        for result in results:
            result.prompt_rows.reverse()
        return results

    engine.runner.execute = reverses


BROKEN: tuple[Break, ...] = (
    frees_pages_in_use,
    matches_one_page_too_long,
    writes_one_slot_off,
    forgets_the_last_token_of_the_preempted,
    counts_positions_from_the_chunk,
    penalises_by_a_neighbour,
    sums_by_the_batch,
    reverses_the_scores_of_a_chunk,
)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_a_broken_engine_is_found_by_its_bits(small_folder: Path, broken: Break) -> None:
    with pytest.raises((AssertionError, EngineError), match=r"other bits than alone|not usable"):
        run_programs(Alone(small_folder, broken), NUM_PROGRAMS, shrink=False, check_pages=False)


def leaks_a_page(engine: Engine) -> None:
    """A preempted request loses one of its pages for good."""
    preempt = engine.scheduler.preempt

    def leaks(request: Request) -> None:
        request.page_ids = request.page_ids[:-1]
        preempt(request)

    engine.scheduler.preempt = leaks


@pytest.mark.parametrize("broken", [frees_pages_in_use, leaks_a_page], ids=lambda b: b.__name__)
def test_wrong_accounts_are_found(small_folder: Path, broken: Break) -> None:
    with pytest.raises(EngineError):
        run_programs(Alone(small_folder, broken), NUM_PROGRAMS, shrink=False)
