"""The reports in a browser, where Chromium is installed: drawn, in light and in dark."""

from __future__ import annotations

import shutil
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any

import pytest

from isobit.verify.page import matrix_page

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
SCHEMES = {"dark": 0, "light": 1}  # Chromium's numbers for prefers-color-scheme
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on PATH"
)


def chromium(page: Path, *options: str) -> str:
    """What Chromium prints for a page, with a profile of its own beside it."""
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--virtual-time-budget=2000",
        f"--user-data-dir={page.parent / 'profile'}",
        *options,
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout


def pixels(png: bytes) -> list[bytes]:
    """The rows of an 8-bit PNG without interlacing, unfiltered."""
    chunks, at = {b"IDAT": b"", b"IHDR": b""}, 8
    while at < len(png):
        (length,), kind = struct.unpack(">I", png[at : at + 4]), png[at + 4 : at + 8]
        if kind in chunks:
            chunks[kind] += png[at + 8 : at + 8 + length]
        at += length + 12
    width, height, _, colour = struct.unpack(">IIBB", chunks[b"IHDR"][:10])
    size = {2: 3, 6: 4}[colour]
    data, rows, above = zlib.decompress(chunks[b"IDAT"]), [], bytes(width * size)
    for row in range(height):
        begin = row * (width * size + 1)
        line = bytearray(data[begin + 1 : begin + 1 + width * size])
        above = unfiltered(data[begin], line, above, size)
        rows.append(above)
    return rows


def unfiltered(kind: int, line: bytearray, above: bytes, size: int) -> bytes:
    """One row of a PNG, by the five filters of its standard."""
    for i in range(len(line) if kind else 0):
        left, up = (line[i - size] if i >= size else 0), above[i]
        corner = above[i - size] if i >= size else 0
        # min takes the first of equals: left before up before corner, as the standard asks
        nearest = min((left, up, corner), key=lambda value: abs(left + up - corner - value))
        line[i] = (line[i] + (0, left, up, (left + up) // 2, nearest)[kind]) % 256
    return bytes(line)


def picture(page: Path, scheme: str) -> list[bytes]:
    target = page.with_name(f"{page.stem}-{scheme}.png")
    chromium(
        page,
        f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
        "--window-size=520,420",
        f"--screenshot={target}",
    )
    return pixels(target.read_bytes())


def brightness(rows: list[bytes]) -> float:
    return sum(map(sum, rows)) / sum(map(len, rows))


def assert_drawn(page: Path, background: tuple[str, str]) -> None:
    """Not blank in either scheme, and light is light and dark is dark."""
    drawn = {scheme: picture(page, scheme) for scheme in SCHEMES}
    for rows in drawn.values():
        assert len({row[i : i + 3] for row in rows for i in range(0, len(row), 3)}) > 50
    assert drawn["light"][0][:3].hex() == background[0]
    assert drawn["dark"][0][:3].hex() == background[1]
    assert brightness(drawn["light"]) > 180
    assert brightness(drawn["dark"]) < 75


def test_the_failing_page_is_drawn_with_its_plots(
    tmp_path: Path, failing: tuple[str, dict[str, Any]]
) -> None:
    page = tmp_path / "failing.html"
    page.write_text(failing[0], encoding="utf-8")
    assert_drawn(page, ("f7f7f5", "131619"))
    dom = chromium(page, "--dump-dom")
    for name, verdict in failing[1].items():
        assert f'<th scope="row">{name}</th>' in dom
        assert all(run.label in dom for run in verdict.results)
    assert "layers.2.mlp.down_proj · position" in dom


def test_the_matrix_is_drawn(
    tmp_path: Path, matrix_sample: tuple[list[dict[str, Any]], list[dict[str, Any]]]
) -> None:
    page = tmp_path / "matrix.html"
    page.write_text(matrix_page(*matrix_sample, command="isobit backends"), encoding="utf-8")
    assert_drawn(page, ("f7f7f5", "131619"))
    dom = chromium(page, "--dump-dom")
    assert dom.count('class="good"') > dom.count('class="bad"') > 0


def test_a_blank_page_would_be_noticed(tmp_path: Path) -> None:
    page = tmp_path / "blank.html"
    page.write_text("<!doctype html><title>blank</title>", encoding="utf-8")
    with pytest.raises(AssertionError):
        assert_drawn(page, ("ffffff", "ffffff"))
