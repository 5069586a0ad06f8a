"""``isobit backends``: the compatibility matrix, as declared or against what is asked."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from .options import engine_kwargs, engine_options, set_threads, user_errors
from .prove import judge_in, prove_all
from .report import check_report, command_line, report_option, write_report


@click.command("backends")
@engine_options
@click.option(
    "--explain", is_flag=True, help="Judge each backend for this model and these options."
)
@click.option(
    "--prove", is_flag=True, help="Try everything that the backends which run here declare."
)
@click.option("--quick", is_flag=True, help="With --prove: shorter sequences, fewer values.")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=None,
    help="With --prove: processes that share the trials. Default: 1.",
)
@report_option
@click.option("--json", "as_json", is_flag=True, help="The rows as JSON.")
@user_errors
def command(
    explain: bool,
    prove: bool,
    quick: bool,
    jobs: int | None,
    report: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Print what every installed attention backend declares.

    With --explain, what holds for the given model and options: every refusal of every backend, and
    which one would be taken. With --prove, every backend that can run on this machine, and the
    pair if one is named, goes through the conformance suite, and what it declares stands beside
    what was proved; exit status 1 where anything fails.

    Example: isobit backends --explain --model smollm2 --cuda-graph
    """
    set_threads(options.pop("threads"))
    if quick and not prove:
        raise click.UsageError("--quick is for --prove; add it.")
    if jobs is not None and not prove:
        raise click.UsageError("--jobs is for --prove; add it.")
    check_report(report)
    from ..backends.pair import parse_pair
    from ..backends.table import matrix_rows, text_table
    from ..plugins.manager import PluginHost

    kwargs = engine_kwargs(options)
    make_host = partial(
        PluginHost, disabled=kwargs["disable_plugins"], strict_plugins=kwargs["strict_plugins"]
    )
    host = make_host()
    requirements, taken = _judged(kwargs, host) if explain else (None, None)
    name = kwargs["attention_backend"]
    pair = host.require(name) if parse_pair(name) else None
    rows = matrix_rows(host, requirements, pair=pair)
    judge = judge_in(jobs or 1, make_host)
    proofs, told = prove_all(host, quick=quick, judge=judge, pair=pair) if prove else ([], [])
    if as_json:
        found = {"backends": rows, "problems": host.problems(), "taken": taken}
        click.echo(json.dumps(found | {"proofs": [proof.as_dict() for proof in proofs]}))
    else:
        parts = (text_table(rows), taken, _proved(proofs), *told)
        click.echo("\n\n".join(part for part in parts if part))
    for problem in host.problems():
        click.echo(f"problem: {problem}", err=True)
    if report is not None:
        from ..verify.page import matrix_page

        records = [proof.as_dict() for proof in proofs]
        write_report(report, matrix_page(rows, records, command=command_line()))
    sys.exit(0 if all(proof.holds for proof in proofs) else 1)


def _proved(proofs: list[Any]) -> str:
    from ..plugins.conformance.text import proof_table, verdict

    return "\n\n".join(f"{proof_table(proof)}\n{verdict(proof)}" for proof in proofs)


def _judged(kwargs: dict[str, Any], host: Any) -> tuple[Any, str]:
    """What is asked of a backend, and the one that the engine would take."""
    from ..core.backend_choice import choose_backend, first_dtype, requirements
    from ..core.config import EngineConfig
    from ..core.devices import resolve_device
    from ..errors import ConfigError
    from ..models.registry import load_model_config

    config = EngineConfig(**kwargs)
    _, model = load_model_config(config.model, random=config.load_format == "random")
    device, dtype = resolve_device(config.device), first_dtype(config, model)
    try:
        selection, taken_dtype = choose_backend(config, model, host, device)
    except ConfigError as error:
        return requirements(config, model, dtype, device), f"none is taken: {error}"
    asked = requirements(config, model, taken_dtype, device)
    instead = f", in {asked.dtype}: {dtype} is not offered".replace("torch.", "")
    return asked, f"taken: {selection.spec.name}" + (instead if taken_dtype != dtype else "")
