"""The engine: requests in, one step at a time, chunks of text and tokens out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..errors import RequestError
from ..sampling.detokenizer import Detokenizer
from ..sampling.params import SamplingParams
from ..sampling.sampler import SampledRow
from .outputs import RequestOutput, StreamChunk
from .progress import Choice, Group
from .request import Request
from .runner import Runner
from .scheduler import Scheduler


class Engine:
    """Drives scheduler and runner; knows which choices belong to which request.

    A step is ``schedule`` (host), ``execute`` (device), ``complete`` (host); nothing else touches
    the scheduler's state.
    """

    def __init__(
        self, runner: Runner, scheduler: Scheduler, tokenizer: Any | None, fingerprint: str
    ) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint
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
    ) -> None:
        """Queue a request.

        :raises RequestError: it can never be served; nothing was queued.
        """
        if not isinstance(request_id, str):
            raise RequestError(f"request id {request_id!r} was given; wanted a string. Pass one.")
        if request_id in self._groups:
            raise RequestError(
                f"request id {request_id!r} is in use. Pass another, or abort that request first."
            )
        self._check(prompt_token_ids, params)
        limit = self.scheduler.config.max_model_len - len(prompt_token_ids)
        if params.max_tokens is None:
            params = replace(
                params, max_tokens=max(1, limit), min_tokens=min(params.min_tokens, max(1, limit))
            )
        group = Group(request_id, prompt, list(prompt_token_ids), params)
        for index in range(params.n):
            own = params if index == 0 else replace(params, prompt_logprobs=None)
            request = Request(
                request_id=f"{request_id}#{index}",
                prompt_token_ids=group.prompt_token_ids,
                params=own,
                choice=index,
            )
            detokenizer = Detokenizer(self.tokenizer, own, group.prompt_token_ids)
            group.choices.append(Choice(request, detokenizer))
        self._submit(group)

    def abort(self, request_id: str) -> bool:
        """End a request now and free its pages; False where it is unknown or finished."""
        group = self._groups.pop(request_id, None)
        if group is None:
            return False
        for choice in group.choices:
            self.scheduler.abort(choice.request.request_id)
        return True

    def step(self, token_budget: int | None = None) -> list[StreamChunk]:
        """Run one step; the chunks of every choice that got a token.

        :param token_budget: tokens in this step at most, instead of ``max_num_batched_tokens``.
        """
        step = self.scheduler.schedule(token_budget)
        if not step.seqs:
            return []
        results = self.runner.execute(step)
        tokens = [result.sampled.token_id for result in results if result.sampled is not None]
        self.scheduler.complete(step, tokens)
        chunks: list[StreamChunk] = []
        for seq, result in zip(step.seqs, results, strict=True):
            group = self._groups[group_id(seq.request)]
            choice = group.choices[seq.request.choice]
            group.add_prompt_rows(seq.start + 1, result.prompt_rows)
            if result.sampled is not None:
                chunks.append(self._advance(group, choice, result.sampled))
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

    def has_unfinished(self) -> bool:
        return bool(self._groups)

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
        added: list[Request] = []
        try:
            for choice in group.choices:
                self.scheduler.add(choice.request)
                added.append(choice.request)
        except RequestError:
            for request in added:
                self.scheduler.abort(request.request_id)
            raise
        self._groups[group.request_id] = group

    def _advance(self, group: Group, choice: Choice, sampled: SampledRow) -> StreamChunk:
        """Take a sampled token into its choice: text, logprobs, and whether it ends."""
        request = choice.request
        limit = self.scheduler.config.max_model_len
        text, finish = choice.append(sampled, self.runner.eos_token_ids, limit)
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
            token_ids=(sampled.token_id,),
            logprobs=choice.last_logprobs(self.tokenizer),
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            output=output,
        )


def group_id(request: Request) -> str:
    """The id that the user gave: the engine adds ``#choice`` to it, also where n is 1."""
    return request.request_id.rpartition("#")[0]
