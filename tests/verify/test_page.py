"""The HTML reports: whole, self-contained, and with what was found in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import isobit
from isobit import LLM
from isobit.backends.capabilities import Requirements
from isobit.backends.table import matrix_rows
from isobit.plugins.manager import PluginHost
from isobit.verify.judge import Verdict
from isobit.verify.locate import Divergence
from isobit.verify.modes import ModeResult
from isobit.verify.page import CELLS, TEMPLATES, matrix_page, verify_page
from isobit.verify.plot import plot

COMMAND = "isobit verify --model 'a b' --report page.html"
VOID = {"meta", "link", "wbr", "path", "line", "rect"}


class Page(HTMLParser):
    """Checks nesting while it reads; gathers tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)


def assert_self_contained(html: str) -> None:
    page = Page(html)
    assert not {"script", "img", "iframe", "object", "embed"} & set(page.tags)
    loading = {"src", "href", "srcset", "data", "action", "xlink:href"}
    assert {value for name, value in page.attributes if name in loading} == {"data:,"}
    assert "url(" not in html
    assert "@import" not in html
    assert "default-src 'none'" in html


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("tiny-qwen3", load_format="random") as llm:
        yield llm


def test_a_failing_page_shows_the_op_the_runs_and_the_plot(
    failing: tuple[str, dict[str, Verdict]],
) -> None:
    html, verdicts = failing
    assert_self_contained(html)
    page = Page(html)
    found = verdicts["batch"].divergence
    assert found is not None
    assert found.op == "layers.2.mlp.down_proj"
    assert f"{found.op} · position {found.position}" in page.text
    assert "not hold: batch" in page.text
    assert "✗ FAILS" in page.text
    assert "✓ holds" in page.text
    traced = [verdict for verdict in verdicts.values() if verdict.divergence]
    assert page.tags.count("svg") == len(traced) > 1
    for verdict in verdicts.values():
        assert verdict.runs == len(verdict.results)
        for run in verdict.results:
            assert run.label in page.text
            assert run.digest in page.text
    assert any(not run.equal for run in verdicts["batch"].results)
    assert all(run.equal for run in verdicts["rng"].results)


def test_the_grid_agrees_with_the_first_difference(
    failing: tuple[str, dict[str, Verdict]],
) -> None:
    found = failing[1]["batch"].divergence
    assert found is not None
    assert found.layers == ("embedding", *(f"layer {i}" for i in range(4)), "logits")
    assert found.grid[3][found.position] == found.op
    assert all(row[p] in ("", None) for row in found.grid for p in range(found.position))
    assert [row[found.position] for row in found.grid[:3]] == ["", "", ""]
    row = failing[1]["batch"].as_dict()["divergence"]
    assert isinstance(row, dict)
    assert row["op"] == found.op
    assert "grid" not in row


def test_a_clean_page_has_no_plot(llm: LLM) -> None:
    verdict = Verdict("restart", (), 0, "", 0.0, skipped="<no> & none")
    html = verify_page(llm.report, command=COMMAND, verdicts=[verdict])
    assert_self_contained(html)
    page = Page(html)
    assert "svg" not in page.tags
    assert "○ not run" in page.text
    assert "<no> & none" in page.text  # escaped in the source, whole in the text
    assert COMMAND in page.text
    assert llm.fingerprint in page.text
    assert "tiny-qwen3" in page.text


def test_the_other_modes_have_a_table(llm: LLM) -> None:
    results = [ModeResult(f"Prompt {i}", n, u) for i, (n, u) in enumerate([(9, 1), (8, 3), (0, 0)])]
    html = verify_page(llm.report, command=COMMAND, modes=results)
    assert_self_contained(html)
    assert "1 of 2 prompts gave more than one result: Prompt 1." in Page(html).text
    assert "○ not run" in Page(html).text
    assert "Invariances" not in html


def test_the_matrix_has_declared_beside_proved(
    matrix_sample: tuple[list[dict[str, Any]], list[dict[str, Any]]],
) -> None:
    rows, proofs = matrix_sample
    html = matrix_page(rows, proofs, command=COMMAND)
    assert_self_contained(html)
    page = Page(html)
    for name in CELLS:
        assert name.split("_")[-1] in page.text
    for sign in ("✓ proved", "✗ failed", "~ waived", "○ unproved", "not declared"):
        assert sign in page.text
    assert "replay('other', check='check_1', seed=17) # <b>" in page.text
    assert "<b>" not in html
    assert "1 failed, 1 waived, 1 not proved." in page.text
    assert 'class="sentence bad"' in html


def test_a_matrix_against_what_is_asked_has_the_refusals() -> None:
    asked = Requirements(
        dtype="float16",
        head_dim=64,
        page_size=16,
        device="cpu",
        compute_capability=None,
        deterministic=True,
        features={},
    )
    html = matrix_page(matrix_rows(PluginHost(), asked), [], command=COMMAND)
    assert_self_contained(html)
    assert "serves what is asked" in html
    assert "wanted float16" in Page(html).text


def test_a_matrix_without_proofs_says_so() -> None:
    html = matrix_page(matrix_rows(PluginHost()), [], command=COMMAND)
    assert_self_contained(html)
    assert "Nothing was proved" in html
    assert "proved on" not in html
    assert "serves what is asked" not in html


def divergence(positions: int, layers: int, first: int) -> Divergence:
    """One that starts at ``first`` in the middle layer and spreads to all that follows."""
    middle = layers // 2

    def row(index: int) -> tuple[str, ...]:
        if index < middle:
            return ("",) * positions
        begin = first if index == middle else first + 1
        return tuple("x" if p >= begin and (p + index) % 3 else "" for p in range(positions))

    grid = [list(row(index)) for index in range(layers)]
    grid[middle][first] = "x"
    names = tuple(f"layer {i}" for i in range(layers))
    return Divergence("run", "case", 1, first, "x", names, tuple(map(tuple, grid)))


@pytest.mark.parametrize("positions", [1, 7, 120, 121, 4000, 100_000])
@pytest.mark.parametrize("layers", [3, 82])
def test_a_plot_of_any_length_is_small_and_keeps_the_first_difference(
    positions: int, layers: int
) -> None:
    first = positions * 2 // 3
    drawn = plot(divergence(positions, layers, first))
    size = len(drawn.equal) + len(drawn.differing) + len(drawn.absent)
    assert size < 150_000
    assert -(-positions // drawn.span) <= 120
    x, y, width = drawn.first
    corners = re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)", drawn.differing)
    assert any(
        float(cy) == y and float(cx) - 1 <= x <= float(cx) + float(w) for cx, cy, w in corners
    )
    assert 0 < x + width <= drawn.width
    assert 1 <= len(drawn.ticks) <= 7


def test_a_difference_in_sampling_has_a_row_of_its_own() -> None:
    grid = (("", ""), (None, ""), (None, "sampling"))
    drawn = plot(Divergence("r", "c", 0, 1, "sampling", ("embedding", "logits", "sampling"), grid))
    assert drawn.first[1] == drawn.rows[2][0] - 7.5
    assert drawn.differing.count("M") == 1


def contrast(one: str, other: str) -> float:
    """WCAG's contrast ratio of two colours ``#rrggbb``."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_every_text_can_be_read_in_light_and_dark() -> None:
    style = (TEMPLATES / "style.css").read_text()
    schemes = [
        dict(re.findall(r"--([\w-]+): (#\w{6})", block))
        for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    ]
    assert len(schemes) == 3  # light, dark, print
    for colours in schemes:
        pairs = [(f"{kind}-text", kind) for kind in ("good", "bad", "warn", "none")]
        pairs += [(ink, paper) for ink in ("text", "muted") for paper in ("page", "surface")]
        pairs += [("bad-text", "surface")]
        for ink, paper in pairs:
            assert contrast(colours[ink], colours[paper]) >= 4.5, (ink, paper)
        assert contrast(colours["strong"], colours["quiet"]) >= 3
        assert contrast(colours["mark"], colours["strong"]) >= 3
    assert contrast("#777777", "#ffffff") < 4.5  # the check can fail


def test_the_templates_are_shipped() -> None:
    pyproject = (Path(isobit.__file__).parent / "pyproject.toml").read_text()
    assert '"isobit.verify" = ["templates/*"]' in pyproject
