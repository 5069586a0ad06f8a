"""What the pages show works: Python blocks run, command lines parse, output is what is printed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import Any

import click
import pytest

import isobit
from isobit.cli.main import main as cli

ROOT = Path(isobit.__file__).parent
MAX_SKIPPED = 2
"""Blocks in all pages that may be marked ``<!-- not run: reason -->``."""

FILES_RUN_IN = {"docs/plugins.md": "test_plugin_guide.py"}
"""Pages that show files, ``<!-- file: path -->``, and the test that puts these together."""


def run_python(page: Any) -> int:
    """Run a page's Python blocks in one namespace; how many ran."""
    namespace: dict[str, Any] = {"__name__": f"page {page.name}"}
    blocks = [b for b in page.blocks("python") if b.skip is None and b.file is None]
    for block in blocks:
        # Blank lines first, so that a traceback has the page's own line numbers.
        source = "\n" * (block.line - 1) + block.text
        exec(compile(source, str(page.path), "exec"), namespace)
    return len(blocks)


def not_run_here(page: Any) -> int:
    return sum(b.skip is not None or b.file is not None for b in page.blocks("python"))


def command_lines(text: str) -> Iterator[list[str]]:
    """The commands of a console block, each as words; pipes and lists taken apart.

    Where any line begins with ``$ ``, only those are commands and the rest is output.
    """
    lines = text.replace("\\\n", " ").splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars="();|&<>")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set(";|&"):
                if words:
                    yield words
                words = []
            elif words or not re.match(r"[A-Z_]+=", word):
                words.append(word)


def check_commands(text: str) -> None:
    for words in command_lines(text):
        check_command(words)


def check_command(words: list[str]) -> None:
    """Fail if the command does not exist or does not take its options. It is not run."""
    match words:
        case ["isobit", *args]:
            parse(list(takewhile(lambda word: word not in "<>", args)))
        case ["make", *targets]:
            for target in targets:
                assert f"\n{target}:" in (ROOT / "Makefile").read_text(), f"no target {target}"
        case ["python", script, *_] if script.endswith(".py"):
            assert (ROOT / script).exists(), f"no file {script}"
        case ["python", "-m", module, *_] if module.startswith("isobit"):
            assert (ROOT / Path(*module.split(".")[1:])).with_suffix(".py").exists()


def parse(args: list[str]) -> None:
    """Parse ``isobit``'s arguments as the command line would; the verb is not invoked.

    :raises click.UsageError: a verb, option or value that does not exist
    """
    parent = click.Context(cli, info_name="isobit")
    command: click.Command | None = cli
    if args and not args[0].startswith("-"):
        command = cli.get_command(parent, args[0])
        if command is None:
            raise click.UsageError(f"no verb {args[0]!r}")
        args = args[1:]
    with suppress(click.exceptions.Exit):  # --help and --version end the parsing well
        command.make_context("isobit", list(args), parent=parent)


def test_python_blocks_run(page: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_python(page) == page.text.count("\n```python\n") - not_run_here(page)


def test_a_broken_python_block_is_caught(page: Any) -> None:
    broken = type(page)(page.name, page.path, "\n```python\nfrom isobit import LLLM\n```\n")
    with pytest.raises(ImportError, match="LLLM"):
        run_python(broken)


def test_commands_exist(page: Any) -> None:
    for block in page.blocks("console", "bash", "sh", "shell"):
        if block.skip is None:
            try:
                check_commands(block.text)
            except (click.UsageError, AssertionError) as error:
                pytest.fail(f"{page.name}:{block.line}: {error}")


@pytest.mark.parametrize(
    "line",
    [
        "isobit generat hi",
        "isobit verify --quik",
        "isobit verify --n-trials many",
        "echo hi | isobit generate --temprature 1",
        "OMP_NUM_THREADS=1 isobit backends --jsn > rows.json",
        "make demos",
        "python benchmarks/nothing.py",
    ],
)
def test_a_wrong_command_is_caught(line: str) -> None:
    with pytest.raises((click.UsageError, AssertionError)):
        check_commands(line)


def test_output_is_shown_only_where_it_is_generated(page: Any) -> None:
    """A block with ``$`` and output belongs to ``docs/generate.py``, which compares it."""
    by_hand = re.sub(r"<!-- generated: .*?<!-- end -->", "", page.text, flags=re.DOTALL)
    for block in type(page)(page.name, page.path, by_hand).blocks("console"):
        assert not block.text.startswith("$ "), f"{page.name}: {block.text}"


def test_every_fence_is_a_kind_that_is_tested(page: Any) -> None:
    known = {"python", "console", "bash", "sh", "shell", "json", "text", "toml", "diff", "http"}
    known |= {"mermaid"}
    fences = re.findall(r"^```(\S*)$", page.text, re.MULTILINE)
    assert set(fences[::2]) <= known, f"{page.name}: name the language of every block"
    assert set(fences[1::2]) <= {""}


def test_files_are_shown_only_where_a_test_runs_them(page: Any) -> None:
    if "<!-- file:" in page.text:
        assert (Path(__file__).parent / FILES_RUN_IN[page.name]).exists()


def test_few_blocks_are_not_run(pages: list[Any]) -> None:
    languages = ("python", "console", "bash", "sh", "shell")
    skipped = [
        f"{p.name}:{b.line}: {b.skip}" for p in pages for b in p.blocks(*languages) if b.skip
    ]
    marks = sum(page.text.count("<!-- not run:") for page in pages)
    assert marks == len(skipped), "a mark `not run` has no block to mark"
    assert len(skipped) <= MAX_SKIPPED, skipped
