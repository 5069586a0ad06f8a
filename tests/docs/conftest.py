"""The pages of the documentation, taken apart."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

import isobit

ROOT = Path(isobit.__file__).parent
_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>.+) -->\n+)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block. ``line`` is where its text begins; ``skip`` is why it is not run."""

    language: str
    text: str
    line: int
    skip: str | None


@dataclass(frozen=True)
class Page:
    """One page; ``blocks`` reads them from the text, so that a test can pass its own."""

    name: str
    path: Path
    text: str

    def blocks(self, *languages: str) -> Iterator[Block]:
        for match in _BLOCK.finditer(self.text):
            if match["language"] in languages:
                line = self.text.count("\n", 0, match.start("text")) + 1
                yield Block(match["language"], match["text"], line, match["reason"])


def all_pages() -> list[Page]:
    paths = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
    return [Page(str(path.relative_to(ROOT)), path, path.read_text()) for path in paths]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for ``page`` runs once for every page."""
    if "page" in metafunc.fixturenames:
        found = all_pages()
        metafunc.parametrize("page", found, ids=[page.name for page in found])


@pytest.fixture(scope="session")
def pages() -> list[Page]:
    return all_pages()


@pytest.fixture(scope="session")
def generator() -> ModuleType:
    """``docs/generate.py``, imported by its path, with its own folder on the path."""
    sys.path.insert(0, str(ROOT / "docs"))
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
