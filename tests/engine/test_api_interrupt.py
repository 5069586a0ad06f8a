"""A step that raises, also Ctrl-C, leaves an engine that gives the same bits again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from isobit import LLM, RequestOutput, SamplingParams
from isobit.core.engine import Engine
from isobit.errors import BackendError, ConfigError, DeviceMemoryError, EngineError
from isobit.sampling.token_counts import TokenCounts
from isobit.verify.transcript import Transcript, transcripts

PROMPTS = [[1, 2, 3], list(range(40, 140)), [9] * 33]
PARAMS = [
    SamplingParams(temperature=1, max_tokens=12, ignore_eos=True, logprobs=2, prompt_logprobs=1),
    SamplingParams(temperature=1, max_tokens=12, ignore_eos=True, logprobs=2, n=2),
    SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=2),
]


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def llm(request: pytest.FixtureRequest) -> Iterator[LLM]:
    options: dict[str, Any] = {"max_num_batched_tokens": 48, "max_model_len": 256}
    options["async_scheduling"] = request.param
    with LLM("tiny-qwen3", load_format="random", **options) as llm:
        yield llm


def bits(outputs: list[RequestOutput]) -> list[list[Transcript]]:
    return [transcripts(output) for output in outputs]


def raise_at(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int, error: BaseException
) -> None:
    """Let ``owner.name`` raise once, at its call number ``call``."""
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


def target(llm: LLM, where: str) -> tuple[object, str]:
    engine = llm.engine
    return {
        "launch": (engine.runner, "launch"),
        "read": (engine.runner, "read"),
        "run_written": (engine.runner.backend, "run_written"),
        "plan": (engine.runner.backend, "plan"),
        "sample": (engine.runner, "_sampling_row"),
        "schedule": (engine.scheduler, "schedule"),
        "complete": (engine.scheduler, "complete"),
        "advance": (engine, "_advance"),
    }[where]


@pytest.mark.parametrize(
    ("where", "call"),
    [
        *(("launch", 1), ("launch", 4), ("launch", 9)),
        *(("run_written", 1), ("run_written", 8), ("run_written", 21)),
        *(("read", 1), ("read", 4), ("read", 9)),
        *(("plan", 2), ("sample", 7), ("schedule", 3), ("complete", 6), ("advance", 10)),
    ],
)
def test_generate_again_after_ctrl_c(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, where: str, call: int
) -> None:
    expected = bits(llm.generate(PROMPTS, PARAMS))
    llm.flush_cache()
    with monkeypatch.context() as patch:
        raise_at(patch, *target(llm, where), call, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, PARAMS)
        assert not llm.engine.has_unfinished()
        llm.engine.scheduler.check_integrity()
    assert bits(llm.generate(PROMPTS, PARAMS)) == expected
    llm.engine.scheduler.check_integrity()
    llm.flush_cache()
    assert llm.stats().pages_free == llm.stats().pages_total


@pytest.mark.parametrize("call", [1, 3, 5])
def test_score_again_after_ctrl_c(llm: LLM, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    expected = llm.score(PROMPTS, prompt_lens=2, top=2)
    llm.flush_cache()
    with monkeypatch.context() as patch:
        raise_at(patch, llm.engine.runner.backend, "run_written", call, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            llm.score(PROMPTS, prompt_lens=2, top=2)
    assert not llm.engine.has_unfinished()
    scores = llm.score(PROMPTS, prompt_lens=2, top=2)
    assert [s.top_logprobs for s in scores] == [s.top_logprobs for s in expected]


@pytest.mark.parametrize("where", ["launch", "read", "run_written", "plan", "sample"])
@pytest.mark.parametrize("call", [1, 3, 7])
def test_requests_survive_an_interrupted_step(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, where: str, call: int
) -> None:
    """A loop goes on after Ctrl-C where it was, and so does another's stream."""
    expected = bits(llm.generate(PROMPTS, PARAMS))
    llm.flush_cache()
    stream = llm.stream(PROMPTS[2:], PARAMS[2:])
    ids = [llm.add_request(p, param) for p, param in zip(PROMPTS[:2], PARAMS[:2], strict=True)]
    raise_at(monkeypatch, *target(llm, where), call, KeyboardInterrupt())
    finals: dict[str, RequestOutput] = {}
    texts: dict[tuple[str, int], tuple[int, ...]] = {}
    interrupts = 0
    while llm.has_unfinished_requests():
        try:
            chunks = llm.step()
        except KeyboardInterrupt:
            interrupts += 1
            llm.engine.scheduler.check_integrity()
            continue
        for chunk in chunks:
            key = (chunk.request_id, chunk.index)
            texts[key] = texts.get(key, ()) + chunk.token_ids
            if chunk.output is not None:
                finals[chunk.request_id] = chunk.output
    assert interrupts == 1
    assert [transcripts(finals[request_id]) for request_id in ids] == expected[:2]
    for request_id, output in finals.items():
        for choice in output.outputs:
            assert texts[request_id, choice.index] == choice.token_ids
    last = list(stream)[-1].output
    assert last is not None
    assert transcripts(last) == expected[2]
    assert llm.stats().preemptions > 0  # the recomputation was real


@pytest.mark.parametrize("where", ["schedule", "complete", "advance"])
def test_a_step_that_cannot_be_saved_drops_its_requests_and_says_so(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    expected = bits(llm.generate(PROMPTS, PARAMS))
    llm.add_request([1], PARAMS[2], request_id="mine")
    stream = llm.stream([[1, 2]], PARAMS[2])
    next(stream)
    llm.step()
    with monkeypatch.context() as patch:
        raise_at(patch, *target(llm, where), 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            llm.step()
    with pytest.raises(EngineError, match="requests mine were dropped"):
        llm.step()
    assert not llm.has_unfinished_requests()
    with pytest.raises(EngineError, match="were dropped"):
        list(stream)
    assert bits(llm.generate(PROMPTS, PARAMS)) == expected
    llm.engine.scheduler.check_integrity()


@pytest.mark.parametrize(
    ("where", "call"), [("plan", 1), ("plan", 5), ("run_written", 1), ("run_written", 9)]
)
def test_a_backends_error_names_it_and_the_engine_goes_on(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, where: str, call: int
) -> None:
    expected = bits(llm.generate(PROMPTS, PARAMS))
    llm.flush_cache()
    with monkeypatch.context() as patch:
        raise_at(patch, *target(llm, where), call, IndexError("tile 7"))
        with pytest.raises(BackendError, match=rf"'torch' raised IndexError in {where}.*tile 7"):
            llm.generate(PROMPTS, PARAMS)
    assert not llm.engine.has_unfinished()
    assert bits(llm.generate(PROMPTS, PARAMS)) == expected


@pytest.mark.parametrize(("where", "call"), [("plan", 1), ("run_written", 9)])
def test_a_shortage_in_a_step_says_what_to_lower_and_the_engine_goes_on(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, where: str, call: int
) -> None:
    expected = bits(llm.generate(PROMPTS, PARAMS))
    llm.flush_cache()
    shortage = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has")
    message = r"in a step of \d+ tokens of \d+ requests: .* allocate 2 GiB\. .* lower gpu_memory_ut"
    with monkeypatch.context() as patch:
        raise_at(patch, *target(llm, where), call, shortage)
        with pytest.raises(DeviceMemoryError, match=message):
            llm.generate(PROMPTS, PARAMS)
    assert not llm.engine.has_unfinished()
    assert bits(llm.generate(PROMPTS, PARAMS)) == expected


def test_a_step_within_a_step_is_refused(llm: LLM) -> None:
    def nested(token_ids: Any, logits: Any) -> Any:
        llm.generate([[1]])
        return logits

    (expected,) = bits(llm.generate(PROMPTS[:1], PARAMS[0]))
    with pytest.raises(ValueError, match="while a step runs"):
        llm.generate([[5]], SamplingParams(logits_processors=[nested]))
    assert bits(llm.generate(PROMPTS[:1], PARAMS[0])) == [expected]
    assert not llm.engine.has_unfinished()


def test_bits_would_differ_if_a_row_did(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison can fail: stale K and V after an undone step would show."""
    expected = bits(llm.generate(PROMPTS, PARAMS))
    llm.flush_cache()
    backend = llm.engine.runner.backend
    original = backend.run_written

    def wrong(q: Any, layer: Any, plan: Any, out: Any) -> None:
        original(q, layer, plan, out)
        layer.k[:, 0] *= 1.001

    monkeypatch.setattr(backend, "run_written", wrong)
    assert bits(llm.generate(PROMPTS, PARAMS)) != expected


def test_counts_that_were_interrupted_are_made_anew(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of counting tokens for penalties."""
    params = SamplingParams(
        temperature=1, seed=4, max_tokens=12, ignore_eos=True, logprobs=2, frequency_penalty=1.5
    )
    expected = bits(llm.generate([[1, 2, 3]], params))
    llm.flush_cache()
    request_id = llm.add_request([1, 2, 3], params)
    for _ in range(5):
        llm.step()
    update = TokenCounts.update

    def interrupted(self: TokenCounts, output_token_ids: Sequence[int]) -> None:
        update(self, [*output_token_ids, 9, 9])  # counted, and not noted as counted
        self._num_counted -= 2
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TokenCounts, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.step()
    last = None
    while llm.has_unfinished_requests():
        last = ([c.output for c in llm.step()] or [last])[-1]
    assert last is not None
    assert last.request_id == request_id
    assert bits([last]) == expected


@pytest.mark.parametrize("where", ["launch", "read"])
def test_a_configuration_error_in_a_step_is_no_wrong_budget(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    expected = bits(llm.generate(PROMPTS, PARAMS))
    llm.flush_cache()
    with monkeypatch.context() as patch:
        raise_at(patch, *target(llm, where), 3, ConfigError("cannot write the cache"))
        with pytest.raises(ConfigError, match="cannot write"):
            llm.generate(PROMPTS, PARAMS)
    llm.engine.scheduler.check_integrity()
    assert bits(llm.generate(PROMPTS, PARAMS)) == expected


def drain(engine: Engine, tokens: list[int]) -> None:
    while engine.has_unfinished():
        tokens += [t for chunk in engine.step() for t in chunk.token_ids]


def test_chunks_that_were_recorded_are_not_lost(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C after a request's end was recorded and before its last chunk was given out."""
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    (expected,) = llm.generate([[1, 2, 3]], params)
    engine = llm.engine
    engine.add_request("mine", [1, 2, 3], params)
    forget = engine._forget
    tokens: list[int] = []
    with monkeypatch.context() as patch:
        raise_at(patch, engine, "_forget", 1, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            drain(engine, tokens)
    assert engine.has_unfinished()
    assert engine.is_unfinished("mine")
    forget()
    chunks = engine.step()
    tokens += [t for chunk in chunks for t in chunk.token_ids]
    assert tuple(tokens) == expected.outputs[0].token_ids
    assert chunks[-1].output is not None
    assert not engine.has_unfinished()
