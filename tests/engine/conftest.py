"""Models for the engine's tests, and a state machine that puts a whole engine to random use.

Whatever the machine does, each finished request is compared, with all its logprobs and bit for
bit, with the same request alone on an emptied engine. Unwritten KV is NaN, so that whoever reads
it shows.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from safetensors.torch import save_file

from isobit import LLM, SamplingParams
from isobit.backends.matrix import Resolved
from isobit.core import startup
from isobit.core.engine import Engine
from isobit.core.outputs import RequestOutput
from isobit.models.config import load_config
from isobit.models.weights import random_weights
from isobit.verify.transcript import Transcript, transcripts

SMALL_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "dtype": "float32",
    "rope_theta": 10_000.0,
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 16_384,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""A model so small that what a test measures is the engine: a step takes a quarter millisecond."""

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
        self.streamed: dict[tuple[str, int], list[int]] = defaultdict(list)
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
                "async_scheduling": st.sampled_from((True, True, False)),
            }
        ),
    )
    def start(self, page_size: int, requests: float, options: dict[str, Any]) -> None:
        """``requests``: how many of full length the pool holds."""
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
    def submit(self, several: list[Any]) -> None:
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
            self.counts["forced preemptions"] += self.engine.preempt(running.group_id)
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
            self.streamed[chunk.request_id, chunk.index] += chunk.token_ids
            if chunk.output is not None:
                self._compare(chunk.output)
        if self.check_pages:
            self.engine.scheduler.check_integrity()
        self.failed = False

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
    folder: Path,
    count: int,
    broken: Break | None = None,
    *,
    shrink: bool = True,
    check_pages: bool = True,
) -> Counter[str]:
    """Run ``count`` random programs on engines of the model in ``folder``.

    Without ``shrink`` they are always the same ones, and the first that fails is reported as it is.
    ``broken`` damages every engine, also the one that computes what each request gives alone.

    :raises AssertionError, EngineError: what broke, with the program that shows it.
    """
    alone, counts = Alone(folder, broken), Counter[str]()
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


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the small model, its matrices so large that attention decides the tokens."""
    folder = tmp_path_factory.mktemp("small-qwen3")
    (folder / "config.json").write_text(json.dumps(SMALL_CONFIG))
    weights = random_weights(load_config(folder), 0)
    for matrix in weights.values():
        if matrix.dim() == 2:
            matrix.mul_(12)
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def tiny() -> Iterator[LLM]:
    """A small random Qwen3 in fp32: no tokenizer, so prompts are token ids."""
    with LLM("tiny-qwen3", load_format="random", max_model_len=512) as llm:
        yield llm


@pytest.fixture(scope="session")
def smollm2() -> Iterator[LLM]:
    """The real model, in fp32."""
    with LLM("smollm2", max_model_len=4096) as llm:
        yield llm


@pytest.fixture
def graphs_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs are on in what start-up selects, which no backend has on the CPU."""
    select = startup.choose_backend

    def selected(*args: Any) -> Any:
        selection, dtype = select(*args)
        features = selection.features | {"cuda_graph": Resolved(True, "asked for")}
        return replace(selection, features=features), dtype

    monkeypatch.setattr(startup, "choose_backend", selected)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """So small a model only loses by threads; their number changes no bit (see ``verify``)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(name="run_programs")
def run_programs_function() -> Callable[..., Counter[str]]:
    return run_programs
