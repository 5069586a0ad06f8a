"""AsyncLLM: the bits of LLM, for many callers, and nothing left behind by those who go."""

from __future__ import annotations

import asyncio
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import pytest

from isobit import LLM, AsyncLLM, RequestOutput, SamplingParams, StreamChunk
from isobit.errors import BackendError, LogitsProcessorError, RequestError
from isobit.verify.transcript import transcripts

PROMPTS = [[1, 2, 3], [9], list(range(40, 90)), [7, 7, 7, 7]]
PARAMS = SamplingParams(temperature=1, max_tokens=8, ignore_eos=True, logprobs=2)
LONG = SamplingParams(temperature=1, max_tokens=400, ignore_eos=True)


def serve(test: Callable[[AsyncLLM], Awaitable[None]]) -> None:
    """Run ``test`` with a model; at its end nothing may be left in the engine."""

    async def main() -> None:
        async with AsyncLLM("tiny-qwen3", load_format="random", max_model_len=512) as llm:
            await test(llm)
            await idle(llm)

    asyncio.run(main())


async def idle(llm: AsyncLLM) -> None:
    for _ in range(500):
        if llm.stats().unfinished == 0:
            break
        await asyncio.sleep(0.01)
    await llm.flush_cache()
    stats = llm.stats()
    assert (stats.running, stats.waiting, stats.unfinished) == (0, 0, 0)
    assert stats.pages_free == stats.pages_total


async def collect(llm: AsyncLLM, prompt: Any, params: SamplingParams, **kw: Any) -> RequestOutput:
    chunks = [chunk async for chunk in llm.generate(prompt, params, **kw)]
    output = chunks[-1].output
    assert output is not None
    for choice in output.outputs:
        mine = tuple(t for c in chunks if c.index == choice.index for t in c.token_ids)
        assert mine == choice.token_ids
    return output


def failing(llm: AsyncLLM, call: int, error: BaseException) -> None:
    """Let one step's ``launch`` raise."""
    runner = llm._llm.engine.runner
    launch, calls = runner.launch, iter(range(1, 10**6))

    def wrapped(step: Any) -> Any:
        if next(calls) == call:
            raise error
        return launch(step)

    runner.launch = wrapped  # type: ignore[method-assign]


def test_many_callers_get_the_bits_of_generate(tiny: LLM) -> None:
    params = [PARAMS, SamplingParams(max_tokens=8, ignore_eos=True, logprobs=1, n=3), PARAMS]
    params.append(SamplingParams(max_tokens=0, prompt_logprobs=1))
    expected = tiny.generate(PROMPTS, params)

    async def test(llm: AsyncLLM) -> None:
        assert llm.fingerprint == tiny.fingerprint
        jobs = [collect(llm, p, q) for p, q in zip(PROMPTS, params, strict=True)]
        outputs = await asyncio.gather(*jobs, *[collect(llm, [i], PARAMS) for i in range(20)])
        for output, whole in zip(outputs, expected, strict=False):
            assert transcripts(output) == transcripts(whole)
        assert transcripts(outputs[4]) != transcripts(expected[0])

    serve(test)


def test_chat_with_stops_and_choices(smollm2: LLM) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    whole = smollm2.chat(messages, SamplingParams(temperature=0, max_tokens=10))[0].outputs[0]
    params = SamplingParams(temperature=0, max_tokens=10, n=2, logprobs=2, stop=whole.text[8:11])
    (expected,) = smollm2.chat(messages, params)
    assert expected.outputs[0].finish_reason == "stop"

    async def main() -> None:
        async with AsyncLLM("smollm2", max_model_len=4096) as llm:
            chunks = [chunk async for chunk in llm.chat(messages, params)]
        output = chunks[-1].output
        assert output is not None
        assert output.outputs == expected.outputs
        for choice in output.outputs:
            assert "".join(c.text for c in chunks if c.index == choice.index) == choice.text

    asyncio.run(main())


def test_the_loop_is_never_blocked_and_signals_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGINT)

    async def test(llm: AsyncLLM) -> None:
        runner = llm._llm.engine.runner
        launch, threads = runner.launch, set()

        def slow(step: Any) -> Any:
            threads.add(threading.current_thread())
            time.sleep(0.2)
            return launch(step)

        runner.launch = slow  # type: ignore[method-assign]
        task = asyncio.create_task(collect(llm, [1], SamplingParams(max_tokens=2)))
        ticks = 0
        while not task.done():
            await asyncio.sleep(0.01)
            ticks += 1
        assert ticks >= 15
        assert len(threads) == 1
        assert threading.main_thread() not in threads

    serve(test)
    assert signal.getsignal(signal.SIGINT) is before


async def _cancel(llm: AsyncLLM, started: asyncio.Event) -> None:
    async def consume() -> None:
        async for _ in llm.generate([5], LONG):
            started.set()

    task = asyncio.create_task(consume())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def _aclose(llm: AsyncLLM, started: asyncio.Event) -> None:
    chunks = llm.generate([5], LONG)
    await anext(chunks)
    await chunks.aclose()


async def _break(llm: AsyncLLM, started: asyncio.Event) -> None:
    async for _ in llm.generate([5], LONG):
        break


@pytest.mark.parametrize("leave", [_cancel, _aclose, _break])
def test_whoever_leaves_aborts_his_request_alone(
    tiny: LLM, leave: Callable[[AsyncLLM, asyncio.Event], Coroutine[Any, Any, None]]
) -> None:
    (expected,) = tiny.generate(PROMPTS[:1], PARAMS)

    async def test(llm: AsyncLLM) -> None:
        neighbour = asyncio.create_task(collect(llm, PROMPTS[0], PARAMS))
        await leave(llm, asyncio.Event())
        assert transcripts(await neighbour) == transcripts(expected)
        await idle(llm)
        assert llm.stats().tokens < 300  # the 400 were not computed

    serve(test)


def test_an_id_may_come_again_but_not_twice_at_once(tiny: LLM) -> None:
    (expected,) = tiny.generate(PROMPTS[:1], PARAMS)

    async def test(llm: AsyncLLM) -> None:
        chunks = llm.generate([5], LONG, request_id="x")
        assert (await anext(chunks)).request_id == "x"
        with pytest.raises(RequestError, match="'x' is in use"):
            await collect(llm, [1], PARAMS, request_id="x")
        await chunks.aclose()
        again = await collect(llm, PROMPTS[0], PARAMS, request_id="x")
        assert transcripts(again) == transcripts(expected)

    serve(test)


def test_a_refused_request_hurts_no_other() -> None:
    async def test(llm: AsyncLLM) -> None:
        good = asyncio.create_task(collect(llm, [1], PARAMS))
        for bad, message in (([99999], "prompt token 0"), ([], "no tokens"), ("x", "tokenizer")):
            with pytest.raises(RequestError, match=message):
                await collect(llm, bad, PARAMS)
        params = SamplingParams(logits_processors=[lambda ids, logits: logits / 0])
        with pytest.raises(LogitsProcessorError, match="lambda"):
            await collect(llm, [2], params)
        assert len((await good).outputs[0].token_ids) == 8
        with pytest.raises(RequestError, match="chat needs a tokenizer"):
            await anext(llm.chat([{"role": "user", "content": "x"}]))

    serve(test)


@pytest.mark.parametrize(
    "error", [BackendError("broken"), MemoryError("full"), KeyboardInterrupt()]
)
def test_a_failed_step_reaches_everybody_waiting(tiny: LLM, error: BaseException) -> None:
    expected = tiny.generate(PROMPTS, PARAMS)

    async def test(llm: AsyncLLM) -> None:
        failing(llm, 4, error)
        jobs = [collect(llm, prompt, PARAMS) for prompt in PROMPTS]
        results = await asyncio.gather(*map(guarded, jobs))
        assert [type(result) for result in results] == [type(error)] * len(PROMPTS)
        outputs = await asyncio.gather(*[collect(llm, prompt, PARAMS) for prompt in PROMPTS])
        for output, whole in zip(outputs, expected, strict=True):
            assert transcripts(output) == transcripts(whole)

    serve(test)


async def guarded(job: Coroutine[Any, Any, RequestOutput]) -> RequestOutput | BaseException:
    try:
        return await job
    except BaseException as error:
        return error


def test_close_ends_everybody_and_refuses_more() -> None:
    async def main() -> None:
        llm = AsyncLLM("tiny-qwen3", load_format="random", max_model_len=512)
        chunks = llm.generate([5], LONG)
        await anext(chunks)
        waiting = asyncio.create_task(guarded(collect(llm, [6], LONG)))
        await asyncio.sleep(0.02)
        await llm.close()
        await llm.close()
        with pytest.raises(RequestError, match="was closed"):
            async for _ in chunks:
                pass
        assert isinstance(await waiting, RequestError)
        with pytest.raises(RequestError, match="is closed"):
            await collect(llm, [1], PARAMS)
        with pytest.raises(RequestError, match="closed"):
            llm.stats()

    asyncio.run(main())


def test_one_object_serves_one_loop_after_the_other(tiny: LLM) -> None:
    """Also where the first loop ended in the middle of requests."""
    (expected,) = tiny.generate(PROMPTS[:1], PARAMS)
    llm = AsyncLLM("tiny-qwen3", load_format="random", max_model_len=512)

    async def leave() -> None:
        tasks = [asyncio.create_task(collect(llm, [i], LONG)) for i in range(3)]
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in tasks)

    async def again() -> None:
        output = await collect(llm, PROMPTS[0], PARAMS)
        assert transcripts(output) == transcripts(expected)
        await idle(llm)
        await llm.close()

    asyncio.run(leave())
    asyncio.run(again())


def test_chunks_come_one_by_one() -> None:
    async def test(llm: AsyncLLM) -> None:
        chunks: list[StreamChunk] = [chunk async for chunk in llm.generate([1], PARAMS)]
        assert [len(chunk.token_ids) for chunk in chunks] == [1] * 8
        assert [chunk.output is not None for chunk in chunks] == [False] * 7 + [True]

    serve(test)
