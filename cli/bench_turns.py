"""``isobit bench turns``: what the prefix cache saves in conversations of several turns."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from .bench_rows import about, headline, number
from .columns import columns
from .options import engine_kwargs, engine_options, set_threads, user_errors

if TYPE_CHECKING:
    from ..bench.turns import Conversations

_COLUMNS = {
    "turn": "turn",
    "prompt_tokens": "prompt tokens",
    "cached_tokens": "cached",
    "hit_rate": "hit rate",
    "possible_hit_rate": "possible",
    "time_to_first_token_ms": "first token ms",
    "seconds": "seconds",
    "digest": "digest",
}
_AT_LEAST_ONE = click.IntRange(min=1)


@click.command("turns")
@engine_options
@click.option("--conversations", type=_AT_LEAST_ONE, default=16, show_default=True)
@click.option("--turns", "count", type=_AT_LEAST_ONE, default=6, show_default=True)
@click.option(
    "--user-tokens",
    type=_AT_LEAST_ONE,
    default=128,
    show_default=True,
    help="New in every turn.",
)
@click.option("--answer-tokens", type=_AT_LEAST_ONE, default=128, show_default=True)
@click.option(
    "--system-tokens",
    type=click.IntRange(min=0),
    default=512,
    show_default=True,
    help="At the beginning of every conversation, the same in all.",
)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option(
    "--warmup",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Short rounds of the first turn's shapes before it.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the prompts.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a turn, and the total.")
@user_errors
def turns(
    conversations: int,
    count: int,
    user_tokens: int,
    answer_tokens: int,
    system_tokens: int,
    temperature: float,
    warmup: int,
    seed: int,
    as_json: bool,
    **options: Any,
) -> None:
    """Conversations that all go on at once; one row a turn, and their total.

    A turn's prompt is all of the conversation so far, the engine's own answers among it, and new
    random user tokens. The prefix cache is cold at first, answers go on after EOS, and the next
    turn begins when all have ended. Unless --max-model-len is given, it is what a conversation
    needs.

    The hit rate is the share of the prompts' tokens that was found in the prefix cache. Possible
    is that of everything that was computed before the turn, in whole pages, and in the first turn
    the system prompt for all conversations but the first. What lies between the two are the
    limits of the attention backend's declaration, pages that were evicted, and conversations that
    begin in one step.

    The first token is a median over the conversations. The digest is of all token ids and
    logprobs: it is the same with and without the prefix cache, whatever the page size, as long as
    the engine keeps its promise.

    Example: isobit bench turns --model-config tiny-qwen3 --load-format random --conversations 4
    """
    from ..bench.turns import Conversations

    work = Conversations(conversations, count, user_tokens, answer_tokens, system_tokens)
    set_threads(options.pop("threads"))
    kwargs = engine_kwargs(options)
    if kwargs["max_model_len"] is None:
        kwargs["max_model_len"] = work.length
    rows = _measured(work, kwargs, seed=seed, temperature=temperature, warmup=warmup)
    if as_json:
        for row in rows:
            click.echo(json.dumps(row))
    else:
        found = list(rows)
        cells = [[number(row[key]) for key in _COLUMNS] for row in found]
        click.echo(f"{headline(found[0])}\n{columns([list(_COLUMNS.values()), *cells])}")


def _measured(
    work: Conversations, kwargs: dict[str, Any], *, seed: int, temperature: float, warmup: int
) -> Iterator[dict[str, Any]]:
    """A row for every turn, then the total."""
    from tqdm import tqdm

    from ..bench.measure import warm_up
    from ..bench.turns import Turn, measure_turns
    from ..core.llm import LLM

    with LLM(**kwargs) as llm:
        said = about(llm)
        for _ in range(warmup):
            warm_up(llm.engine, work.opening, seed=seed, temperature=temperature)
        done: list[Turn] = []
        with tqdm(
            total=work.conversations * work.turns * work.answer_tokens,
            unit=" tokens",
            disable=not sys.stderr.isatty(),
        ) as bar:
            for turn in measure_turns(
                llm.engine, work, seed=seed, temperature=temperature, on_token=bar.update
            ):
                done.append(turn)
                yield said | {"turn": len(done)} | turn.row()
        yield said | {"turn": "total"} | Turn.total(done).row()
