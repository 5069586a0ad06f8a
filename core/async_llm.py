"""``LLM`` for asyncio: many callers, one engine, steps in a worker thread."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Any, Self

from ..errors import EngineError, LogitsProcessorError, RequestError
from ..sampling.params import SamplingParams
from .chat import Conversation, chat_tokens
from .llm import LLM
from .outputs import StreamChunk
from .prompts import Prompt, prompt_tokens
from .stats import Stats

_Item = StreamChunk | BaseException
_Inbox = asyncio.Queue[_Item]
_Letter = tuple[_Inbox, _Item]
"""What has come, and for whom."""


class AsyncLLM:
    """A model that serves many callers of one event loop; bits as from ``LLM``.

    >>> async with AsyncLLM("smollm2") as llm:
    ...     async for chunk in llm.generate("The capital of France is"):
    ...         print(chunk.text, end="")

    One worker thread does all that touches the engine, so the loop is never blocked. It runs while
    there are requests. No signal handlers are installed.

    :param model: and ``options``: as for ``LLM``; building it blocks until the model is loaded.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self._llm = LLM(model, **options)
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="isobit")
        self._ids = itertools.count()
        self._inboxes: dict[str, _Inbox] = {}  # of those who wait; the event loop's
        self._served: dict[str, _Inbox] = {}  # of the engine's requests; the worker's
        # What the worker does before its next step, in order: each gives an error's letter or None.
        self._jobs: deque[Callable[[], _Letter | None]] = deque()
        self._driver: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def tokenizer(self) -> Any | None:
        """The model's transformers tokenizer; None where its folder has none."""
        return self._llm.tokenizer

    @property
    def fingerprint(self) -> str:
        """Names all that the bits depend on but the request: equal means equal bits."""
        return self._llm.fingerprint

    @property
    def fingerprint_parts(self) -> Mapping[str, str]:
        """What is hashed into ``fingerprint``, by name."""
        return self._llm.fingerprint_parts

    def stats(self) -> Stats:
        """Counts of now and since start; during a step, of some moment of it."""
        return self._llm.stats()

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
    ) -> AsyncGenerator[StreamChunk, None]:
        """Complete one prompt; its chunks as they come, the last with its ``RequestOutput``.

        Leaving the loop, ``aclose()`` or cancelling the task aborts the request; its pages are free
        after the step under way.

        :raises RequestError: it can never be served, its id is in use, or this object is closed.
        :raises Exception: whatever made a step fail; all callers waiting then get it.
        """
        self._check_open()
        if request_id is None:
            ids = map(str, self._ids)
            request_id = next(free for free in ids if free not in self._inboxes)
        elif request_id in self._inboxes:
            raise RequestError(
                f"request id {request_id!r} is in use. Pass another, or end that request first."
            )
        inbox: _Inbox = asyncio.Queue()
        self._inboxes[request_id] = inbox
        params = SamplingParams() if sampling_params is None else sampling_params
        self._jobs.append(partial(self._add, request_id, inbox, prompt, params))
        self._wake()
        finished = False
        try:
            while not finished:
                item = await inbox.get()
                finished = isinstance(item, BaseException) or item.output is not None
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            if self._inboxes.get(request_id) is inbox:
                del self._inboxes[request_id]
            if not finished:
                self._jobs.append(partial(self._abort, request_id))
                self._wake(after_cancel=False)

    async def chat(
        self,
        messages: Conversation,
        sampling_params: SamplingParams | None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        request_id: str | None = None,
    ) -> AsyncGenerator[StreamChunk, None]:
        """Answer one conversation; otherwise as ``generate``, and as ``LLM.chat``."""
        self._check_open()
        tokens = chat_tokens(
            self.tokenizer, messages, chat_template, add_generation_prompt=add_generation_prompt
        )
        chunks = self.generate(tokens, sampling_params, request_id=request_id)
        try:
            async for chunk in chunks:
                yield chunk
        finally:
            await chunks.aclose()

    async def flush_cache(self) -> int:
        """Empty the prefix cache of all that no request uses, between two steps; pages freed."""
        self._check_open()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._worker, self._llm.flush_cache)

    async def close(self) -> None:
        """End all requests with a ``RequestError`` and drop weights and cache."""
        if self._closed:
            return
        self._closed = True
        self._fail_all(RequestError("this AsyncLLM was closed. Make a new one."))
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._worker, self._llm.close)
        self._worker.shutdown()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError("this AsyncLLM is closed. Make a new one.")

    def _wake(self, *, after_cancel: bool = True) -> None:
        """Start the driver where none runs; a loop that is shutting down has cancelled it."""
        driver = self._driver
        if self._closed or (driver is not None and not driver.done()):
            return
        if after_cancel or driver is None or not driver.cancelled():
            self._driver = asyncio.get_running_loop().create_task(self._drive())

    async def _drive(self) -> None:
        """Step while there is something to do, and hand out what comes."""
        loop = asyncio.get_running_loop()
        try:
            while (self._jobs or self._inboxes) and not self._closed:
                for inbox, item in await loop.run_in_executor(self._worker, self._turn):
                    inbox.put_nowait(item)
        except asyncio.CancelledError:
            self._fail_all(EngineError("the event loop cancelled the task that drives AsyncLLM."))
            raise

    def _fail_all(self, error: BaseException) -> None:
        for inbox in self._inboxes.values():
            inbox.put_nowait(error)
        self._inboxes.clear()

    # The rest runs in the worker.

    def _turn(self) -> list[_Letter]:
        """The jobs, then one step."""
        letters: list[_Letter] = []
        while self._jobs:
            letter = self._jobs.popleft()()
            if letter is not None:
                letters.append(letter)
        try:
            for chunk in self._llm.engine.step():
                letters.append((self._served[chunk.request_id], chunk))
                if chunk.output is not None:
                    del self._served[chunk.request_id]
        except LogitsProcessorError as error:
            letters.append((self._served.pop(error.request_id), error))
        except BaseException as error:
            letters += [(inbox, error) for inbox in self._served.values()]
            for request_id in list(self._served):
                self._abort(request_id)
        return letters

    def _add(
        self, request_id: str, inbox: _Inbox, prompt: Prompt, params: SamplingParams
    ) -> _Letter | None:
        text = prompt if isinstance(prompt, str) else None
        try:
            tokens = prompt_tokens(prompt, self.tokenizer)
            self._llm.engine.add_request(request_id, tokens, params, text)
        except Exception as error:
            return inbox, error
        self._served[request_id] = inbox
        return None

    def _abort(self, request_id: str) -> None:
        if self._served.pop(request_id, None) is not None:
            self._llm.engine.abort(request_id)
