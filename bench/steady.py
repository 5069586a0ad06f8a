"""An engine held in one kind of step: the same decode, or the same prefill, again and again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from ..errors import ConfigError
from .floor import StepShape
from .measure import run_requests
from .workload import fixed_length, random_prompts

if TYPE_CHECKING:
    from ..core.engine import Engine


@dataclass(frozen=True, slots=True)
class StepKind:
    """A step of ``batch`` sequences, each with ``context`` earlier and ``tokens`` new tokens."""

    batch: int
    context: int
    tokens: int
    decode: bool

    def check(self, shape: StepShape) -> None:
        """Refuse a step that is not of this kind; a decode's context grows with its output.

        :raises ConfigError: with the step that there was.
        """
        alike = len(shape.seqs) == self.batch and all(
            new == self.tokens and (start >= self.context if self.decode else start == self.context)
            for start, new in shape.seqs
        )
        if not alike:
            first = "none" if not shape.seqs else "{} earlier and {} new".format(*shape.seqs[0])
            raise ConfigError(
                f"wanted a step of {self.batch} sequences with {self.context} earlier and "
                f"{self.tokens} new tokens, but the engine made one of {len(shape.seqs)} sequences "
                f"with {first}. Raise kv_cache_memory or max_num_seqs, leave radix_cache on, or "
                "pass a context that is a multiple of page_size."
            )


class Steady(Protocol):
    """Takes steps of one kind; ``close`` when done."""

    def advance(self) -> None: ...

    def close(self) -> None: ...


def steady(engine: Engine, kind: StepKind, *, steps: int, seed: int, temperature: float) -> Steady:
    """The engine with its contexts computed, ready for ``steps`` steps of a kind."""
    if kind.decode:
        return _Decodes(engine, kind, steps, seed, temperature)
    return _Prefills(engine, kind, steps, seed, temperature)


def max_model_len(kind: StepKind, steps: int, budget: int) -> int:
    """What the sequences need at most, in tokens."""
    return kind.context + (_outputs(kind, steps, budget) if kind.decode else kind.tokens) + 1


def _outputs(kind: StepKind, steps: int, budget: int) -> int:
    """Tokens that the first request gets, which decodes while the last are still in prefill."""
    return steps + 2 + kind.batch * -(-kind.context // budget) + -(-kind.batch // 8)


class _Decodes:
    """Requests that all decode; their prompts are in the prefix cache, so they start together."""

    def __init__(
        self, engine: Engine, kind: StepKind, steps: int, seed: int, temperature: float
    ) -> None:
        self._engine = engine
        prompts = random_prompts(engine.vocab_size, kind.batch, kind.context, seed)
        once = [fixed_length(1, temperature)] * kind.batch
        run_requests(engine, prompts, once, lambda chunks: None)
        budget = engine.scheduler.config.max_num_batched_tokens
        params = fixed_length(_outputs(kind, steps, budget), temperature)
        for index, prompt in enumerate(prompts):
            engine.add_request(f"bench-{index}", prompt, params)
        begun: set[str] = set()
        while len(begun) < kind.batch and engine.has_unfinished():
            begun.update(chunk.request_id for chunk in engine.step())

    def advance(self) -> None:
        self._engine.step()

    def close(self) -> None:
        for request_id in self._engine.unfinished_ids():
            self._engine.abort(request_id)


class _Prefills:
    """New requests for every step, which end with it; their context is in the prefix cache."""

    def __init__(
        self, engine: Engine, kind: StepKind, steps: int, seed: int, temperature: float
    ) -> None:
        self._engine = engine
        self._batch = kind.batch
        self._once = fixed_length(1, temperature)
        vocab, batch = engine.vocab_size, kind.batch
        contexts: list[list[int]] = [[]] * batch
        if kind.context:
            contexts = random_prompts(vocab, batch, kind.context, seed)
            run_requests(engine, contexts, [self._once] * batch, lambda chunks: None)
        # Rounds share nothing but their contexts, or the prefix cache would serve more.
        tails = random_prompts(vocab, batch * steps, kind.tokens, seed + 1)
        self._prompts = [contexts[i % batch] + tail for i, tail in enumerate(tails)]
        self._round = 0

    def advance(self) -> None:
        first = self._round * self._batch
        self._round += 1
        for index, prompt in enumerate(self._prompts[first : first + self._batch]):
            self._engine.add_request(f"bench-{index}", prompt, self._once)
        self._engine.step()
        self.close()  # none is left, unless the step was of another kind

    def close(self) -> None:
        for request_id in self._engine.unfinished_ids():
            self._engine.abort(request_id)
