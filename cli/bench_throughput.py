"""``isobit bench throughput``: workloads from their first request to their last token."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from .bench_rows import about, headline, number
from .columns import columns
from .options import engine_kwargs, engine_options, set_threads, user_errors

if TYPE_CHECKING:
    from ..bench.workload import Workload

_COLUMNS = {
    "deterministic": "constraints",
    "requests": "requests",
    "input_len": "input",
    "output_len": "output",
    "seconds": "seconds",
    "output_tokens_per_s": "output tokens/s",
    "total_tokens_per_s": "total tokens/s",
    "time_to_first_token_ms": "first token ms",
    "time_to_first_token_max_ms": "last first token",
    "inter_token_ms": "token gap ms",
    "inter_token_p99_ms": "p99 gap ms",
    "host_ms_per_step": "host ms/step",
    "device_idle_share": "device idle",
    "share_of_limit": "of limit",
    "limit": "limit",
}
_RATIO = "of_lifted_tokens_per_s"


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is measured on each engine."""

    workloads: Sequence[Workload]
    seed: int
    temperature: float
    warmup: int
    repeat: int


@click.command("throughput")
@engine_options
@click.option(
    "--workloads",
    default="16:128:128",
    show_default=True,
    help="requests:input:output, and more after commas.",
)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option(
    "--compare",
    is_flag=True,
    help="Measure all once more with the constraints lifted, on a second engine.",
)
@click.option(
    "--warmup",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Short rounds of each workload's shapes before it.",
)
@click.option(
    "--repeat",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Measured runs of each workload; the one in the middle is reported.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the prompts.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a workload and engine.")
@user_errors
def throughput(workloads: str, compare: bool, as_json: bool, **options: Any) -> None:
    """Requests that all arrive at once; one row a workload.

    Prompts are random and share nothing, the prefix cache is cold, and the output goes on after
    EOS. Unless --max-model-len is given, it is what the longest workload needs.

    The first token and the gap between a request's tokens are medians over requests and tokens;
    a gap is from a token to the next one of its request, after the first. The host's time is all
    of a step but the model. The device is idle from the moment when a step's tokens are there
    until the next step's first op begins, by CUDA events; gaps between the kernels of a step count
    as busy, so the true share is higher (isobit bench step shows it). On a CPU it is not known.

    --compare runs every workload first constrained, then with --no-deterministic-inference; a
    row of the second engine's JSON has the constrained tokens/s as a share of its own.

    Example: isobit bench throughput --model-config tiny-qwen3 --load-format random --compare
    """
    from ..bench.workload import Workload

    plan = _Plan(
        [Workload.parse(text) for text in workloads.split(",")],
        *(options.pop(name) for name in ("seed", "temperature", "warmup", "repeat")),
    )
    set_threads(options.pop("threads"))
    kwargs = engine_kwargs(options)
    if compare and not kwargs["deterministic"]:
        raise click.UsageError(
            "--compare measures both ways and was given with --no-deterministic-inference. Leave "
            "one out."
        )
    if kwargs["max_model_len"] is None:
        kwargs["max_model_len"] = max(work.length for work in plan.workloads)
    _bench(plan, kwargs, [True, False] if compare else [kwargs["deterministic"]], as_json)


def _bench(plan: _Plan, kwargs: dict[str, Any], modes: list[bool], as_json: bool) -> None:
    """Each engine in turn; JSON as soon as a row is measured, or all in one table."""
    constrained: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    for deterministic in modes:
        found: list[dict[str, Any]] = []
        for row in _measured(plan, kwargs | {"deterministic": deterministic}):
            if constrained:
                other = constrained[len(found)]
                row[_RATIO] = other["output_tokens_per_s"] / row["output_tokens_per_s"]
            found.append(row)
            if as_json:
                click.echo(json.dumps(row))
        if not as_json:
            click.echo(headline(found[0]))
        constrained, rows = found, rows + found
        _free()
    if not as_json:
        click.echo(_table(rows, len(plan.workloads)))


def _measured(plan: _Plan, kwargs: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for every workload, on an engine that lives for them."""
    from tqdm import tqdm

    from ..bench.limits import measure_limits
    from ..bench.measure import measure
    from ..core.llm import LLM

    with LLM(**kwargs) as llm:
        limits = measure_limits(llm.engine.runner.backend.config.device)
        said = about(llm) | limits.as_dict()
        for work in plan.workloads:
            with tqdm(
                total=plan.repeat * work.requests * work.output_len,
                desc=str(work),
                unit=" tokens",
                disable=not sys.stderr.isatty(),
            ) as bar:
                result = measure(
                    llm.engine,
                    work,
                    seed=plan.seed,
                    temperature=plan.temperature,
                    warmup=plan.warmup,
                    repeat=plan.repeat,
                    on_token=bar.update,
                )
            yield said | result.row() | result.against(llm.engine, limits)


def _free() -> None:
    """Give a closed engine's memory back before the next one starts."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _table(rows: list[dict[str, Any]], workloads: int) -> str:
    """Rows of the same workload under one another."""
    ordered = [row for first in range(workloads) for row in rows[first::workloads]]
    names = dict(_COLUMNS)
    if any(_RATIO in row for row in rows):
        names[_RATIO] = "constrained/lifted"
    return columns([list(names.values()), *([_cell(row, key) for key in names] for row in ordered)])


def _cell(row: dict[str, Any], key: str) -> str:
    if key == "deterministic":
        return "held" if row[key] else "lifted"
    return number(row.get(key))
