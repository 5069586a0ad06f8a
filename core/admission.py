"""The scheduler's limits, and the refusal of requests that could never be served under them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..cache.pages import PagePool
from ..errors import ConfigError, RequestError
from .request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """Limits of a step and promises of the backend.

    max_num_seqs:           requests running at once at most
    max_num_batched_tokens: tokens in one step at most
    max_model_len:          prompt plus output of a request at most
    chunked_prefill:        a prompt may be computed in several steps
    alignment:              a chunk ends at a multiple of this many tokens, or with the prompt
    decode_equals_prefill:  known outputs may be recomputed by prefill after a preemption
    steps_ahead:            steps that may be under way when the next one is scheduled, 0 or 1

    :raises ConfigError: a limit below 1, or an alignment that no chunk could reach.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    chunked_prefill: bool = True
    alignment: int = 1
    decode_equals_prefill: bool = True
    steps_ahead: int = 0

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "alignment"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} was {getattr(self, name)}; wanted at least 1.")
        if self.steps_ahead not in (0, 1):
            raise ConfigError(f"steps_ahead was {self.steps_ahead}; wanted 0 or 1.")
        if self.chunked_prefill and self.alignment > self.max_num_batched_tokens:
            raise ConfigError(
                f"max_num_batched_tokens was {self.max_num_batched_tokens}, but chunks end at "
                f"multiples of {self.alignment} tokens. Pass at least {self.alignment}."
            )


def check_admissible(request: Request, config: SchedulerConfig, pool: PagePool) -> None:
    """Check that ``request``, alone on an idle engine, would run to its end.

    :raises RequestError: it would not; the message says what was given, the limit, the remedy.
    """
    prompt = request.num_prompt_tokens
    if prompt == 0:
        raise RequestError("the prompt has no tokens; wanted at least 1. Give it some text.")
    outputs = 0 if request.params.scores_only else 1
    if prompt + outputs > config.max_model_len:
        raise RequestError(
            f"the prompt has {prompt} tokens; max_model_len {config.max_model_len} leaves room for "
            f"at most {config.max_model_len - outputs} and {outputs} output token(s). Shorten the "
            "prompt, or start the engine with a larger max_model_len."
        )
    room = config.max_model_len - prompt
    max_tokens = room if request.params.max_tokens is None else request.params.max_tokens
    if max_tokens > room:
        raise RequestError(
            f"the prompt has {prompt} tokens and max_tokens is {max_tokens}, together "
            f"{prompt + max_tokens}; max_model_len is {config.max_model_len}. Lower max_tokens to "
            f"{room} or shorten the prompt, or start the engine with a larger max_model_len."
        )
    if not config.chunked_prefill and prompt > config.max_num_batched_tokens:
        raise RequestError(
            f"the prompt has {prompt} tokens; without chunked prefill a step takes at most "
            f"max_num_batched_tokens = {config.max_num_batched_tokens}. Shorten the prompt, or "
            "start the engine with a larger max_num_batched_tokens or with chunked_prefill=True."
        )
    # The last sampled token ends the request and is never computed, so it takes no slot.
    stored = prompt + max(0, max_tokens - 1)
    pages = pool.pages_for(stored)
    if pages > pool.num_pages:
        raise RequestError(
            f"{prompt} prompt tokens and up to {max_tokens} output tokens take {pages} KV pages "
            f"of {pool.page_size} tokens; the cache has {pool.num_pages}. Lower max_tokens or "
            "shorten the prompt, or start the engine with a larger kv_cache_memory."
        )


def check_budget(token_budget: int) -> None:
    """Check the most tokens of one step.

    :raises ConfigError: it is none.
    """
    if not isinstance(token_budget, int) or token_budget < 1:
        raise ConfigError(
            f"token_budget was {token_budget!r}; wanted a whole number of at least 1. Leave it out "
            "for max_num_batched_tokens."
        )


def check_prompt(prompt_token_ids: Sequence[int], vocab_size: int) -> None:
    """Check that a prompt is made of token ids.

    :raises RequestError: naming the first that is none.
    """
    for index, token in enumerate(prompt_token_ids):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise RequestError(
                f"prompt token {index} was {token!r}; wanted a token id from 0 to {vocab_size - 1}."
            )
