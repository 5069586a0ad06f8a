"""The proofs: for every invariance the runs that could break it.

Every run is compared, bit for bit, with each of its requests alone on a cold cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import mul
from random import Random
from typing import Any

from ..cache.reuse import Provenance
from ..core.engine import Engine
from ..core.outputs import RequestOutput
from .crowd import Peak, crowd, peak_of
from .drive import Budget, as_transcripts, drive, drive_alone
from .transcript import Transcript
from .workload import Case

Outputs = Sequence[RequestOutput]

_CUT_SMALL = 4002
"""Prompts of at most so many tokens are also cut into pieces of 33."""


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a proof, repeatable so that a difference can be traced to its op.

    ``execute`` runs ``cases``. ``read`` takes the transcripts to compare from its outputs; they
    must equal ``expected``, which ``references`` gave, each alone on a cold cache. ``exercised``
    says whether what the proof is about took place at all, and ``detail`` how much of it.
    """

    label: str
    cases: Sequence[Case]
    execute: Callable[[], Outputs]
    references: Sequence[Case]
    expected: Sequence[Transcript]
    read: Callable[[Outputs], list[Transcript]] = as_transcripts
    exercised: Callable[[Outputs], bool] = lambda outputs: True
    detail: Callable[[Outputs], str] = lambda outputs: ""


class Proofs:
    """The runs of every invariance, over one engine and one workload.

    :param requests: so many at once in one run of the batches, beside the usual ones.
    """

    def __init__(self, engine: Engine, cases: Sequence[Case], requests: int | None = None) -> None:
        self.engine = engine
        self.cases = list(cases)
        self.crowd = [] if requests is None else crowd(engine, self.cases, requests)
        alone = drive_alone(engine, self.cases)
        self.baseline = as_transcripts(alone)
        self.generated = [output.outputs[0].token_ids for output in alone]

    @property
    def _may_cut(self) -> bool:
        """Whether a prompt larger than a step's budget is cut; otherwise it would wait for ever."""
        return self.engine.scheduler.config.chunked_prefill

    def batch(self) -> Iterator[Run]:
        """All together; thrice over, so that the batch is large; and every second one."""
        everyone = list(range(len(self.cases)))
        yield self._run("all together", everyone)
        yield self._run("three of each", everyone * 3)
        yield self._run("every second one", everyone[::2])
        if self.crowd:
            yield self._at_once()

    def order(self) -> Iterator[Run]:
        """Submitted backwards; shuffled; and arriving one by one while others are decoding."""
        everyone = list(range(len(self.cases)))
        yield self._run("backwards", everyone, order=everyone[::-1])
        for gap in (2, 3):
            yield self._run(
                f"shuffled, one every {gap} steps",
                everyone,
                order=Random(gap).sample(everyone, len(everyone)),
                arrive=partial(mul, gap),
            )

    def chunk(self) -> Iterator[Run]:
        """Prefills cut at small, odd and random places, mixed with decoding.

        Prompts beyond ``_CUT_SMALL`` tokens would take minutes in such pieces: they are cut larger.
        """
        most = self.engine.scheduler.config.max_num_batched_tokens
        everyone = list(range(len(self.cases)))
        small = [i for i in everyone if len(self.cases[i].prompt_token_ids) <= _CUT_SMALL]
        for size in sorted({min(33, most), min(100, most)}):
            yield self._run(f"chunks of {size}", small, budget=_always(size))
        yield self._run(
            "random chunks",
            small,
            budget=lambda step: min(most, Random(step).choice((17, 64, 250, 301))),
        )
        if small != everyone:
            for size in sorted({min(256, most), min(1000, most)}):
                yield self._run(f"chunks of {size}", everyone, budget=_always(size))

    def cache(self) -> Iterator[Run]:
        """Warm; half evicted; and a conversation whose prefix was written by decoding."""
        yield self._after_warming("warm", self.cases, self.baseline, evict=False)
        yield self._after_warming("half evicted", self.cases, self.baseline, evict=True)
        turns = [
            replace(case, prompt_token_ids=(*case.prompt_token_ids, *tokens, 1, 2, 3))
            for case, tokens in zip(self.cases, self.generated, strict=True)
        ]
        expected = as_transcripts(drive_alone(self.engine, turns))
        run = self._after_warming("written by decoding", turns, expected, evict=False)
        exercised, detail = self._decoded_prefix_hit()
        yield replace(run, exercised=exercised, detail=detail)

    def preempt(self) -> Iterator[Run]:
        """Requests evicted in the middle of prefill and of decoding, then recomputed.

        The evictions are counted, as one that comes before a request has made up for the last
        would keep it from ever ending.
        """
        most = self.engine.scheduler.config.max_num_batched_tokens
        for every in (3, 5):
            evicted = [0]

            def hook(
                engine: Engine, step: int, every: int = every, evicted: list[int] = evicted
            ) -> None:
                ids = engine.unfinished_ids()
                if ids and step % every == every - 1 and evicted[0] < 2 * len(self.cases):
                    evicted[0] += engine.preempt(Random(step).choice(ids))

            run = self._run(
                f"one evicted every {every} steps",
                list(range(len(self.cases))),
                budget=_always(min(256, most) if self._may_cut else None),
                before_step=hook,
            )
            yield replace(
                run,
                exercised=partial(_any_evicted, evicted),
                detail=partial(_evictions, evicted),
            )

    def score(self) -> Iterator[Run]:
        """The logprobs of prompt and output, scored as a prompt, equal those of decoding."""
        scored = [
            Case(
                case.name,
                (*case.prompt_token_ids, *tokens),
                replace(case.params, max_tokens=1, min_tokens=0, prompt_logprobs=2),
            )
            for case, tokens in zip(self.cases, self.generated, strict=True)
        ]
        ways: list[tuple[str, int | None]] = [("in one prefill", None)]
        if self._may_cut:
            size = min(128, self.engine.scheduler.config.max_num_batched_tokens)
            ways.append((f"in chunks of {size}", size))
        for label, budget in ways:
            yield Run(
                label,
                scored,
                partial(self._cold, scored, budget=_always(budget)),
                self.cases,
                self.baseline,
                read=self._scored_part,
            )

    def _run(self, label: str, indices: Sequence[int], **options: Any) -> Run:
        cases = [self.cases[index] for index in indices]
        expected = [self.baseline[index] for index in indices]
        return Run(label, cases, lambda: self._cold(cases, **options), cases, expected)

    def _cold(self, cases: Sequence[Case], **options: Any) -> Outputs:
        self.engine.flush_cache()
        return drive(self.engine, cases, **options)

    def _after_warming(
        self, label: str, cases: Sequence[Case], expected: Sequence[Transcript], *, evict: bool
    ) -> Run:
        evicted, cached = 0, 0

        def execute() -> Outputs:
            nonlocal evicted, cached
            self._cold(self.cases)
            cache = self.engine.scheduler.cache
            if evict and cache is not None:
                cached = cache.num_pages
                evicted = cache.evict(cached // 2)
            return drive(self.engine, cases)

        def exercised(outputs: Outputs) -> bool:
            return _hit(outputs) and bool(evicted) == evict

        def detail(outputs: Outputs) -> str:
            lost = f"{evicted} of {cached} pages evicted, " if evict else ""
            reused = sum(output.num_cached_tokens for output in outputs)
            prompts = sum(len(case.prompt_token_ids) for case in cases)
            return f"{lost}{reused} of {prompts} prompt tokens reused"

        return Run(label, cases, execute, cases, expected, exercised=exercised, detail=detail)

    def _at_once(self) -> Run:
        """The crowd, on prompts in the cache; of each request what it gives alone is compared."""
        chosen = [index % len(self.cases) for index in range(len(self.crowd))]
        expected = [self.baseline[index] for index in chosen]
        peak = Peak()

        def execute() -> Outputs:
            nonlocal peak
            self._cold(self.cases)
            with peak_of(self.engine) as peak:
                return drive(self.engine, self.crowd)

        def read(outputs: Outputs) -> list[Transcript]:
            found = as_transcripts(outputs)
            return [
                Transcript(mine.tokens[: len(alone.tokens)])
                for mine, alone in zip(found, expected, strict=True)
            ]

        return Run(
            f"{len(self.crowd)} at once",
            self.crowd,
            execute,
            [self.cases[index] for index in chosen],
            expected,
            read=read,
            exercised=lambda outputs: peak.decodes >= len(self.crowd),
            detail=lambda outputs: str(peak),
        )

    def _decoded_prefix_hit(self) -> tuple[Callable[[Outputs], bool], Callable[[Outputs], str]]:
        """Whether a prefix that decoding wrote is reused from now on, where the policy lets it;
        and how much of it in words."""
        cache = self.engine.scheduler.cache
        if cache is None or not cache.policy.allows(Provenance.DECODE):
            return _hit, lambda outputs: "decoded pages are not shared here, prefilled ones are"
        stats, before = cache.stats, cache.stats.decode_tokens_matched

        def reused() -> int:
            return stats.decode_tokens_matched - before

        return lambda outputs: reused() > 0, lambda outputs: f"{reused()} decoded tokens reused"

    def _scored_part(self, outputs: Outputs) -> list[Transcript]:
        """Of each scored prompt the part that decoding gave in the baseline."""
        parts = []
        for transcript, case, tokens in zip(
            as_transcripts(outputs), self.cases, self.generated, strict=True
        ):
            begin = len(case.prompt_token_ids)
            parts.append(Transcript(transcript.tokens[begin : begin + len(tokens)]))
        return parts


def _always(budget: int | None) -> Budget:
    return lambda step: budget


def _any_evicted(evicted: list[int], outputs: Outputs) -> bool:
    return evicted[0] > 0


def _evictions(evicted: list[int], outputs: Outputs) -> str:
    return f"{evicted[0]} evictions"


def _hit(outputs: Outputs) -> bool:
    return any(output.num_cached_tokens for output in outputs)
