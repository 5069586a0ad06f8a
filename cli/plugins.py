"""``isobit plugins``: what is installed under the entry-point group, and what became of it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from .columns import columns
from .options import plugin_options, user_errors


@click.command("plugins")
@plugin_options
@click.option("--json", "as_json", is_flag=True, help="Plugins and problems as one JSON object.")
@user_errors
def command(disable_plugins: tuple[str, ...], strict_plugins: bool, as_json: bool) -> None:
    """List every installed plugin: loaded, failed or disabled, and why.

    The environment variable ISOBIT_DISABLE_PLUGINS (names, separated by commas) disables plugins
    as --no-plugin does.

    Example: isobit plugins --no-plugin torch
    """
    from ..plugins.manager import PluginHost

    host = PluginHost(disabled=disable_plugins, strict_plugins=strict_plugins)
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
