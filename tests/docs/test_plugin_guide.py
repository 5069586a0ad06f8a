"""``docs/plugins.md`` from an empty folder to a passing backend, as its reader would do it."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

ROOT = "my-backend"
SUITE_FOR_PYTEST = "isobit.plugins.conformance.pytest_plugin"
_NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")


class Reader:
    """Somebody who has put the page's files into a folder and types its commands there."""

    def __init__(self, files: dict[str, str], folder: Path) -> None:
        self.folder = folder / ROOT
        for name, text in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        self.path = [self.folder]
        self._install()

    def _install(self) -> None:
        """What ``pip install -e .`` leaves: the folder on the path, and its metadata."""
        project = tomllib.loads((self.folder / "pyproject.toml").read_text())["project"]
        name, version = project["name"], project["version"]
        info = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = []
        for group, entries in project["entry-points"].items():
            lines += [f"[{group}]", *(f"{key} = {value}" for key, value in entries.items())]
        (info / "entry_points.txt").write_text("\n".join([*lines, ""]))

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        paths = [*map(str, self.path), os.environ.get("PYTHONPATH", "")]
        return subprocess.run(
            [sys.executable, *arguments],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
            cwd=self.folder.parent,
            text=True,
            capture_output=True,
            check=False,
        )

    def types(self, line: str, *more: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the page: ``isobit …`` or ``pytest …``."""
        program, *arguments = shlex.split(line)
        module = {"isobit": "isobit.cli.main", "pytest": "pytest"}[program]
        return self.python("-m", module, *arguments, *more)


@pytest.fixture(scope="module")
def guide(pages: list[Any]) -> Any:
    return next(page for page in pages if page.name == "docs/plugins.md")


def shown_files(guide: Any) -> dict[str, str]:
    blocks = guide.blocks("toml", "python")
    return {block.file: block.text for block in blocks if block.file is not None}


def mended(files: dict[str, str], guide: Any) -> dict[str, str]:
    """The files after the page's change, whose lines must be in exactly one of them."""
    (diff,) = guide.blocks("diff")
    old, new = (
        "".join(line[1:] + "\n" for line in diff.text.splitlines() if line[0] == sign)
        for sign in "-+"
    )
    assert sum(text.count(old) for text in files.values()) == 1
    return {name: text.replace(old, new) for name, text in files.items()}


def command(guide: Any, start: str) -> str:
    """The page's one command that begins so."""
    lines = [line for block in guide.blocks("console") for line in block.text.splitlines()]
    (found,) = [line for line in lines if line.startswith(start)]
    return found


def shown_text(guide: Any, word: str) -> str:
    """The page's one text block with this word."""
    (text,) = [block.text for block in guide.blocks("text") if word in block.text]
    return text


def assert_printed(shown: str, printed: str) -> None:
    """The lines stand in the output, one after the other.

    Spaces may differ, as columns are as wide as what else is installed; numbers may differ by
    rounding, as another processor adds in another order.
    """
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    found = [" ".join(line.split()) for line in printed.splitlines()]
    plain, all_plain = ([_NUMBER.sub("#", line) for line in text] for text in (lines, found))
    starts = [i for i in range(len(found)) if all_plain[i : i + len(lines)] == plain]
    assert starts, f"wanted:\n{shown}\nprinted:\n{printed}"
    for line, other in zip(lines, found[starts[0] :], strict=False):
        numbers = [float(number) for number in _NUMBER.findall(line)]
        assert [float(n) for n in _NUMBER.findall(other)] == pytest.approx(numbers, rel=0.05)


@pytest.fixture(scope="module")
def first_try(guide: Any, tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return Reader(shown_files(guide), tmp_path_factory.mktemp("first"))


@pytest.fixture(scope="module")
def second_try(guide: Any, tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return Reader(mended(shown_files(guide), guide), tmp_path_factory.mktemp("second"))


def test_the_plugin_is_listed_as_shown(guide: Any, first_try: Reader) -> None:
    done = first_try.types("isobit plugins")
    assert_printed(shown_text(guide, "hooks  "), done.stdout)


def test_the_mistake_is_found_as_shown(
    guide: Any, first_try: Reader, second_try: Reader, tmp_path: Path
) -> None:
    done = first_try.types(command(guide, "isobit plugins test mine --quick"))
    assert done.returncode == 1, done.stdout + done.stderr
    shown = shown_text(guide, "To repeat it")
    assert_printed(shown, done.stdout)
    program = tmp_path / "repeat.py"
    program.write_text(
        "".join(line[4:] + "\n" for line in shown.partition("To repeat it:")[2].splitlines())
    )
    again = first_try.python(str(program))
    assert again.returncode == 1, again.stderr
    assert_printed(re.findall(r"position 0 of .*(?=\.\n)", shown)[0], again.stderr)
    assert second_try.python(str(program)).stdout == "holds\n"


def test_the_mended_backend_passes(guide: Any, second_try: Reader) -> None:
    assert "\nisobit plugins test mine\n" in guide.text
    done = second_try.types("isobit plugins test mine --quick")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mine holds what was tried of its declaration" in done.stdout


def test_it_passes_under_pytest_too(guide: Any, second_try: Reader) -> None:
    seen = any(entry.value == SUITE_FOR_PYTEST for entry in entry_points(group="pytest11"))
    more = [] if seen else ["-p", SUITE_FOR_PYTEST]
    line = command(guide, "pytest")
    done = second_try.types(line, "--attention-quick", "-k", "reference or rerun", *more)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout


def test_it_serves(second_try: Reader) -> None:
    done = second_try.python(f"{ROOT}/try_it.py")
    assert re.fullmatch(r"[\[(](\d+, ){3}\d+[\])]\n", done.stdout), done.stdout + done.stderr


def test_another_api_is_refused_as_shown(guide: Any, tmp_path: Path) -> None:
    files = {name: text.replace("api=1", "api=2") for name, text in shown_files(guide).items()}
    reader = Reader(files, tmp_path)
    shown = shown_text(guide, "plugin API 2").strip()
    assert shown in reader.types("isobit plugins").stdout
    asked = reader.python(f"{ROOT}/try_it.py")
    assert asked.returncode != 0
    assert shown in asked.stderr


@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="needs pip")
@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="needs setuptools")
def test_pip_installs_the_folder(second_try: Reader, tmp_path: Path) -> None:
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    target = tmp_path / "target"
    source = str(second_try.folder)
    done = second_try.python("-m", "pip", "install", *options, "--target", str(target), source)
    assert done.returncode == 0, done.stdout + done.stderr
    installed = {path.name for path in target.glob("*.py")}
    assert installed == {"my_backend.py", "my_attention.py"}


def test_no_block_is_left_out(guide: Any) -> None:
    """Every block is a file, a change, a command, output that is compared, or run as Python."""
    base = (Path(__file__).parent.parent.parent / "backends" / "base.py").read_text()
    compared = ["hooks  ", "To repeat it", "plugin API 2"]
    for block in guide.blocks("toml", "text", "diff", "json", ""):
        if block.language == "toml":
            assert block.file is not None
        elif block.language == "text" and not any(word in block.text for word in compared):
            indented = "".join(f"    {line}\n" for line in block.text.splitlines())
            assert indented in base, "the order of the calls is not the contract's"
    languages = set(re.findall(r"^```(\w+)$", guide.text, re.MULTILINE))
    assert languages == {"toml", "python", "console", "text", "diff"}


def test_another_output_is_caught(guide: Any) -> None:
    shown = shown_text(guide, "To repeat it")
    assert_printed(shown, f"before\n{shown}after\n")
    for wrong in (shown.replace("position 0", "position 1"), shown.replace("-1.58727", "-2.5")):
        assert wrong != shown
        with pytest.raises(AssertionError):
            assert_printed(shown, wrong)
