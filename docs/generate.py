"""Writes the generated parts of the documentation; ``--check`` fails where one is out of date.

A part stands between ``<!-- generated: NAME -->`` and ``<!-- end -->`` in any page.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from click.testing import CliRunner

from isobit.backends.table import markdown_table, matrix_rows
from isobit.cli.main import main as cli
from isobit.plugins.discovery import BUILT_IN, discover
from isobit.plugins.manager import PluginHost

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_PART = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def matrix() -> str:
    """The built-in backends as they declare themselves, whatever else is installed here."""
    host = PluginHost(candidates=[c for c in discover() if c.name in BUILT_IN])
    return markdown_table(matrix_rows(host)) + "\n"


def cli_help() -> str:
    """``--help`` of every verb, and of what a verb is divided into."""
    return "\n".join(_help(verb) for verb in _verbs(cli, []))


def _verbs(command: click.Command, path: list[str]) -> Iterator[list[str]]:
    yield path
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            if found is not None:
                yield from _verbs(found, [*path, name])


def _help(verb: list[str]) -> str:
    args = [*verb, "--help"]
    output = CliRunner().invoke(cli, args, prog_name="isobit", terminal_width=96).output
    return f"```console\n$ isobit {' '.join(args)}\n{output}```\n"


PARTS: dict[str, Callable[[], str]] = {"matrix": matrix, "cli-help": cli_help}


def rendered(page: Path) -> str:
    """The page with all its generated parts made anew."""

    def replace(match: re.Match[str]) -> str:
        name = match[2]
        if name not in PARTS:
            raise SystemExit(f"{page.name}: there is no generated part {name!r}")
        return f"{match[1]}\n{PARTS[name]()}\n{match[3]}"

    return _PART.sub(replace, page.read_text())


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
    check = parser.parse_args().check
    stale = [page for page in PAGES if rendered(page) != page.read_text()]
    for page in stale:
        if check:
            print(f"{page.relative_to(ROOT)} is out of date: run python docs/generate.py")
        else:
            page.write_text(rendered(page))
            print(f"{page.relative_to(ROOT)} written")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(run())
