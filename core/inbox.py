"""Who gets which chunk: each caller has an inbox, and whoever runs a step fills all of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

from ..errors import EngineError, LogitsProcessorError, RequestError
from ..sampling.params import SamplingParams
from .engine import Engine
from .outputs import StreamChunk


class PostOffice:
    """An engine and the inboxes of those who use it."""

    def __init__(self, engine: Engine) -> None:
        self._engine: Engine | None = engine
        self.owners: dict[str, Inbox] = {}
        self._next_id = 0
        self._left: list[str] = []

    @property
    def engine(self) -> Engine:
        """The engine.

        :raises RequestError: it was closed.
        """
        if self._engine is None:
            raise RequestError("this LLM is closed. Make a new one.")
        return self._engine

    def close(self) -> None:
        """Let go of the engine."""
        self._engine = None
        self.owners.clear()

    def new_id(self) -> str:
        """A request id that nobody uses."""
        while True:
            request_id = str(self._next_id)
            self._next_id += 1
            if request_id not in self.owners and not self.engine.is_unfinished(request_id):
                return request_id

    def step(self) -> None:
        """Run one step and hand out what it gave."""
        for request_id in self._left:
            self.engine.abort(request_id)
        self._left.clear()
        try:
            chunks = self.engine.step()
        except LogitsProcessorError as error:
            owner = self.owners.get(error.request_id)
            if owner is None:
                raise
            owner.put(error)
            return
        for chunk in chunks:
            owner = self.owners.get(chunk.request_id)
            if owner is not None:  # else submitted to the engine itself
                owner.put(chunk)

    def leave(self, request_ids: Iterable[str]) -> None:
        """Abort requests; within a step, right after it (a collected stream may call then)."""
        for request_id in request_ids:
            self.owners.pop(request_id, None)
            if self._engine is None:
                continue
            if self._engine.stepping:
                self._left.append(request_id)
            else:
                self._engine.abort(request_id)


class Inbox:
    """One caller's requests, and what has come for them but was not taken yet."""

    def __init__(self, office: PostOffice) -> None:
        self._office = office
        self._items: deque[StreamChunk | LogitsProcessorError] = deque()
        self.unfinished: dict[str, None] = {}  # in order; until the last chunk is taken
        self._drops_seen = office.engine.drops

    def add(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        prompt: str | None = None,
        *,
        request_id: str | None = None,
        score_from: int = 1,
    ) -> str:
        """Queue a request; its id.

        :raises RequestError: it can never be served, or its id is in use; nothing was queued.
        """
        office = self._office
        engine = office.engine
        if request_id is None:
            request_id = office.new_id()
        elif request_id in office.owners or engine.is_unfinished(request_id):
            raise RequestError(
                f"request id {request_id!r} is in use. Pass another, or abort that request first."
            )
        self.unfinished[request_id] = None
        office.owners[request_id] = self
        try:
            engine.add_request(request_id, prompt_token_ids, params, prompt, score_from=score_from)
        except BaseException:
            self.unfinished.pop(request_id)
            office.leave([request_id])
            raise
        return request_id

    def put(self, item: StreamChunk | LogitsProcessorError) -> None:
        """Keep what has come until it is taken."""
        self._items.append(item)

    def take(self) -> StreamChunk | None:
        """What came first; None where nothing waits.

        :raises LogitsProcessorError: a request's own processor failed, which ended it.
        """
        if not self._items:
            return None
        item = self._items.popleft()
        if isinstance(item, LogitsProcessorError):
            self._forget(item.request_id)
            raise item
        if item.output is not None:
            self._forget(item.request_id)
        return item

    @property
    def has_items(self) -> bool:
        """Whether ``take`` would give or raise something."""
        return bool(self._items)

    def take_all(self) -> list[StreamChunk]:
        """All that waits, up to the first error; an error that comes first is raised."""
        chunks: list[StreamChunk] = []
        while self._items and not (chunks and isinstance(self._items[0], LogitsProcessorError)):
            chunk = self.take()
            if chunk is not None:
                chunks.append(chunk)
        return chunks

    def step(self) -> None:
        """Run one step, unless requests of this inbox were dropped.

        :raises EngineError: they were: an earlier step was interrupted where its state could not
            be saved.
        """
        dropped = [] if self._items else self._dropped()
        if dropped:
            for request_id in dropped:
                self._forget(request_id)
            raise EngineError(
                f"requests {', '.join(dropped)} were dropped: a step was interrupted while it was "
                "recorded, or somebody else aborted them. Submit them again."
            )
        self._office.step()

    def _dropped(self) -> list[str]:
        """Requests that the engine no longer has; looked for only where it has dropped any."""
        engine = self._office.engine
        if engine.drops == self._drops_seen:
            return []
        self._drops_seen = engine.drops
        return [r for r in self.unfinished if not engine.is_unfinished(r)]

    def abort(self, request_id: str) -> bool:
        """End a request and drop what waits for it; False where it is unknown or finished."""
        if request_id not in self.unfinished or not self._office.engine.is_unfinished(request_id):
            return False
        self._items = deque(item for item in self._items if item.request_id != request_id)
        del self.unfinished[request_id]
        self._office.leave([request_id])
        return True

    def close(self) -> None:
        """Abort what is unfinished."""
        left = list(self.unfinished)
        self.unfinished.clear()
        self._items.clear()
        self._office.leave(left)

    def check_open(self) -> None:
        """Check that the engine is there.

        :raises RequestError: it was closed.
        """
        _ = self._office.engine

    def _forget(self, request_id: str) -> None:
        self.unfinished.pop(request_id, None)
        self._office.owners.pop(request_id, None)


class Stream(Iterator[StreamChunk]):
    """The chunks of one call as they come; each ``next`` runs as many steps as it needs.

    Closing it, leaving its loop, or an error aborts what is left.
    """

    def __init__(self, inbox: Inbox, names: Mapping[str, str]) -> None:
        self._inbox = inbox
        self._names = names

    @property
    def ids(self) -> list[str]:
        """The ids of the requests, in the order of the prompts."""
        return list(self._names.values())

    def __next__(self) -> StreamChunk:
        inbox = self._inbox
        try:
            if not inbox.unfinished:
                raise StopIteration
            inbox.check_open()
            while (chunk := inbox.take()) is None:
                inbox.step()
        except BaseException:
            self.close()
            raise
        name = self._names[chunk.request_id]
        output = chunk.output and replace(chunk.output, request_id=name)
        return replace(chunk, request_id=name, output=output)

    def close(self) -> None:
        """Abort what is left."""
        self._inbox.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
