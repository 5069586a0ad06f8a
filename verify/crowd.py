"""Many requests that decode in the same step, more than any captured graph holds.

The workload's cases are taken in turn until there are as many requests as wanted. Their prompts
are in the prefix cache, where there is one, so that little is left to compute; and each gets more
tokens than the proof compares, so that the first still decode when the last are admitted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from ..core.engine import Engine
from ..core.step import Step
from ..errors import ConfigError
from .workload import Case


@dataclass(slots=True)
class Peak:
    """The most sequences that one step decoded, and the most that a captured graph holds."""

    decodes: int = 0
    captured: int | None = None

    def __str__(self) -> str:
        graphs = "" if self.captured is None else f", {self.captured} in the largest graph"
        return f"{self.decodes} decoding in one step{graphs}"


def crowd(engine: Engine, cases: Sequence[Case], size: int) -> list[Case]:
    """``size`` requests, the cases in turn, with outputs long enough to decode all at once.

    :raises ConfigError: a step has no room for so many.
    """
    config = engine.scheduler.config
    if size > config.max_num_seqs or size >= config.max_num_batched_tokens:
        raise ConfigError(
            f"{size} requests were to decode at once, but a step takes max_num_seqs = "
            f"{config.max_num_seqs} requests and max_num_batched_tokens = "
            f"{config.max_num_batched_tokens} tokens, of which a prefill needs one. Raise them, or "
            "ask for fewer requests."
        )
    chosen = [cases[index % len(cases)] for index in range(size)]
    extra = _steps_to_admit(engine, chosen)
    return [_longer(case, extra, config.max_model_len) for case in chosen]


def _steps_to_admit(engine: Engine, cases: Sequence[Case]) -> int:
    """Steps until the last of all has its first token, while the others decode."""
    config, cache = engine.scheduler.config, engine.scheduler.cache

    def left(tokens: int) -> int:
        reused = cache.policy.boundary(tokens - 1, cache.page_size) if cache is not None else 0
        return tokens - reused

    tokens = [left(len(case.prompt_token_ids)) for case in cases]
    room = config.max_num_batched_tokens - len(cases)
    if config.chunked_prefill and config.alignment == 1:
        return 1 + -(-sum(tokens) // room)
    return 1 + sum(-(-count // max(1, room - config.alignment)) for count in tokens)


def _longer(case: Case, extra: int, max_model_len: int) -> Case:
    room = max_model_len - len(case.prompt_token_ids)
    tokens = min(room, (case.params.max_tokens or 0) + extra)
    return replace(case, params=replace(case.params, max_tokens=tokens))


@contextmanager
def peak_of(engine: Engine) -> Iterator[Peak]:
    """Watches the steps that are scheduled within the block."""
    graphs = engine.runner.graphs
    peak = Peak(captured=None if graphs is None else graphs.sizes[-1])
    schedule = engine.scheduler.schedule

    def watched(*args: Any, **options: Any) -> Step:
        step = schedule(*args, **options)
        peak.decodes = max(peak.decodes, sum(seq.is_decode for seq in step.seqs))
        return step

    engine.scheduler.schedule = watched  # type: ignore[method-assign]
    try:
        yield peak
    finally:
        del engine.scheduler.schedule  # the class's own shows again
