"""add_request, step and abort beside generate and stream; stats, flush_cache, close."""

from __future__ import annotations

import pytest

from isobit import LLM, SamplingParams
from isobit.errors import RequestError
from isobit.verify.transcript import transcripts

PROMPTS = [[1, 2, 3], [9], list(range(40, 90))]
PARAMS = SamplingParams(temperature=1, max_tokens=8, ignore_eos=True, logprobs=2)


def test_a_loop_gives_what_generate_gives(tiny: LLM) -> None:
    expected = tiny.generate(PROMPTS, PARAMS)
    ids = [tiny.add_request(PROMPTS[0], PARAMS, request_id="mine")]
    ids += [tiny.add_request(prompt, PARAMS) for prompt in PROMPTS[1:]]
    assert ids[0] == "mine"
    assert len(set(ids)) == 3
    tokens: dict[str, list[int]] = {request_id: [] for request_id in ids}
    outputs = {}
    while tiny.has_unfinished_requests():
        for chunk in tiny.step():
            tokens[chunk.request_id] += chunk.token_ids
            if chunk.output is not None:
                outputs[chunk.request_id] = chunk.output
    for request_id, whole in zip(ids, expected, strict=True):
        assert transcripts(outputs[request_id]) == transcripts(whole)
        assert tuple(tokens[request_id]) == whole.outputs[0].token_ids
    assert tiny.step() == []
    other = SamplingParams(temperature=1, max_tokens=8, ignore_eos=True, logprobs=2, seed=1)
    assert transcripts(tiny.generate(PROMPTS[:1], other)[0]) != transcripts(expected[0])


def test_nothing_is_lost_when_generate_runs_in_between(tiny: LLM) -> None:
    expected = tiny.generate(PROMPTS, PARAMS)
    tiny.add_request(PROMPTS[0], PARAMS, request_id="a")
    chunks = tiny.step()
    stream = tiny.stream(PROMPTS[2:], PARAMS)
    first = next(stream)
    assert transcripts(tiny.generate(PROMPTS[1], PARAMS)[0]) == transcripts(expected[1])
    assert tiny.has_unfinished_requests()
    while tiny.has_unfinished_requests():
        chunks += tiny.step()
    assert {chunk.request_id for chunk in chunks} == {"a"}
    assert tuple(t for c in chunks for t in c.token_ids) == expected[0].outputs[0].token_ids
    assert chunks[-1].output is not None
    rest = [first, *stream]
    assert tuple(t for c in rest for t in c.token_ids) == expected[2].outputs[0].token_ids


def test_duplicate_ids_and_aborts(tiny: LLM) -> None:
    tiny.add_request([1], PARAMS, request_id="x")
    with pytest.raises(RequestError, match="'x' is in use"):
        tiny.add_request([2], PARAMS, request_id="x")
    tiny.step()
    assert tiny.abort("x") is True
    assert tiny.abort("x") is False
    assert tiny.abort("never") is False
    assert not tiny.has_unfinished_requests()
    assert not tiny.engine.has_unfinished()
    tiny.add_request([1], PARAMS, request_id="x")
    tiny.generate([[5]], PARAMS)  # computes it to its end
    assert tiny.abort("x") is False
    with pytest.raises(RequestError, match="'x' is in use"):
        tiny.add_request([2], PARAMS, request_id="x")  # its chunks were not taken yet
    assert tiny.step()[-1].output is not None


def test_a_bad_request_is_refused_and_leaves_nothing(tiny: LLM) -> None:
    with pytest.raises(RequestError):
        tiny.add_request([99999], PARAMS, request_id="bad")
    assert not tiny.has_unfinished_requests()
    assert not tiny.engine.has_unfinished()
    assert tiny.abort("bad") is False


def test_choices_stops_and_logprobs_in_a_loop(tiny: LLM) -> None:
    (free,) = tiny.generate([[4, 4]], PARAMS)
    stop = free.outputs[0].token_ids[3]
    params = SamplingParams(
        temperature=1, max_tokens=8, ignore_eos=True, logprobs=2, n=3, stop_token_ids=[stop]
    )
    (expected,) = tiny.generate([[4, 4]], params)
    assert expected.outputs[0].stop_reason == stop
    tiny.add_request([4, 4], params)
    chunks = []
    while tiny.has_unfinished_requests():
        chunks += tiny.step()
    assert chunks[-1].output is not None
    assert chunks[-1].output.outputs == expected.outputs
    for choice in expected.outputs:
        mine = [chunk for chunk in chunks if chunk.index == choice.index]
        assert tuple(row for c in mine for row in c.logprobs or ()) == choice.logprobs


def test_a_stream_that_nobody_reads_leaves_nothing(tiny: LLM) -> None:
    stream = tiny.stream(PROMPTS, PARAMS)
    assert tiny.engine.has_unfinished()
    del stream
    assert not tiny.engine.has_unfinished()


def test_stats_and_flush() -> None:
    with LLM("tiny-qwen3", load_format="random", max_model_len=512) as llm:
        before = llm.stats()
        assert before.pages_free == before.pages_total
        llm.generate([list(range(64))], PARAMS)
        llm.generate([list(range(64))], PARAMS)
        done = llm.stats()
        assert (done.running, done.waiting, done.unfinished) == (0, 0, 0)
        assert (done.finished, done.cache_lookups, done.cache_hits) == (2, 2, 1)
        assert done.cache_tokens == 48
        assert done.pages_free + done.pages_cached == done.pages_total
        assert done.tokens == 64 + 7 + 16 + 7
        assert done.preemptions == 0
        stream = llm.stream([[1]] * 300, PARAMS)
        next(stream)
        busy = llm.stats()
        assert (busy.running, busy.waiting, busy.unfinished) == (256, 44, 300)
        stream.close()
        assert llm.flush_cache() == done.pages_cached
        assert llm.stats().pages_free == llm.stats().pages_total


def test_fingerprint_parts(tiny: LLM) -> None:
    parts = tiny.fingerprint_parts
    assert parts["dtype"] == "torch.float32"
    with pytest.raises(TypeError):
        parts["dtype"] = "x"  # type: ignore[index]


def test_a_closed_llm_refuses_everything() -> None:
    llm = LLM("tiny-qwen3", load_format="random")
    stream = llm.stream([[1, 2]], PARAMS)
    next(stream)
    llm.add_request([1], PARAMS, request_id="a")
    llm.close()
    llm.close()
    calls = (
        lambda: next(stream),
        llm.step,
        lambda: llm.abort("a"),
        lambda: llm.add_request([1]),
        lambda: llm.score([1, 2]),
        llm.stats,
        llm.flush_cache,
    )
    for call in calls:
        with pytest.raises(RequestError, match="this LLM is closed"):
            call()
