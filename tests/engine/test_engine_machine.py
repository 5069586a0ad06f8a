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
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

from isobit import LLM, SamplingParams
from isobit.backends.base import Batch
from isobit.cache.radix import Match, RadixCache
from isobit.core.engine import Engine
from isobit.core.outputs import RequestOutput, StreamChunk
from isobit.core.request import Request
from isobit.core.scheduler import ScheduledSeq
from isobit.errors import EngineError
from isobit.sampling.sampler import SamplingRow
from isobit.verify.transcript import Transcript, transcripts

NUM_PROGRAMS = 120
STEPS_OF_A_PROGRAM = 50
MAX_MODEL_LEN = 48
BYTES_PER_TOKEN = 2 * 2 * 16 * 4  # K and V, 2 layers, 1 head of 16, fp32

Break = Callable[[Engine], None]
"""Damages an engine that has just been made."""

token_ids = st.integers(3, 6)  # few, so that prompts share prefixes and outputs meet prompts
prompts_tail = st.lists(token_ids, min_size=1, max_size=12)
sampling_params = st.builds(
    SamplingParams,
    n=st.sampled_from((1, 1, 1, 2, 3)),
    temperature=st.sampled_from((0.0, 0.0, 0.8, 1.0, 1.7)),
    top_p=st.sampled_from((1.0, 0.9, 0.4)),
    top_k=st.sampled_from((-1, 1, 7)),
    min_p=st.sampled_from((0.0, 0.05)),
    seed=st.sampled_from((None, 0, 1, -7)),
    max_tokens=st.sampled_from((1, 2, 4, 8, 16)),
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


def start(folder: Path, broken: Break | None, **options: Any) -> LLM:
    """An engine of the small model whose unwritten KV is NaN."""
    llm = LLM(str(folder), load_format="random", max_model_len=MAX_MODEL_LEN, **options)
    for layer in llm.engine.runner.layers:
        layer.k.fill_(torch.nan)
        layer.v.fill_(torch.nan)
    if broken is not None:
        broken(llm.engine)
    return llm


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
        requests=st.sampled_from((1.0, 1.3, 2.5)),
        options=st.fixed_dictionaries(
            {
                "max_num_seqs": st.sampled_from((1, 2, 4, 8)),
                "max_num_batched_tokens": st.sampled_from((5, 16, 64)),
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

    @rule(
        earlier=st.integers(0, 10**6),
        cut=st.integers(0, 30),
        tail=prompts_tail,
        params=sampling_params,
    )
    def submit(self, earlier: int, cut: int, tail: list[int], params: SamplingParams) -> None:
        """A new prompt, or one that begins as an earlier prompt, with or without its output."""
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

    @rule(which=st.integers(0, 10**6), rarely=st.integers(0, 2))
    def abort(self, which: int, rarely: int) -> None:
        unfinished = self.engine.unfinished_ids()
        if unfinished and rarely == 0:
            assert self.engine.abort(unfinished[which % len(unfinished)])
            self.counts["aborts"] += 1

    @rule(which=st.integers(0, 10**6))
    def preempt(self, which: int) -> None:
        running = self.engine.scheduler.running
        if running:
            request_id, _, _ = running[which % len(running)].request_id.rpartition("#")
            self.counts["forced preemptions"] += self.engine.preempt(request_id)

    @precondition(lambda self: self.engine.scheduler.cache is not None)
    @rule(count=st.integers(1, 6))
    def evict(self, count: int) -> None:
        cache = self.engine.scheduler.cache
        assert cache is not None
        self.counts["evictions"] += cache.evict(count)

    @rule(rarely=st.integers(0, 3))
    def flush(self, rarely: int) -> None:
        if rarely == 0:
            self.engine.flush_cache()

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


def test_every_output_is_the_one_alone(
    small_folder: Path, request: pytest.FixtureRequest
) -> None:
    count = NUM_PROGRAMS * (10 if request.config.getoption("--long") else 1)
    counts = run_programs(Alone(small_folder), count)
    print(dict(counts))
