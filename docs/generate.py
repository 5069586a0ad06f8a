"""Writes the generated parts of the documentation; ``--check`` fails where one is out of date.

A part stands between ``<!-- generated: NAME -->`` and ``<!-- end -->`` in any page. NAME is one of
``PARTS``, or ``$ isobit …``: that command, run, with what it printed.
"""

from __future__ import annotations

import argparse
import inspect
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import click
from click.testing import CliRunner
from proved import proved_matrix
from recorded import gpu_backends, gpu_proof, gpu_startup, gpu_steps, gpu_throughput, gpu_turns
from tables import table

from isobit.backends.base import AttentionConfig, Batch, LayerCache
from isobit.backends.capabilities import (
    FEATURES,
    BackendSpec,
    Capabilities,
    Refusal,
    Requirements,
    Supported,
)
from isobit.cli.main import main as cli
from isobit.core.config import EngineConfig
from isobit.plugins.conformance.check import Check
from isobit.plugins.conformance.corners import Corners
from isobit.plugins.conformance.mutants.catalogue import MUTANTS
from isobit.plugins.conformance.registry import CHECKS
from isobit.plugins.discovery import BUILT_IN, Candidate, discover
from isobit.sampling.params import SamplingParams

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_PART = re.compile(r"(<!-- generated: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)
_ENTRY = re.compile(r"(?::param )?(\w+(?:, \w+)*):\s+(\S.*)")
_ALIASES = {"Toggle": 'bool | "auto"', "AbstractSet": "set"}


def matrix() -> str:
    """The built-in backends, declared and proved, whatever else is installed here."""
    return proved_matrix(c for c in discover() if c.name in BUILT_IN)


def example_matrix() -> str:
    """The example backends, declared and proved."""
    folders = {"minimal": "minimal_backend", "sdpa": "sdpa_backend"}
    candidates = []
    for name, folder in folders.items():
        path = ROOT / "examples" / folder
        version = tomllib.loads((path / "pyproject.toml").read_text())["project"]["version"]
        source = (path / f"isobit_{name}.py").read_text()
        target = f"isobit_{name}"
        candidates.append(
            Candidate(name, f"isobit-{name}", version, target, partial(_module, target, source))
        )
    return proved_matrix(candidates)


def _module(name: str, source: str) -> ModuleType:
    """A module of one file, which is not installed."""
    module = ModuleType(name)
    exec(source, vars(module))
    return module


def cli_help() -> str:
    """``--help`` of every verb, and of what a verb is divided into."""
    return "\n".join(console(" ".join(["isobit", *verb, "--help"])) for verb in _verbs(cli, []))


def _verbs(command: click.Command, path: list[str]) -> Iterator[list[str]]:
    yield path
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            if found is not None:
                yield from _verbs(found, [*path, name])


def console(line: str) -> str:
    """An ``isobit`` command line and what it prints on standard output."""
    args = shlex.split(line)[1:]
    done = CliRunner().invoke(cli, args, prog_name="isobit", terminal_width=96)
    if done.exit_code:
        raise SystemExit(f"{line} ended with status {done.exit_code}:\n{done.stderr}")
    return f"```console\n$ {line}\n{done.stdout}```\n"


def features() -> str:
    return table(("feature", "meaning"), [(f"`{name}`", text) for name, text in FEATURES.items()])


def checks() -> str:
    """The conformance suite's checks, in the order in which they run."""
    rows = [(f"`{check.name}`", check.what, _judged_where(check)) for check in CHECKS]
    return table(("check", "the promise that it tries", "judged where declared"), rows)


def _judged_where(check: Check) -> str:
    """What a backend must declare before the check applies: whatever its gate asks for in turn."""
    declared: dict[str, Any] = {}
    while (reason := _objection(check, declared)) is not None:
        name = reason.removeprefix("not ").partition(":")[0]
        if name in declared:
            raise SystemExit(f"check {check.name} is not judged though {name} is declared")
        declared[name] = Supported() if name in FEATURES else True
    return ", ".join(f"`{name}`" for name in declared) or "always"


def _objection(check: Check, declared: dict[str, Any]) -> str | None:
    features = {name: cell for name, cell in declared.items() if name in FEATURES}
    promises = {name: value for name, value in declared.items() if name not in FEATURES}
    capabilities = Capabilities(dtypes={"float32"}, devices={"cpu"}, features=features, **promises)
    spec = BackendSpec(name="any", api=1, factory="any:Any", capabilities=capabilities)
    return check.gate(Corners(spec, "cpu"))


def mutants() -> str:
    """The backends that the conformance suite must fail."""
    rows = [(f"`{m.name}`", m.fault, m.seen, ", ".join(m.caught_by)) for m in MUTANTS]
    return table(("mutant", "what is wrong", "seen", "caught by"), rows)


def fields_of(cls: type) -> Callable[[], str]:
    """A part: the fields of a dataclass, their meaning taken from its docstring."""

    def part() -> str:
        said = meanings(cls)
        silent = [field.name for field in fields(cls) if field.name not in said]
        if silent:
            raise SystemExit(f"{cls.__name__}'s docstring does not explain {', '.join(silent)}")
        return table(
            ("name", "type", "default", "meaning"),
            [(f"`{f.name}`", f"`{_type(f)}`", _default(f), said[f.name]) for f in fields(cls)],
        )

    return part


def meanings(cls: type) -> dict[str, str]:
    """What the docstring says of each field: ``name: …`` or ``:param name: …``, over any lines."""
    names = {field.name for field in fields(cls)}
    said: dict[str, str] = {}
    current: list[str] = []
    for line in [*inspect.cleandoc(cls.__doc__ or "").splitlines(), ""]:
        entry = _ENTRY.fullmatch(line)
        if entry and names.issuperset(entry[1].split(", ")):
            current = entry[1].split(", ")
            said |= dict.fromkeys(current, entry[2])
        elif line.startswith(" "):
            said |= {name: f"{said[name]} {line.strip()}" for name in current}
        else:
            current = []
    return said


def _type(field: Field[Any]) -> str:
    return re.sub(r"\w+", lambda word: _ALIASES.get(word[0], word[0]), str(field.type))


def _default(field: Field[Any]) -> str:
    if field.default_factory is not MISSING:
        return f"`{field.default_factory()!r}`"
    return "required" if field.default is MISSING else f"`{field.default!r}`"


PARTS: dict[str, Callable[[], str]] = {
    "matrix": matrix,
    "example-matrix": example_matrix,
    "cli-help": cli_help,
    "engine-options": fields_of(EngineConfig),
    "sampling-params": fields_of(SamplingParams),
    "capabilities": fields_of(Capabilities),
    "backend-spec": fields_of(BackendSpec),
    "requirements": fields_of(Requirements),
    "refusal": fields_of(Refusal),
    "attention-config": fields_of(AttentionConfig),
    "batch": fields_of(Batch),
    "layer-cache": fields_of(LayerCache),
    "checks": checks,
    "features": features,
    "mutants": mutants,
    "gpu-throughput": gpu_throughput,
    "gpu-backends": gpu_backends,
    "gpu-turns": gpu_turns,
    "gpu-steps": gpu_steps,
    "gpu-startup": gpu_startup,
    "gpu-proof": gpu_proof,
}


def rendered(page: Path) -> str:
    """The page with all its generated parts made anew."""

    def replace(match: re.Match[str]) -> str:
        name = match[2]
        if name.startswith("$ "):
            part = console(name.removeprefix("$ "))
        elif name in PARTS:
            part = PARTS[name]()
        else:
            raise SystemExit(f"{page.name}: there is no generated part {name!r}")
        return f"{match[1]}\n{part}\n{match[3]}"

    return _PART.sub(replace, page.read_text())


def run() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
    check = parser.parse_args().check
    texts = {page: rendered(page) for page in PAGES}
    stale = [page for page, text in texts.items() if text != page.read_text()]
    for page in stale:
        if check:
            print(f"{page.relative_to(ROOT)} is out of date: run python docs/generate.py")
        else:
            page.write_text(texts[page])
            print(f"{page.relative_to(ROOT)} written")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(run())
