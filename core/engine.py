"""The engine: requests in, one step at a time, chunks of text and tokens out.

With ``steps_ahead`` the host does not wait for a step before it launches the next: a call of
``step`` launches one and records the one before it, whose results are there by then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ..errors import EngineError, LogitsProcessorError, RequestError
from ..sampling.detokenizer import Detokenizer
from ..sampling.params import SamplingParams
from ..sampling.rows import needs_tokens
from ..sampling.sampler import SampledRow
from ..sampling.stopping import Finish, FinishReason
from ..sampling.token_counts import TokenCounts, has_penalties
from .admission import check_budget, check_prompt
from .launched import Launched, SeqResult
from .outputs import RequestOutput, StreamChunk
from .progress import Choice, Group
from .request import Request
from .runner import Runner
from .scheduler import Scheduler
from .stats import Stats
from .step import Step


class Engine:
    """Drives scheduler and runner; knows which choices belong to which request.

    A step is scheduled (host), launched (device), read (the host waits) and recorded (host). Where
    launching or reading raises, be it Ctrl-C, the steps under way are forgotten: their requests
    are computed again, with the same bits. An error elsewhere leaves a state that nobody can trust:
    every request is dropped. The engine can be used again either way.

    One thread at a time: ``AsyncLLM`` gives a whole service one engine.
    """

    def __init__(
        self, runner: Runner, scheduler: Scheduler, tokenizer: Any | None, fingerprint: str
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint
        self.stepping = False
        self.drops = 0  # how often requests went without being finished
        self._groups: dict[str, Group] = {}
        self._under_way: deque[Launched] = deque()  # oldest first
        self._ready: list[StreamChunk] = []  # recorded; given out when nothing can interrupt
        self._changing = False  # whether the scheduler's state is in the middle of a change

    @property
    def vocab_size(self) -> int:
        return self.runner.decoder.config.vocab_size

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        prompt: str | None = None,
        *,
        score_from: int = 1,
    ) -> None:
        """Queue a request.

        :param score_from: with ``prompt_logprobs``, the first prompt position to score; what comes
            before it may be taken from the prefix cache.
        :raises RequestError: it can never be served; nothing was queued.
        """
        if not isinstance(request_id, str):
            raise RequestError(f"request id {request_id!r} was given; wanted a string. Pass one.")
        if self.is_unfinished(request_id):
            raise RequestError(
                f"request id {request_id!r} is in use. Pass another, or abort that request first."
            )
        check_prompt(prompt_token_ids, self.vocab_size)
        params.check_vocabulary(self.vocab_size, self.runner.eos_token_ids)
        if params.stop_strings and self.tokenizer is None:
            raise RequestError(
                "stop strings need a tokenizer and this model has none. Use stop_token_ids."
            )
        if not 1 <= score_from <= max(1, len(prompt_token_ids)):
            raise RequestError(
                f"score_from was {score_from}; wanted 1 to the prompt's {len(prompt_token_ids)}."
            )
        limit = self.scheduler.config.max_model_len - len(prompt_token_ids)
        if params.max_tokens is None:
            params = replace(
                params, max_tokens=max(1, limit), min_tokens=min(params.min_tokens, max(1, limit))
            )
        group = Group(request_id, prompt, list(prompt_token_ids), params, score_from)
        for index in range(params.n):
            own = params if index == 0 else replace(params, prompt_logprobs=None)
            request = Request(
                request_id=f"{request_id}#{index}",
                prompt_token_ids=group.prompt_token_ids,
                params=own,
                choice=index,
                num_scored_tokens=score_from - 1,
                token_counts=TokenCounts(own, prompt_token_ids) if has_penalties(own) else None,
            )
            detokenizer = Detokenizer(self.tokenizer, own, group.prompt_token_ids)
            group.choices.append(Choice(request, detokenizer))
        self._submit(group)

    def abort(self, request_id: str) -> bool:
        """End a request now and free its pages; False where it is unknown or finished."""
        group = self._groups.pop(request_id, None)
        if group is None:
            return False
        self.drops += 1
        for choice in group.choices:
            self.scheduler.abort(choice.request.request_id)
        return True

    def step(self, token_budget: int | None = None) -> list[StreamChunk]:
        """Run one step; the chunks of every choice that got a token or only scored its prompt.

        With ``steps_ahead`` they are those of an earlier step, and there may be none.

        :param token_budget: tokens in this step at most, instead of ``max_num_batched_tokens``.
        :raises LogitsProcessorError: a request's own processor failed; that request has ended.
        :raises BackendError: the backend raised; every request goes on with the next step.
        :raises EngineError: called within a step, or from a second thread; or the model gave no
            usable logits.
        """
        if self.stepping:
            raise EngineError(
                "step() was called while a step runs: within a logits processor, or from a second "
                "thread. Use one thread, or AsyncLLM."
            )
        if token_budget is not None:
            check_budget(token_budget)
        self.stepping = True
        try:
            self._step(token_budget)
        except BaseException as error:
            self._recover(error)
            raise
        finally:
            self.stepping = False
        chunks, self._ready = self._ready, []
        return chunks

    def preempt(self, request_id: str) -> int:
        """Evict a request's running choices, to be recomputed; how many there were."""
        group = self._groups.get(request_id)
        running = [c.request for c in group.choices if c.request.running] if group else []
        for request in running:
            self.scheduler.preempt(request)
        return len(running)

    def flush_cache(self) -> int:
        """Empty the prefix cache of all that no request uses; pages freed."""
        cache = self.scheduler.cache
        return 0 if cache is None else cache.flush()

    def stats(self) -> Stats:
        """Counts of now and since start."""
        scheduler, cache = self.scheduler, self.scheduler.cache
        return Stats(
            running=scheduler.num_running,
            waiting=scheduler.num_waiting,
            unfinished=len(self._groups),
            pages_total=scheduler.pool.num_pages,
            pages_free=scheduler.pool.num_free,
            pages_cached=cache.num_pages if cache else 0,
            page_size=scheduler.pool.page_size,
            cache_lookups=cache.stats.lookups if cache else 0,
            cache_hits=cache.stats.hits if cache else 0,
            cache_tokens=cache.stats.tokens_matched if cache else 0,
            preemptions=scheduler.stats.preemptions,
            finished=scheduler.stats.finished,
            steps=scheduler.stats.steps,
            tokens=scheduler.stats.tokens_scheduled,
        )

    def has_unfinished(self) -> bool:
        return bool(self._groups or self._ready)

    def is_unfinished(self, request_id: str) -> bool:
        """Whether a request is on its way; False where it is unknown."""
        ready = any(chunk.request_id == request_id for chunk in self._ready)
        return ready or request_id in self._groups

    def unfinished_ids(self) -> list[str]:
        """Ids of the requests on their way, oldest first."""
        return list(self._groups)

    def _submit(self, group: Group) -> None:
        try:
            for choice in group.choices:
                self.scheduler.add(choice.request)
        except BaseException:
            for choice in group.choices:
                self.scheduler.abort(choice.request.request_id)
            raise
        self._groups[group.request_id] = group

    def _step(self, token_budget: int | None) -> None:
        if self._under_way and self._wants_tokens():
            self._collect()
            return
        with self._change():
            step = self.scheduler.schedule(token_budget)
        if step.seqs:
            self._under_way.append(self.runner.launch(step))
        while len(self._under_way) > (self.scheduler.config.steps_ahead if step.seqs else 0):
            self._collect()

    def _wants_tokens(self) -> bool:
        """Whether a running request's next token depends on what only the host can compute."""
        return any(needs_tokens(request.params) for request in self.scheduler.running)

    def _collect(self) -> None:
        """Wait for the oldest step under way and record it."""
        launched = self._under_way[0]
        results = self.runner.read(launched)
        with self._change():
            self._under_way.popleft()
            self._ready += self._record(launched.step, results)
        if not self._groups:  # what is left under way is for nobody
            self._forget()

    def _record(self, step: Step, results: list[SeqResult]) -> list[StreamChunk]:
        tokens = [result.sampled.token_id for result in results if result.sampled is not None]
        counts = self.scheduler.complete(step, tokens)
        chunks: list[StreamChunk] = []
        for seq, result, still in zip(step.seqs, results, counts, strict=True):
            if not still:
                continue
            request = seq.request
            group = self._groups[request.group_id]
            choice = group.choices[request.choice]
            group.prompt_rows.update(result.prompt_rows)
            if result.sampled is not None:
                chunks.append(self._advance(group, choice, result.sampled))
            elif seq.stop == request.num_tokens:
                chunks.append(self._chunk(group, choice, (), "", Finish(FinishReason.LENGTH)))
        return chunks

    @contextmanager
    def _change(self) -> Iterator[None]:
        """What raises in here leaves the scheduler's state half changed."""
        self._changing = True
        yield
        self._changing = False

    def _recover(self, error: BaseException) -> None:
        """Make the engine usable after an error in ``step``."""
        if self._changing:
            finished = {chunk.request_id for chunk in self._ready if chunk.output is not None}
            self._ready = [chunk for chunk in self._ready if chunk.request_id in finished]
            self._groups.clear()
            self.drops += 1
            self.scheduler.reset()
            self._under_way.clear()
            self._changing = False
        else:
            self._forget()
        if isinstance(error, LogitsProcessorError):
            self.abort(error.request_id)

    def _forget(self) -> None:
        """Give up the steps under way."""
        self._under_way.clear()
        self.scheduler.cancel()

    def _advance(self, group: Group, choice: Choice, sampled: SampledRow) -> StreamChunk:
        """Take a sampled token into its choice: text, logprobs, and whether it ends."""
        limit = self.scheduler.config.max_model_len
        text, finish = choice.append(sampled, self.runner.eos_token_ids, limit)
        return self._chunk(group, choice, (sampled.token_id,), text, finish)

    def _chunk(
        self,
        group: Group,
        choice: Choice,
        token_ids: tuple[int, ...],
        text: str,
        finish: Finish | None,
    ) -> StreamChunk:
        request = choice.request
        output: RequestOutput | None = None
        if finish is not None:
            self.scheduler.finish(request, finish.reason, finish.stop_reason)
            if group.finished:
                del self._groups[group.request_id]
                output = group.output(self.fingerprint, self.tokenizer)
        return StreamChunk(
            request_id=group.request_id,
            index=request.choice,
            text=text,
            token_ids=token_ids,
            logprobs=choice.logprobs(len(token_ids), self.tokenizer),
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            output=output,
        )
