"""``isobit plugins``: what is installed under the entry-point group, and what became of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .columns import columns
from .options import plugin_options, set_threads, user_errors
from .prove import judge_in, prove

if TYPE_CHECKING:
    from ..plugins.manager import PluginHost


@click.group("plugins", invoke_without_command=True)
@plugin_options
@click.option("--json", "as_json", is_flag=True, help="Plugins and problems as one JSON object.")
@click.pass_context
@user_errors
def command(
    context: click.Context, disable_plugins: tuple[str, ...], strict_plugins: bool, as_json: bool
) -> None:
    """List every installed plugin: loaded, failed or disabled, and why.

    The environment variable ISOBIT_DISABLE_PLUGINS (names, separated by commas) disables plugins
    as --no-plugin does.

    Example: isobit plugins --no-plugin torch
    """
    from ..plugins.manager import PluginHost

    make_host = partial(PluginHost, disabled=disable_plugins, strict_plugins=strict_plugins)
    if context.invoked_subcommand is not None:
        context.obj = make_host
        return
    host = make_host()
    records = host.records()
    if as_json:
        rows = [asdict(record) for record in records]
        click.echo(json.dumps({"plugins": rows, "problems": host.problems()}))
        return
    heading = ("plugin", "distribution", "version", "status", "hooks", "reason")
    click.echo(columns([heading, *map(_row, records)]))
    for problem in host.problems():
        click.echo(f"problem: {problem}", err=True)


def _row(record: Any) -> tuple[str, ...]:
    return (
        record.name,
        record.distribution,
        record.version,
        record.status,
        ", ".join(record.hooks) or "-",
        record.reason or "-",
    )


@command.command("test")
@click.argument("backend")
@click.option("--device", default=None, help="cpu or cuda. Default: cuda where it is declared.")
@click.option("--quick", is_flag=True, help="Shorter sequences and fewer values of each set.")
@click.option("--check", "only", multiple=True, help="Run this check alone; repeatable.")
@click.option(
    "--waive", multiple=True, metavar="CHECK=REASON", help="Do not run a check, and say why."
)
@click.option("--threads", type=int, default=None, help="CPU threads. Default: torch's.")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Processes that share the trials, each with --threads.",
)
@click.option("--json", "as_json", is_flag=True, help="The proof as one JSON object.")
@click.option("--save", type=click.Path(dir_okay=False, path_type=Path), help="Write that JSON.")
@click.pass_context
@user_errors
def test(
    context: click.Context,
    backend: str,
    device: str | None,
    quick: bool,
    only: tuple[str, ...],
    waive: tuple[str, ...],
    threads: int | None,
    jobs: int,
    as_json: bool,
    save: Path | None,
) -> None:
    """Judge an attention BACKEND, or a pair, by the conformance suite; exit 1 where it fails.

    Every promise of the contract and everything that the backend declares is tried; what it does
    not declare is not. A failure comes with the smallest case found, as a program.

    Example: isobit plugins test torch --quick
    """
    set_threads(threads)
    from ..plugins.conformance.subject import choose_device, find_subject
    from ..plugins.conformance.text import proof_table, verdict
    from ..plugins.conformance.waivers import parse_waivers

    make_host: Callable[[], PluginHost] = context.obj
    subject = find_subject(backend, make_host())
    proof, failed = prove(
        subject,
        choose_device(subject.spec, device),
        quick=quick,
        judge=judge_in(jobs, make_host),
        waivers=parse_waivers(waive),
        only=only,
        err=as_json,
    )
    if save is not None:
        save.write_text(json.dumps(proof.as_dict(), indent=1) + "\n")
    if as_json:
        click.echo(json.dumps(proof.as_dict()))
    else:
        told = [failed, proof_table(proof), verdict(proof)]
        click.echo("\n" + "\n\n".join(part for part in told if part))
    sys.exit(0 if proof.holds else 1)
