"""Backends that promise less: what they declare is all that cache and scheduler rely on.

The toys in ``toys/`` are real attention whose bits really depend on where a prompt was cut, on cuts
off an alignment, on who computed a row. They are a distribution on ``sys.path``, found by the
plugin host as any other. Each serves a programme with everything that could show: prompts longer
than a step, mixed lengths, several turns, preemption. What comes out must be what each request
gives alone on a cold engine, bit for bit. The negative control is the same toy under bolder claims.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import lcm
from pathlib import Path
from typing import Any

import pytest

from isobit import LLM, SamplingParams
from isobit.core import startup
from isobit.errors import ConfigError, RequestError
from isobit.verify.transcript import Transcript, transcripts

TOYS = Path(__file__).parent / "toys"
sys.path.insert(0, str(TOYS))
try:
    from weak_backends import ALL, FEATURES, MODEL_FEATURES, STRONG, WEAK, Promises
finally:
    sys.path.remove(str(TOYS))

PAGE, BUDGET, LONGEST = 16, 78, 160
NUM_PAGES = 30  # three of the longest requests
FLUSHING, PREEMPTING = 10, 40  # steps, after which all come to their end
BYTES_PER_TOKEN = 2 * 2 * 16 * 4  # K and V, 2 layers, 1 head of 16, fp32
SYSTEM = [3 + index * index % 59 for index in range(20)]
LENGTHS = (87, 30, 57, 110)
"""Of the prompts of the first turn: the first and the last take several steps."""
GREEDY = SamplingParams(max_tokens=14, ignore_eos=True, logprobs=2)
PARAMS = (
    GREEDY,
    replace(GREEDY, temperature=0.8, seed=7, n=2),
    GREEDY,
    replace(GREEDY, prompt_logprobs=1),
)

pytestmark = pytest.mark.usefixtures("one_thread")
Request = tuple[tuple[int, ...], SamplingParams]


@pytest.fixture(scope="module", autouse=True)
def distribution(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The toys, installed."""
    root = tmp_path_factory.mktemp("site")
    info = root / "weak_backends-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: weak-backends\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[isobit.plugins]\nweak = weak_backends\n")
    with pytest.MonkeyPatch.context() as patch:
        for folder in (TOYS, root):
            patch.syspath_prepend(str(folder))
        yield


def start(folder: Path, backend: str, **options: Any) -> LLM:
    return LLM(
        str(folder), attention_backend=backend, max_model_len=LONGEST, page_size=PAGE, **options
    )


def prompt(index: int) -> tuple[int, ...]:
    """Of the first turn."""
    own = (3 + (index * 31 + place * (place + index)) % 61 for place in range(LENGTHS[index] - 20))
    return (*SYSTEM, *own)


class Alone:
    """What a request gives by itself in one chunk, on a cold engine of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[tuple[str, Request], list[Transcript]] = {}
        self._engines: dict[str, LLM] = {}

    def __call__(self, promises: Promises, request: Request) -> list[Transcript]:
        name = str(promises)
        if (name, request) not in self._known:
            if name not in self._engines:
                self._engines[name] = start(self._folder, name, max_num_batched_tokens=LONGEST)
            llm, (tokens, params) = self._engines[name], request
            llm.flush_cache()
            (output,) = llm.generate([list(tokens)], params, use_tqdm=False)
            assert output.num_cached_tokens == 0
            self._known[name, request] = transcripts(output)
        return self._known[name, request]

    def turns(self, promises: Promises) -> list[list[Request]]:
        """Two turns of every conversation, the second upon the first one's answer."""
        first = [(prompt(index), PARAMS[index]) for index in range(len(LENGTHS))]
        answers = [self(promises, request)[0].tokens[-GREEDY.max_tokens :] for request in first]
        return [
            first,
            [
                ((*tokens, *(token for token, _ in answer), 5, 6 + index, 7), params)
                for index, ((tokens, params), answer) in enumerate(zip(first, answers, strict=True))
            ],
        ]


@pytest.fixture(scope="module")
def alone(small_folder: Path) -> Alone:
    return Alone(small_folder)


@dataclass
class Found:
    """What came of a programme. ``cached``: tokens of each prompt of the second turn."""

    llm: LLM
    differ: int
    refused: int
    cached: dict[str, int]
    preempted_decoding: int

    @property
    def cuts(self) -> set[int]:
        """Where chunks began in mid-prompt."""
        starts: set[int] = self.llm.engine.runner.backend.starts  # type: ignore[attr-defined]
        return starts - {0}


def programme(folder: Path, alone: Alone, promises: Promises, backend: str) -> Found:
    """Two turns on an engine with too few pages for all at once, in steps shorter than a prompt.

    Every fifth step a request is preempted, the older ones too; in the first turn its pages are
    evicted as well, as far as the cache has them to itself.
    """
    llm = start(
        folder,
        backend,
        max_num_batched_tokens=BUDGET,
        kv_cache_memory=NUM_PAGES * PAGE * BYTES_PER_TOKEN,
        async_scheduling=True,
    )
    found = Found(llm, 0, 0, {}, 0)
    for turn, requests in enumerate(alone.turns(promises)):
        sent: dict[str, Request] = {}
        for index, request in enumerate(requests):
            try:
                llm.engine.add_request(str(index), *request)
                sent[str(index)] = request
            except RequestError as error:
                if "max_num_batched_tokens" not in str(error):
                    raise
                found.refused += 1
        for number in range(1_000):
            running = llm.engine.scheduler.running
            if running and number % 5 == 4 and number < PREEMPTING:
                victim = running[number % len(running)]
                found.preempted_decoding += victim.num_output_tokens > 1
                llm.engine.preempt(victim.group_id)
                if turn == 0 and number < FLUSHING:
                    llm.flush_cache()
            for chunk in llm.engine.step():
                if chunk.output is not None:
                    expected = alone(promises, sent.pop(chunk.request_id))
                    found.differ += transcripts(chunk.output) != expected
                    found.cached[chunk.request_id] = chunk.output.num_cached_tokens
            llm.engine.scheduler.check_integrity()
            if not llm.engine.has_unfinished():
                break
        assert not sent
    return found


@pytest.mark.parametrize("promises", ALL, ids=str)
def test_what_a_backend_promises_is_enough(
    small_folder: Path, alone: Alone, promises: Promises
) -> None:
    found = programme(small_folder, alone, promises, str(promises))
    assert found.differ == 0
    assert found.preempted_decoding > 3
    cache = found.llm.engine.scheduler.cache
    if not promises.chunk_invariant:
        assert found.cuts == set()
        assert found.refused == 2 * sum(length > BUDGET for length in LENGTHS) > 0
        assert cache is None
        assert set(found.cached.values()) == {0}
        return
    assert found.refused == 0  # so prompts were cut that are longer than a step
    assert found.cuts
    assert all(start % promises.alignment == 0 for start in found.cuts)
    step = lcm(PAGE, promises.alignment)
    decoded = GREEDY.max_tokens - 1 if promises.decode_equals_prefill else 0
    expected = [(length + decoded) // step * step for length in LENGTHS[:-1]]
    assert list(map(found.cached.get, "0123")) == [*expected, 0]  # all logits of the last are asked
    assert (cache.stats.decode_tokens_matched > 0) is promises.decode_equals_prefill


@pytest.mark.parametrize("promises", WEAK, ids=str)
def test_a_promise_that_is_not_kept_is_caught(
    small_folder: Path, alone: Alone, promises: Promises
) -> None:
    assert programme(small_folder, alone, promises, f"bold-{promises}").differ


@pytest.mark.parametrize("promises", ALL, ids=str)
def test_a_toy_is_attention(small_folder: Path, alone: Alone, promises: Promises) -> None:
    tokens, params = prompt(2), GREEDY
    with start(small_folder, "torch") as llm:
        (expected,) = llm.generate([list(tokens)], params, use_tqdm=False)
    with start(small_folder, str(promises)) as llm:
        (found,) = llm.generate([list(tokens)], params, use_tqdm=False)
    assert found.outputs[0].token_ids == expected.outputs[0].token_ids
    total = expected.outputs[0].cumulative_logprob
    assert found.outputs[0].cumulative_logprob == pytest.approx(total, rel=1e-3)


def ask_by_option(feature: str) -> Callable[..., dict[str, Any]]:
    return lambda folder, patch: {"model": str(folder), feature: True}


def ask_by_default(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Any request may sample."""
    return {"model": str(folder)}


def ask_by_window(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    windowed = shutil.copytree(folder, folder.parent / "windowed", dirs_exist_ok=True)
    path = windowed / "config.json"
    window = {"use_sliding_window": True, "sliding_window": 32}
    layers = {"layer_types": ["sliding_attention"] * 2}
    path.write_text(json.dumps(json.loads(path.read_text()) | window | layers))
    return {"model": str(windowed)}


def ask_by_soft_cap(folder: Path, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """No family that is built in caps its scores."""
    load = startup.load_model_config

    def capped(*args: Any, **options: Any) -> Any:
        found, model = load(*args, **options)
        return found, replace(model, logit_soft_cap=30.0)

    patch.setattr(startup, "load_model_config", capped)
    return {"model": str(folder)}


ASKS = {name: ask_by_option(name) for name in ("cuda_graph", "chunked_prefill", "radix_cache")} | {
    "non_greedy_sampling": ask_by_default,
    "sliding_window": ask_by_window,
    "logit_soft_cap": ask_by_soft_cap,
}


@pytest.mark.parametrize("feature", [*FEATURES, *MODEL_FEATURES])
def test_what_a_backend_cannot_hold_is_refused_with_its_reason(
    small_folder: Path, monkeypatch: pytest.MonkeyPatch, feature: str
) -> None:
    """The strong toy starts where the same is asked of it, but for CUDA graphs on a CPU."""
    options = ASKS[feature](small_folder, monkeypatch)
    with pytest.raises(ConfigError, match=f"(?s){feature}.*unsupported: no toy has {feature}"):
        LLM(attention_backend=f"without-{feature}", max_model_len=LONGEST, **options)
    if feature != "cuda_graph":
        LLM(attention_backend=str(STRONG), max_model_len=LONGEST, **options).close()


@pytest.mark.parametrize("feature", ["cuda_graph", "chunked_prefill", "radix_cache"])
def test_what_nobody_asked_for_is_left_out(small_folder: Path, feature: str) -> None:
    with start(small_folder, f"without-{feature}", max_num_batched_tokens=BUDGET) as llm:
        assert f"no toy has {feature}" in str(llm.report)
        long = list(prompt(0))
        if feature == "chunked_prefill":
            with pytest.raises(RequestError, match="max_num_batched_tokens"):
                llm.generate([long], GREEDY, use_tqdm=False)
        else:
            outputs = [llm.generate([long], GREEDY, use_tqdm=False)[0] for _ in range(2)]
            assert (outputs[1].num_cached_tokens > 0) is (feature != "radix_cache")


@pytest.mark.parametrize("feature", ["chunked_prefill", "radix_cache"])
def test_cuts_are_refused_where_bits_depend_on_them(small_folder: Path, feature: str) -> None:
    """The cell says supported; the declaration of its bits says otherwise."""
    name = str(Promises(chunk_invariant=False))
    with pytest.raises(ConfigError, match=f"(?s){feature}.*depend on where a prompt is cut"):
        start(small_folder, name, **{feature: True})
    start(small_folder, name, deterministic=False, **{feature: True}).close()


def test_an_alignment_no_step_could_reach_is_refused(small_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"was 31, .* multiples of 32 tokens\. Pass at least 32"):
        start(small_folder, str(Promises(alignment=32)), max_num_batched_tokens=31)
