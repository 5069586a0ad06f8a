"""A scheduler driven by a fake model whose bits show every broken promise.

The fake KV cache holds one integer a slot: a hash of the slot's token, of the KV before it, and of
how it was computed, as far as the fake backend's bits depend on that. A step reads every earlier
slot of its sequences through the block table and compares it with the request's own run alone, so
a stale, shared or misplaced page is seen at once, and so is any bit that comes from another pass.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest

from isobit.cache.pages import PagePool
from isobit.cache.radix import RadixCache
from isobit.cache.reuse import ReusePolicy, reuse_policy
from isobit.core.request import Request
from isobit.core.scheduler import ScheduledSeq, Scheduler, SchedulerConfig, Step
from isobit.sampling.params import SamplingParams
from isobit.sampling.stopping import FinishReason

EOS = 0


class WrongBitsError(Exception):
    """A slot, an output or a step is not what the request alone would have."""


@dataclass(frozen=True)
class FakeBackend:
    """What a backend promises; its bits depend on everything else."""

    chunk_invariant: bool = True
    alignment: int = 1
    decode_equals_prefill: bool = True

    @property
    def policy(self) -> ReusePolicy:
        return reuse_policy(
            deterministic=True,
            chunk_invariant=self.chunk_invariant,
            alignment=self.alignment,
            decode_equals_prefill=self.decode_equals_prefill,
        )

    def kv(self, before: int, token: int, chunk_start: int, is_decode: bool) -> int:
        decoded = is_decode and not self.decode_equals_prefill
        if is_decode:
            chunk_start = 0
        cut = chunk_start % self.alignment if self.chunk_invariant else chunk_start
        return hash((before, token, cut, decoded))

    def alone(self, prompt: Sequence[int], max_tokens: int) -> tuple[list[int], list[int]]:
        """Outputs, and the KV of every position, of a prompt run alone without a cache."""
        kv: list[int] = []
        for token in prompt:
            kv.append(self.kv(kv[-1] if kv else 0, token, 0, False))
        outputs = [next_token(kv[-1])]
        while outputs[-1] != EOS and len(outputs) < max_tokens:
            kv.append(self.kv(kv[-1], outputs[-1], 0, True))
            outputs.append(next_token(kv[-1]))
        return outputs, kv


def next_token(kv: int) -> int:
    """Few tokens, so that outputs meet other prompts; one in about ten ends the output."""
    return EOS if kv % 11 == 0 else 1 + kv % 2


@dataclass
class Simulation:
    """A scheduler, its pages, and the KV that the fake model left in them."""

    backend: FakeBackend = field(default_factory=FakeBackend)
    num_pages: int = 64
    page_size: int = 4
    radix: bool = True
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 64
    max_model_len: int = 256
    chunked_prefill: bool | None = None
    scheduler_class: type[Scheduler] = Scheduler
    cache_class: type[RadixCache] = RadixCache
    policy: ReusePolicy | None = None
    check_pages: bool = True
    steps_ahead: int = 0

    def __post_init__(self) -> None:
        pool = PagePool(self.num_pages, self.page_size)
        policy = self.policy or self.backend.policy
        self.cache = self.cache_class(pool, policy) if self.radix else None
        chunked = self.chunked_prefill
        self.scheduler = self.scheduler_class(
            SchedulerConfig(
                max_num_seqs=self.max_num_seqs,
                max_num_batched_tokens=self.max_num_batched_tokens,
                max_model_len=self.max_model_len,
                chunked_prefill=self.backend.chunk_invariant if chunked is None else chunked,
                alignment=self.backend.alignment,
                decode_equals_prefill=self.backend.decode_equals_prefill,
                steps_ahead=self.steps_ahead,
            ),
            pool,
            self.cache,
        )
        self.requests: list[Request] = []
        self.expected: dict[Request, tuple[list[int], list[int]]] = {}
        self.scored: dict[Request, set[int]] = {}
        self.admitted: list[Request] = []
        self._slots: dict[int, int] = {}
        self._under_way: deque[tuple[Step, list[int]]] = deque()
        self._last_token: dict[Request, int] = {}  # as only the device knows it at first

    def submit(
        self, prompt: list[int], max_tokens: int = 8, prompt_logprobs: int | None = None
    ) -> Request:
        params = SamplingParams(max_tokens=max_tokens, prompt_logprobs=prompt_logprobs)
        request = Request(f"r{len(self.requests)}", prompt, params)
        self.scheduler.add(request)
        self.requests.append(request)
        self.expected[request] = self.backend.alone(prompt, max_tokens)
        self.scored[request] = set()
        return request

    def submit_long(self, length: int, max_tokens: int = 12) -> Request:
        """Submit a prompt, new from its first token on, whose output uses up ``max_tokens``."""
        first = 1_000 * (1 + len(self.requests))
        while len(self.backend.alone(range(first, first + length), max_tokens)[0]) < max_tokens:
            first += 1
        return self.submit(list(range(first, first + length)), max_tokens)

    def step(
        self, budget: int | None = None, meanwhile: Callable[[Step], object] | None = None
    ) -> Step:
        """One step of scheduler and fake model; ends the requests that are through.

        With ``steps_ahead`` the results of a step are known that many steps later, or when nothing
        is left to schedule. ``meanwhile`` is called when the step is computed and not completed.
        """
        step = self.scheduler.schedule(budget)
        self._check_step(step, budget or self.max_num_batched_tokens)
        for seq in step.seqs:  # all reads before all writes, as on a device
            self._read(seq)
        sampled = [self._compute(seq) for seq in step.seqs]
        tokens = [token for token in sampled if token is not None]
        if step.seqs:
            self._under_way.append((step, tokens))
        if meanwhile:
            meanwhile(step)
        while len(self._under_way) > (self.steps_ahead if step.seqs else 0):
            self._complete(*self._under_way.popleft())
        if sum(not request.decoding for request in self.scheduler.running) > 1:
            raise WrongBitsError("several prefills are under way")
        if self.check_pages:
            self.scheduler.check_integrity()
        return step

    def _complete(self, step: Step, tokens: list[int]) -> None:
        counts = self.scheduler.complete(step, tokens)
        for seq, still in zip(step.seqs, counts, strict=True):
            if still and seq.samples:
                self._end(seq.request)

    def run(self, max_steps: int = 5_000) -> None:
        """Step to the end and check every output."""
        while self.scheduler.has_unfinished:
            max_steps -= 1
            waiting = bool(self._under_way)
            if not (self.step().seqs or waiting) or not max_steps:
                raise WrongBitsError("the scheduler makes no progress")
        for request in self.requests:
            if request.finish_reason is FinishReason.ABORT:
                continue
            if request.output_token_ids != self.expected[request][0]:
                raise WrongBitsError(f"{request.request_id} got other tokens than alone")
            wants = request.params.prompt_logprobs is not None
            if wants and not self.scored[request] >= set(range(request.num_prompt_tokens)):
                raise WrongBitsError(f"{request.request_id} has prompt tokens without logits")

    def _end(self, request: Request) -> None:
        if request.output_token_ids[-1] == EOS:
            self.scheduler.finish(request, FinishReason.STOP)
        elif len(request.output_token_ids) == request.params.max_tokens:
            self.scheduler.finish(request, FinishReason.LENGTH)

    def _slot(self, request: Request, position: int) -> int:
        page = request.page_ids[position // self.page_size]
        return page * self.page_size + position % self.page_size

    def _read(self, seq: ScheduledSeq) -> None:
        kv = self.expected[seq.request][1]
        for position in range(seq.start):
            if self._slots.get(self._slot(seq.request, position)) != kv[position]:
                raise WrongBitsError(f"{seq.request.request_id}: wrong KV at {position}")

    def _compute(self, seq: ScheduledSeq) -> int | None:
        request, stop = seq.request, seq.start + seq.num_tokens
        shared = request.lock.depth * self.page_size if request.lock else 0
        if seq.start < shared:
            raise WrongBitsError(f"{request.request_id} writes into a shared page")
        before = self._slots[self._slot(request, seq.start - 1)] if seq.start else 0
        tokens = request.token_slice(seq.start, stop)
        if seq.pending:
            tokens = [*tokens, self._last_token[request]]
        for position, token in enumerate(tokens, seq.start):
            before = self.backend.kv(before, token, seq.start, seq.is_decode)
            self._slots[self._slot(request, position)] = before
        self.scored[request].update(range(seq.start, stop))
        if not seq.samples:
            return None
        self._last_token[request] = next_token(before)
        return self._last_token[request]

    def _check_step(self, step: Step, budget: int) -> None:
        problems = {
            "over budget": step.num_tokens > budget,
            "wrong sum": step.num_tokens != sum(seq.num_tokens for seq in step.seqs),
            "too many": self.scheduler.num_running > self.max_num_seqs,
            "a sequence twice": len({seq.request for seq in step.seqs}) < len(step.seqs),
            "decodes not first": [s.is_decode for s in step.seqs]
            != sorted((s.is_decode for s in step.seqs), reverse=True),
        }
        for seq in step.seqs:
            request, stop = seq.request, seq.stop
            there = request.num_tokens - seq.samples  # but for what this very step samples
            cut = stop != request.prefill_end and stop % self.backend.alignment
            problems |= {
                "nothing to compute": seq.num_tokens < 1 or stop > there,
                "not contiguous": stop != request.num_scheduled_tokens,
                "a cut off the alignment": bool(cut) and not seq.is_decode,
                "a decode of several": seq.is_decode and seq.num_tokens != 1,
                "wrong sampling": seq.samples != (stop == there),
                "preempted and served": request in step.preempted,
            }
            if any(problems.values()):
                break
            if request not in self.admitted:
                self.admitted.append(request)
        for problem, found in problems.items():
            if found:
                raise WrongBitsError(f"{problem}: {step}")


def step_shape(step: Step) -> list[tuple[str, int, int, bool]]:
    """(request, start, tokens, samples) of each sequence."""
    return [(s.request.request_id, s.start, s.num_tokens, s.samples) for s in step.seqs]


@pytest.fixture(name="Simulation")
def simulation_class() -> type[Simulation]:
    return Simulation


@pytest.fixture(name="FakeBackend")
def fake_backend_class() -> type[FakeBackend]:
    return FakeBackend


@pytest.fixture
def wrong_bits() -> type[WrongBitsError]:
    return WrongBitsError


@pytest.fixture
def shape() -> Callable[[Step], list[tuple[str, int, int, bool]]]:
    return step_shape
