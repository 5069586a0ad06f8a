"""``isobit bench``: throughput and latency of an engine in this process, without a server."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import click

from .columns import columns
from .measure import Workload, measure
from .options import engine_kwargs, engine_options, set_threads, user_errors

F = TypeVar("F", bound=Callable[..., Any])

_COLUMNS = {
    "requests": "requests",
    "input_len": "input",
    "output_len": "output",
    "seconds": "seconds",
    "output_tokens_per_s": "output tokens/s",
    "total_tokens_per_s": "total tokens/s",
    "time_to_first_token_ms": "first token ms",
    "inter_token_ms": "token gap ms",
    "inter_token_p99_ms": "p99 gap ms",
    "host_ms_per_step": "host ms/step",
}


def _bench_options(repeat: int) -> Callable[[F], F]:
    """What both benchmarks take, besides the engine's options."""

    def decorate(function: F) -> F:
        for option in (
            click.option("--json", "as_json", is_flag=True, help="One JSON object a workload."),
            click.option("--seed", type=int, default=0, show_default=True, help="Of the prompts."),
            click.option(
                "--repeat",
                type=click.IntRange(min=1),
                default=repeat,
                show_default=True,
                help="Measured runs of each workload; the one in the middle is reported.",
            ),
            click.option(
                "--warmup",
                type=click.IntRange(min=0),
                default=1,
                show_default=True,
                help="Runs of each workload before those.",
            ),
        ):
            function = option(function)
        return function

    return decorate


@click.group("bench")
def command() -> None:
    """Measure an engine on random prompts: greedy, a fixed length, a cold prefix cache.

    Times are in seconds or milliseconds; the first token, the gap between tokens and the host's
    time are medians. The host's time is all of a step but the model: scheduling, packing, sampling,
    text.

    Example: isobit bench throughput --workloads 1:128:128,16:128:128
    """


@command.command("throughput")
@engine_options
@click.option("--num-prompts", type=int, default=None, help="Requests at once. Default: 16.")
@click.option("--input-len", type=int, default=None, help="Tokens in each. Default: 128.")
@click.option("--output-len", type=int, default=None, help="Tokens out of each. Default: 128.")
@click.option("--workloads", default=None, help="Several: requests:input:output,…")
@_bench_options(repeat=1)
@user_errors
def throughput(
    num_prompts: int | None,
    input_len: int | None,
    output_len: int | None,
    workloads: str | None,
    **options: Any,
) -> None:
    """Many requests that arrive at once; one row a workload.

    Example: isobit bench throughput --num-prompts 16 --input-len 128 --output-len 128
    """
    single = (num_prompts, input_len, output_len)
    if workloads is None:
        filled = [
            given if given is not None else default
            for given, default in zip(single, (16, 128, 128), strict=True)
        ]
        chosen = [Workload(*filled)]
    elif any(given is not None for given in single):
        raise click.UsageError(
            "--workloads was given together with --num-prompts, --input-len or --output-len. Pass "
            "one or the other."
        )
    else:
        chosen = [Workload.parse(text) for text in workloads.split(",")]
    _bench(chosen, options)


@command.command("latency")
@engine_options
@click.option("--input-len", type=int, default=128, show_default=True, help="Tokens in.")
@click.option("--output-len", type=int, default=128, show_default=True, help="Tokens out.")
@_bench_options(repeat=5)
@user_errors
def latency(input_len: int, output_len: int, **options: Any) -> None:
    """One request alone, several times.

    Example: isobit bench latency --input-len 1000 --output-len 32
    """
    _bench([Workload(1, input_len, output_len)], options)


def _bench(workloads: list[Workload], options: dict[str, Any]) -> None:
    """Measure and print each workload as soon as it is done, or all in one table."""
    set_threads(options.pop("threads"))
    as_json, seed, repeat, warmup = (
        options.pop(name) for name in ("as_json", "seed", "repeat", "warmup")
    )

    import torch
    from tqdm import tqdm

    from ..core.llm import LLM

    rows = []
    with LLM(**engine_kwargs(options)) as llm:
        about = {
            "model": llm.config.model,
            "threads": torch.get_num_threads(),
            "fingerprint": llm.fingerprint,
        }
        for work in workloads:
            total = (warmup + repeat) * work.requests * work.output_len
            with tqdm(
                total=total, desc=str(work), unit=" tokens", disable=not sys.stderr.isatty()
            ) as bar:
                result = measure(
                    llm.engine, work, seed=seed, warmup=warmup, repeat=repeat, on_token=bar.update
                )
            rows.append(result.row())
            if as_json:
                click.echo(json.dumps(about | rows[-1]))
    if not as_json:
        click.echo("{model}, {threads} threads, {fingerprint}".format(**about))
        click.echo(columns([list(_COLUMNS.values()), *map(_cells, rows)]))


def _cells(row: dict[str, Any]) -> list[str]:
    return [_number(row[key]) for key in _COLUMNS]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return str(value)
    return f"{value:.1f}" if value >= 100 else f"{value:.3g}"
