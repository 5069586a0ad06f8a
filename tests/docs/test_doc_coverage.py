"""What exists is mentioned, what is linked exists, and generated parts are up to date."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from isobit.backends.base import AttentionBackend, AttentionConfig, Batch, LayerCache
from isobit.backends.capabilities import (
    FEATURES,
    BackendSpec,
    Capabilities,
    Refusal,
    Requirements,
)
from isobit.core.config import EngineConfig
from isobit.plugins import hookspecs
from isobit.plugins.conformance.registry import CHECKS
from isobit.plugins.conformance.values import KINDS
from isobit.sampling.params import SamplingParams

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def hook_signatures() -> list[str]:
    """Every hook as the documentation must spell it: ``isobit_check(config, spec)``."""
    hooks = inspect.getmembers(hookspecs, inspect.isfunction)
    return [
        f"{name}({', '.join(inspect.signature(function).parameters)})"
        for name, function in hooks
        if name.startswith("isobit_")
    ]


def method_signatures(cls: type) -> list[str]:
    """Every method of a class as the documentation must spell it: ``plan(batch)``."""
    return [
        f"{name}({', '.join([*inspect.signature(method).parameters][1:])})"
        for name, method in inspect.getmembers(cls, inspect.isfunction)
        if name == "__init__" or not name.startswith("_")
    ]


def unmentioned(names: Iterable[str], text: str) -> list[str]:
    """Those of ``names`` that stand nowhere in ``text`` as a word of their own."""
    return [name for name in names if not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)]


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def broken_links(page: Any) -> list[str]:
    """Links of a page to files or headings that do not exist; the web is not asked."""
    broken = []
    for link in _LINK.findall(_FENCED.sub("", page.text)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, fragment = link.partition("#")
        target = page.path.parent / name if name else page.path
        if not target.exists():
            broken.append(link)
        elif fragment:
            text = page.text if target == page.path else target.read_text()
            if fragment not in {anchor(heading) for heading in _HEADING.findall(text)}:
                broken.append(link)
    return broken


CONTRACT = (
    AttentionConfig,
    Batch,
    BackendSpec,
    Capabilities,
    LayerCache,
    Refusal,
    Requirements,
)


@pytest.mark.parametrize("cls", [EngineConfig, SamplingParams, *CONTRACT])
def test_every_field_is_documented(cls: Any, pages: list[Any]) -> None:
    text = "\n".join(page.text for page in pages)
    assert unmentioned([f"`{field.name}`" for field in fields(cls)], text) == []


def test_every_call_check_and_kind_of_values_is_in_the_guide(pages: list[Any]) -> None:
    guide = next(page.text for page in pages if page.name == "docs/plugins.md")
    calls = method_signatures(AttentionBackend)
    assert {"plan(batch)", "replay(plan, batch)"} <= set(calls)
    checks = [f"| `{check.name}` |" for check in CHECKS]
    kinds = [f"`{kind}`" for kind in KINDS]
    assert unmentioned([f"`{call}`" for call in calls] + checks + kinds, guide) == []


def test_every_feature_and_hook_is_documented(pages: list[Any]) -> None:
    text = "\n".join(page.text for page in pages)
    assert len(hook_signatures()) >= 2
    assert unmentioned([*FEATURES, *hook_signatures()], text) == []


def test_an_undocumented_name_is_caught(pages: list[Any]) -> None:
    text = "\n".join(page.text for page in pages)
    missing = ["`page_siz`", "isobit_check(config)", "`plan()`", "| `chunks` |"]
    known = ["`page_size`", "isobit_check(config, spec)", "`plan(batch)`", "| `chunk` |"]
    assert unmentioned([*missing, *known], text) == missing


def test_links_lead_somewhere(page: Any) -> None:
    assert broken_links(page) == []


def test_a_broken_link_is_caught(page: Any) -> None:
    text = "# A heading\n[a](#a-heading) [b](#no-heading) [c](nowhere.md) [d](https://e.org/x)\n"
    assert broken_links(type(page)(page.name, page.path, text)) == ["#no-heading", "nowhere.md"]


def test_every_page_is_linked_from_the_readme(pages: list[Any]) -> None:
    readme = next(page for page in pages if page.name == "README.md")
    others = {page.name for page in pages} - {"README.md"}
    assert others <= set(_LINK.findall(readme.text))


def test_generated_parts_are_up_to_date(page: Any, generator: ModuleType) -> None:
    assert generator.rendered(page.path) == page.text, "run python docs/generate.py"


def test_an_unexplained_field_stops_the_generator(generator: ModuleType) -> None:
    @dataclass
    class Options:
        """Two options.

        :param size: how large;
            in tokens.
        """

        size: int = 1
        colour: str | None = None

    assert generator.meanings(Options) == {"size": "how large; in tokens."}
    with pytest.raises(SystemExit, match="colour"):
        generator.fields_of(Options)()


def test_a_command_that_fails_stops_the_generator(generator: ModuleType) -> None:
    with pytest.raises(SystemExit, match="status 2"):
        generator.console("isobit generate --model nowhere hi")


def test_a_proof_of_another_declaration_is_refused(
    generator: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proved = sys.modules["proved"]
    record = json.loads((proved.FOLDER / "torch-cpu.json").read_text())
    monkeypatch.setattr(proved, "FOLDER", tmp_path)
    (tmp_path / "torch-cpu.json").write_text(json.dumps(record))
    assert "✓ (a)" in generator.matrix()
    record["cells"]["dtypes"]["declared"] = "float64"
    (tmp_path / "torch-cpu.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit, match="another declaration of dtypes: run isobit plugins test"):
        generator.matrix()
