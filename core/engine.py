"""The engine: requests in, one step at a time, chunks of text and tokens out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..errors import ConfigError, EngineError, LogitsProcessorError, RequestError
from ..sampling.detokenizer import Detokenizer
from ..sampling.params import SamplingParams
from ..sampling.sampler import SampledRow
from ..sampling.stopping import Finish, FinishReason
from .outputs import RequestOutput, StreamChunk
from .progress import Choice, Group
from .request import Request
from .runner import Runner, SeqResult
from .scheduler import Scheduler
from .stats import Stats
from .step import Step


class Engine:
    """Drives scheduler and runner; knows which choices belong to which request.

    A step is ``schedule`` (host), ``execute`` (device), ``record`` (host). One that raises in
    ``execute``, be it Ctrl-C, is forgotten: its requests are computed again, with the same bits.
    One that raises elsewhere leaves a state that nobody can trust: every request is dropped. The
    engine can be used again either way.

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
        if request_id in self._groups:
            raise RequestError(
                f"request id {request_id!r} is in use. Pass another, or abort that request first."
            )
        self._check(prompt_token_ids, params)
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

        :param token_budget: tokens in this step at most, instead of ``max_num_batched_tokens``.
        :raises LogitsProcessorError: a request's own processor failed; that request has ended.
        :raises BackendError: the backend raised; every request goes on with the next step.
        :raises EngineError: called within a step, or from a second thread.
        """
        if self.stepping:
            raise EngineError(
                "step() was called while a step runs: within a logits processor, or from a second "
                "thread. Use one thread, or AsyncLLM."
            )
        self.stepping = True
        step: Step | None = None
        results: list[SeqResult] | None = None
        try:
            step = self.scheduler.schedule(token_budget)
            results = self.runner.execute(step) if step.seqs else []
            return self._record(step, results)
        except BaseException as error:
            self._recover(step, results, error)
            raise
        finally:
            self.stepping = False

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
        return bool(self._groups)

    def is_unfinished(self, request_id: str) -> bool:
        """Whether a request is on its way; False where it is unknown."""
        return request_id in self._groups

    def unfinished_ids(self) -> list[str]:
        """Ids of the requests on their way, oldest first."""
        return list(self._groups)

    def _check(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        vocab = self.vocab_size
        for index, token in enumerate(prompt_token_ids):
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab:
                raise RequestError(
                    f"prompt token {index} was {token!r}; wanted a token id from 0 to {vocab - 1}."
                )
        params.check_vocabulary(vocab, self.runner.eos_token_ids)
        if params.stop_strings and self.tokenizer is None:
            raise RequestError(
                "stop strings need a tokenizer and this model has none. Use stop_token_ids."
            )

    def _submit(self, group: Group) -> None:
        try:
            for choice in group.choices:
                self.scheduler.add(choice.request)
        except BaseException:
            for choice in group.choices:
                self.scheduler.abort(choice.request.request_id)
            raise
        self._groups[group.request_id] = group

    def _record(self, step: Step, results: list[SeqResult]) -> list[StreamChunk]:
        tokens = [result.sampled.token_id for result in results if result.sampled is not None]
        self.scheduler.complete(step, tokens)
        chunks: list[StreamChunk] = []
        for seq, result in zip(step.seqs, results, strict=True):
            group = self._groups.get(seq.request.group_id)
            if group is None:  # aborted meanwhile
                continue
            choice = group.choices[seq.request.choice]
            group.prompt_rows.update(result.prompt_rows)
            if result.sampled is not None:
                chunks.append(self._advance(group, choice, result.sampled))
            elif seq.start + seq.num_tokens == seq.request.num_tokens:
                chunks.append(self._chunk(group, choice, (), "", Finish(FinishReason.LENGTH)))
        return chunks

    def _recover(
        self, step: Step | None, results: list[SeqResult] | None, error: BaseException
    ) -> None:
        """Make the engine usable after an error in ``step``, or in choosing it (None)."""
        if step is None and isinstance(error, ConfigError):
            return  # a wrong token_budget: nothing was begun
        if step is None or results is not None:
            self._groups.clear()
            self.drops += 1
            self.scheduler.reset()
            return
        self.scheduler.cancel(step)
        if isinstance(error, LogitsProcessorError):
            self.abort(error.request_id)

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
