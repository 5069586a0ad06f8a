"""Decides what each step computes: continuous batching, chunked prefill, preemption.

Nothing here touches a tensor, and nothing decided here can change a request's bits: it chooses
only which tokens are computed when, and the contracts of kernels and backends do the rest. Where
a backend's promise is weaker, so is what the scheduler does: cuts fall on ``alignment``, and
outputs that decoding computed are recomputed by decoding.

Steps may be scheduled ahead of results (``steps_ahead``): a sampled token then counts as *pending*
until its step is complete. That a request has stopped is found out when it already has a row in
the next step, which counts for nothing.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Sequence
from heapq import heappop, heappush

from ..cache.pages import PagePool
from ..cache.radix import RadixCache
from ..errors import EngineError, RequestError
from ..sampling.stopping import FinishReason
from .admission import SchedulerConfig, check_admissible, check_budget
from .paging import Paging
from .request import Request, RequestStatus
from .stats import SchedulerStats
from .step import ScheduledSeq, Step

__all__ = ["ScheduledSeq", "Scheduler", "SchedulerConfig", "SchedulerStats", "Step"]


class Scheduler:
    """Running and waiting requests, first come first served.

    Call ``schedule``, compute the step, call ``complete``, then ``finish`` what has ended, and so
    on in turn, or with ``steps_ahead`` further calls of ``schedule`` before each ``complete``; a
    request that only scores ends with its prompt. ``abort`` and ``preempt`` may come at any time: a
    step's token for a request that no longer runs, or runs anew, is dropped.
    """

    def __init__(
        self, config: SchedulerConfig, pool: PagePool, cache: RadixCache | None = None
    ) -> None:
        self.config = config
        self.pool = pool
        self.cache = cache
        self.stats = SchedulerStats()
        self.running: list[Request] = []  # in order of arrival
        self._paging = Paging(pool, cache)
        self._requests: dict[str, Request] = {}  # waiting and running
        # A heap by arrival, as preempted requests come back. Aborted ones stay in it until they
        # reach its head, so that an abort need not search.
        self._waiting: list[tuple[int, Request]] = []
        self._arrivals = 0
        self._under_way: deque[Step] = deque()  # scheduled, not complete; oldest first

    @property
    def num_running(self) -> int:
        return len(self.running)

    @property
    def num_waiting(self) -> int:
        return len(self._requests) - len(self.running)

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests)

    def add(self, request: Request) -> None:
        """Queue a new request.

        :raises RequestError: it could never be served, or its id is in use; nothing was queued.
        """
        if request.request_id in self._requests:
            raise RequestError(
                f"request id {request.request_id!r} is in use. Pass another, or abort that one."
            )
        check_admissible(request, self.config, self.pool)
        request.arrival = self._arrivals
        self._arrivals += 1
        self._requests[request.request_id] = request
        heappush(self._waiting, (request.arrival, request))

    def schedule(self, token_budget: int | None = None) -> Step:
        """Choose what to compute next.

        Running requests come first, oldest first: each decode gets its token, then prefills
        share what is left. Waiting ones are admitted in order of arrival while seats, tokens and
        pages last; none overtakes another. A step may be empty under a ``token_budget``, or while
        others are under way.

        :param token_budget: tokens in this step at most, instead of ``max_num_batched_tokens``.
        :raises ConfigError: a wrong ``token_budget``; nothing was begun.
        :raises EngineError: too many steps are not complete.
        """
        if len(self._under_way) > self.config.steps_ahead:
            raise EngineError(
                f"schedule() was called before complete(): {len(self._under_way)} steps are under "
                f"way, and steps_ahead is {self.config.steps_ahead}"
            )
        budget = self.config.max_num_batched_tokens if token_budget is None else token_budget
        check_budget(budget)
        step = Step()
        # A cut prefill lets nobody in: their decoding would eat the budget of its next chunks.
        if self._schedule_running(step, budget):
            self._admit(step, budget)
        step.seqs.sort(key=lambda seq: not seq.is_decode)  # stable: arrival within each kind
        self.stats.steps += 1
        self.stats.tokens_scheduled += step.num_tokens
        if step.seqs:
            self._under_way.append(step)
        return step

    def complete(self, step: Step, sampled: Sequence[int]) -> list[bool]:
        """Record that ``step`` was computed; for each of its sequences, whether it still counts.

        :param sampled: one token for each of the step's sequences with ``samples``, in order.
        :raises EngineError: it is not the oldest step under way, or the number of tokens is wrong.
        """
        if not self._under_way or self._under_way[0] is not step:
            raise EngineError("complete() was called with another step than the oldest under way")
        if len(sampled) != sum(seq.samples for seq in step.seqs):
            raise EngineError(f"{len(sampled)} tokens do not fit the step's sampling sequences")
        self._under_way.popleft()
        tokens = iter(sampled)
        counts = [seq.counts for seq in step.seqs]  # False: ended or preempted meanwhile
        for seq, still in zip(step.seqs, counts, strict=True):
            token = next(tokens) if seq.samples else None
            if not still:
                continue
            request = seq.request
            request.num_computed_tokens = seq.stop
            request.num_scored_tokens = max(request.num_scored_tokens, seq.stop)
            if not seq.is_decode:
                self._paging.share(request)
            if token is not None:
                request.num_pending_tokens -= 1
                request.output_token_ids.append(token)
        return counts

    def cancel(self) -> None:
        """Forget the steps under way: their requests wait, in order, to be recomputed.

        Whatever the steps wrote lies in pages that nobody counts as computed. A step may have been
        interrupted while it counted tokens for penalties, so they are counted anew.
        """
        for step in self._under_way:
            for seq in step.seqs:
                if seq.counts:
                    self.preempt(seq.request)
                    seq.request.recount()
        self._under_way.clear()

    def reset(self) -> None:
        """Drop every request, page and cached prefix: for when the state cannot be trusted."""
        self.pool = PagePool(self.pool.num_pages, self.pool.page_size)
        if self.cache is not None:
            counts = self.cache.stats
            self.cache = RadixCache(self.pool, self.cache.policy)
            self.cache.stats = counts
        self._paging = Paging(self.pool, self.cache)
        self._requests = {}
        self._waiting = []
        self.running = []
        self._under_way.clear()

    def finish(
        self, request: Request, reason: FinishReason, stop_reason: int | str | None = None
    ) -> None:
        """End an unfinished request and free its pages."""
        if request.finished:
            raise EngineError(f"{request.request_id} was finished twice")
        if request.running:
            self.running.remove(request)
            self._paging.release(request)
        del self._requests[request.request_id]
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        request.stop_reason = stop_reason
        self.stats.finished += 1

    def abort(self, request_id: str) -> bool:
        """End a request wherever it stands; False where it is unknown or finished."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        self.finish(request, FinishReason.ABORT)
        return True

    def preempt(self, request: Request) -> None:
        """Take a running request's pages; it waits, in its order, to be recomputed."""
        if not request.running:
            raise EngineError(f"{request.request_id} was preempted, but does not run")
        self.running.remove(request)
        self._paging.release(request)
        request.status = RequestStatus.WAITING
        request.num_preemptions += 1
        self.stats.preemptions += 1
        heappush(self._waiting, (request.arrival, request))

    def check_integrity(self) -> None:
        """Check the ownership of every page and the state of every request.

        :raises EngineError: something is inconsistent.
        """
        arrivals = [request.arrival for request in self.running]
        if arrivals != sorted(set(arrivals)) or len(self.running) > self.config.max_num_seqs:
            raise EngineError("the running requests are out of order, or too many")
        for request in self._requests.values():
            waiting = request.status is RequestStatus.WAITING
            if waiting == (request in self.running) or request.finished:
                raise EngineError(f"{request.request_id} is {request.status.value}, but not so")
            if waiting and (request.page_ids or request.lock or request.num_computed_tokens):
                raise EngineError(f"{request.request_id} waits, but holds pages")
        self._paging.check_integrity(self.running)

    def _schedule_running(self, step: Step, budget: int) -> bool:
        """Serve the running requests, oldest first; whether none was cut, preempted or left out.

        Where pages run out, the youngest goes: never one that this step already serves, as those
        are older. At most one prefill is under way, as a cut one lets nobody in.
        """
        wanting = [
            request for request in self.running if not request.is_through(self.config.max_model_len)
        ]
        decodes = sum(request.decoding for request in wanting)
        all_served = True
        for request in wanting:
            if not request.running:
                return False  # preempted for an older one, as all after it
            start = request.num_scheduled_tokens
            left = budget - (step.num_tokens if request.decoding else decodes)
            num_tokens = self._chunk(request, start, left)
            if num_tokens:
                if not self._make_room(request, start + num_tokens, step):
                    return False
                self._append(step, request, num_tokens)
            all_served &= request.decoding or start + num_tokens == request.prefill_end
        return all_served

    def _make_room(self, request: Request, num_tokens: int, step: Step) -> bool:
        """Grow a request's pages, preempting the youngest; False where it was itself that.

        Nobody is preempted where a request is through: it gives its pages back when it is read.
        """
        longest = self.config.max_model_len
        while not self._paging.grow(request, num_tokens):
            if any(other.is_through(longest) for other in self.running):
                return False
            if len(self.running) == 1:
                raise EngineError(f"{request.request_id} runs alone and cannot get a page")
            victim = self.running[-1]
            self.preempt(victim)
            step.preempted.append(victim)
            if victim is request:
                return False
        return True

    def _admit(self, step: Step, budget: int) -> None:
        while len(self.running) < self.config.max_num_seqs and step.num_tokens < budget:
            request = self._head()
            if request is None:
                return
            request.prefill_end = self._prefill_end(request)
            match = self._paging.match(request)
            start = match.num_tokens if match else 0
            num_tokens = self._chunk(request, start, budget - step.num_tokens)
            if not num_tokens:
                return
            # One page left for each running request, or the next decodes would preempt it again.
            if not self._paging.admit(request, match, reserve=len(self.running)):
                if not self.running:
                    raise EngineError(f"{request.request_id} cannot have the pages it needs alone")
                return
            heappop(self._waiting)
            request.status = RequestStatus.RUNNING
            insort(self.running, request, key=lambda running: running.arrival)
            self.stats.admissions += 1
            self._append(step, request, num_tokens)
            if start + num_tokens < request.prefill_end:
                return

    def _head(self) -> Request | None:
        """The waiting request that came first."""
        while self._waiting and self._waiting[0][1].finished:
            heappop(self._waiting)
        return self._waiting[0][1] if self._waiting else None

    def _prefill_end(self, request: Request) -> int:
        """How many of a request's known tokens prefill may compute, now that it is admitted.

        The outputs of a preempted request are decoded again, token by token, where a prefill
        would give other bits, or would not fit the one chunk that it must be.
        """
        one_chunk = request.num_tokens <= self.config.max_num_batched_tokens
        if self.config.decode_equals_prefill and (self.config.chunked_prefill or one_chunk):
            return request.num_tokens
        return request.num_prompt_tokens

    def _chunk(self, request: Request, start: int, budget: int) -> int:
        """How many tokens from ``start`` on may be computed in one step; 0 if it must wait."""
        if budget < 1:
            return 0
        left = request.prefill_end - start
        if left <= 0:
            return 1
        if left <= budget:
            return left
        if not self.config.chunked_prefill:
            return 0
        stop = start + budget
        return max(0, stop - stop % self.config.alignment - start)

    def _append(self, step: Step, request: Request, num_tokens: int) -> None:
        start = request.num_scheduled_tokens
        last = start + num_tokens == request.num_tokens
        samples = last and not request.params.scores_only
        step.seqs.append(
            ScheduledSeq(
                request, start, num_tokens, request.decoding, samples, request.num_preemptions
            )
        )
        step.num_tokens += num_tokens
        request.num_scheduled_tokens += num_tokens
        request.num_pending_tokens += samples
