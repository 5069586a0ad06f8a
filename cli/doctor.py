"""``isobit doctor``: what is installed, what could run here, and what to type for the rest."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import click

from .columns import columns
from .options import user_errors


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="The findings as one JSON object.")
@user_errors
def command(as_json: bool) -> None:
    """Look the installation over; exit status 1 when something essential is broken.

    "ok" works, "absent" is optional and not there, "warning" works less well than it could, and
    "broken" must be mended before anything runs. Nothing is changed, converted or downloaded.

    Example: isobit doctor
    """
    from .checks import examine

    findings = examine()
    healthy = all(finding.status != "broken" for finding in findings)
    if as_json:
        click.echo(json.dumps({"healthy": healthy, "findings": [asdict(f) for f in findings]}))
    else:
        rows = [(f"{finding.status:7}", finding.part, finding.found) for finding in findings]
        for line, finding in zip(columns(rows).splitlines(), findings, strict=True):
            click.echo(line)
            if finding.remedy:
                click.echo(f"{'':9}{finding.remedy}")
    sys.exit(0 if healthy else 1)
