"""``--report FILE``: what a verb found, also as one HTML page."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ..errors import ConfigError

F = TypeVar("F", bound=Callable[..., Any])


def report_option(function: F) -> F:
    """``--report``, the page's path; to be checked before the work with ``check_report``."""
    path = click.Path(dir_okay=False, writable=True, path_type=Path)
    return click.option("--report", type=path, help="Also write the result as one HTML page.")(
        function
    )


def check_report(path: Path | None) -> None:
    """Refuse a page that could not be written, before any work is done for it.

    :raises ConfigError: its folder does not exist, or may not be written to.
    """
    if path is None:
        return
    if not path.parent.is_dir():
        raise ConfigError(
            f"--report was {path}; wanted a file in a folder that exists. Make {path.parent} first."
        )
    if not path.exists() and not os.access(path.parent, os.W_OK):
        raise ConfigError(
            f"--report was {path}; wanted a file in a folder that you may write to. Pass another."
        )


def write_report(path: Path, page: str) -> None:
    """Write the page and say where it is."""
    path.write_text(page, encoding="utf-8")
    click.echo(f"report: {path}", err=True)


def command_line() -> str:
    """This process's command, as a shell takes it."""
    return shlex.join(["isobit", *sys.argv[1:]])
