"""``isobit bench startup``: how long an engine takes to start, the first time and again."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import click

from .bench_rows import number
from .columns import columns
from .options import engine_kwargs, engine_options, user_errors


@click.command("startup")
@engine_options
@click.option(
    "--starts",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="One after the other; the first has empty caches.",
)
@click.option(
    "--own-caches",
    is_flag=True,
    help="Use your own caches of compiled and chosen kernels, as they are, and leave them filled.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a start.")
@user_errors
def startup(starts: int, own_caches: bool, as_json: bool, **options: Any) -> None:
    """Seconds of each phase of a start, each start in a process of its own.

    Between starts compiled kernels, and the choice of how each product is computed, are kept. The
    first start here finds neither, unless --own-caches is given; the second finds both.

    "process" is from the launch of Python to an engine that can serve, of which "imports" comes
    before the engine's own phases; "no weights" is that less reading or drawing the weights.

    Example: isobit bench startup --model-config tiny-qwen3 --load-format random
    """
    from ..bench.startup import start_once
    from ..models.registry import PACKAGED

    if options.pop("threads") is not None:
        raise click.UsageError(
            "--threads was given, but each start is a process of its own. Leave it out, or set "
            "OMP_NUM_THREADS."
        )
    kwargs = engine_kwargs(options)
    if kwargs["model"] in PACKAGED and kwargs["load_format"] == "auto":
        kwargs["model"] = str(PACKAGED[kwargs["model"]]())  # converted once, not in each cache
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for start in range(1, starts + 1):
            found = start_once(kwargs, None if own_caches else Path(folder))
            rows.append({"start": start, "own_caches": own_caches} | found)
            if as_json:
                click.echo(json.dumps(rows[-1]))
    if not as_json:
        click.echo(_table(rows))


def _table(rows: list[dict[str, Any]]) -> str:
    head = ["start", "process", "imports", *rows[0]["phases"], "no weights"]
    body = [
        [
            str(row["start"]),
            number(row["process"]),
            number(row["imports"]),
            *(number(seconds) for seconds in row["phases"].values()),
            number(row["without_weights"]),
        ]
        for row in rows
    ]
    return columns([head, *body])
