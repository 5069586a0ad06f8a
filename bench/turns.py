"""Conversations of several turns: what the prefix cache finds of what it could find."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from ..verify.transcript import Transcript, digest, transcripts
from .measure import run_requests
from .workload import Workload, fixed_length, random_prompts

if TYPE_CHECKING:
    from ..core.engine import Engine
    from ..core.outputs import RequestOutput, StreamChunk


@dataclass(frozen=True, slots=True)
class Conversations:
    """Conversations that share a system prompt, all numbers in tokens from 1 up.

    A turn's prompt is the system prompt, every earlier turn's user tokens and the engine's own
    answer to them, then new user tokens. ``system_tokens`` may be 0.
    """

    conversations: int
    turns: int
    user_tokens: int
    answer_tokens: int
    system_tokens: int

    @property
    def length(self) -> int:
        """Of a conversation at its end."""
        return self.system_tokens + self.turns * (self.user_tokens + self.answer_tokens)

    @property
    def opening(self) -> Workload:
        """The first turn, as a workload."""
        first = self.system_tokens + self.user_tokens
        return Workload(self.conversations, first, self.answer_tokens)


@dataclass(frozen=True, slots=True)
class Turn:
    """What one turn of all conversations took, or several turns together.

    prompt_tokens:   of all prompts
    cached_tokens:   of those, found in the prefix cache when a request was first admitted
    possible_tokens: those that a cache without limits could have held: earlier turns in whole
                     pages, but for an answer's last token, whose K and V nobody computes; in the
                     first turn the system prompt, for all conversations but the first
    seconds:         from the first request to the last token
    firsts:          of every request, seconds from the turn's begin to its first token
    results:         every answer's token ids and logprobs, by conversation
    """

    prompt_tokens: int
    cached_tokens: int
    possible_tokens: int
    seconds: float
    firsts: tuple[float, ...]
    results: tuple[Transcript, ...]

    @classmethod
    def total(cls, turns: Sequence[Turn]) -> Turn:
        """Several turns as one."""
        return cls(
            sum(turn.prompt_tokens for turn in turns),
            sum(turn.cached_tokens for turn in turns),
            sum(turn.possible_tokens for turn in turns),
            sum(turn.seconds for turn in turns),
            tuple(first for turn in turns for first in turn.firsts),
            tuple(result for turn in turns for result in turn.results),
        )

    def row(self) -> dict[str, Any]:
        """The figures; an equal digest means equal token ids and logprobs, bit for bit."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "hit_rate": self.cached_tokens / self.prompt_tokens,
            "possible_hit_rate": self.possible_tokens / self.prompt_tokens,
            "time_to_first_token_ms": 1e3 * median(self.firsts),
            "seconds": self.seconds,
            "digest": digest(self.results),
        }


def measure_turns(
    engine: Engine,
    work: Conversations,
    *,
    seed: int = 0,
    temperature: float = 0.0,
    on_token: Callable[[], object] = lambda: None,
) -> Iterator[Turn]:
    """Send a turn of all conversations at once, then the next; each as soon as it is through.

    The prefix cache is cold at first. Answers go on after EOS.

    :param on_token: called after every token of an answer.
    :raises RequestError: a conversation does not fit the engine's limits.
    """
    engine.flush_cache()
    vocab, count = engine.vocab_size, work.conversations
    system = random_prompts(vocab, 1, work.system_tokens, seed)[0] if work.system_tokens else []
    histories = [list(system) for _ in range(count)]
    # Before a conversation is begun another one may have computed the system prompt.
    known = [0] + [len(system)] * (count - 1)
    for number in range(work.turns):
        users = random_prompts(vocab, count, work.user_tokens, seed + 1 + number)
        prompts = [history + user for history, user in zip(histories, users, strict=True)]
        outputs, seconds, firsts = _send(engine, prompts, work, temperature, on_token)
        size = engine.scheduler.pool.page_size
        yield Turn(
            sum(map(len, prompts)),
            sum(output.num_cached_tokens for output in outputs),
            sum(length // size * size for length in known),
            seconds,
            firsts,
            tuple(result for output in outputs for result in transcripts(output)),
        )
        histories = [
            prompt + list(output.outputs[0].token_ids)
            for prompt, output in zip(prompts, outputs, strict=True)
        ]
        known = [len(history) - 1 for history in histories]


def _send(
    engine: Engine,
    prompts: Sequence[list[int]],
    work: Conversations,
    temperature: float,
    on_token: Callable[[], object],
) -> tuple[list[RequestOutput], float, tuple[float, ...]]:
    """A turn: outputs by conversation, its seconds, and the seconds to each first token."""
    params = replace(fixed_length(work.answer_tokens, temperature), logprobs=0)
    firsts: dict[str, float] = {}
    outputs: dict[str, RequestOutput] = {}

    def record(chunks: list[StreamChunk]) -> None:
        now = time.perf_counter()
        for chunk in chunks:
            firsts.setdefault(chunk.request_id, now - began)
            on_token()
            if chunk.output is not None:
                outputs[chunk.request_id] = chunk.output

    began = time.perf_counter()
    run_requests(engine, prompts, [params] * len(prompts), record)
    seconds = time.perf_counter() - began
    ordered = [outputs[f"bench-{index}"] for index in range(len(prompts))]
    return ordered, seconds, tuple(firsts.values())
