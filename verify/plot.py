"""The geometry of a divergence's plot: positions along x, layers along y, in bounded size.

Long sequences are binned: a column then stands for several positions, and differs where one of
them does, so no difference is lost. All lengths are in the SVG's units, pixels at full width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .locate import Divergence

_WIDTH, _NARROWEST = 960, 480
_LEFT, _TOP, _RIGHT = 76, 30, 12
_MAX_COLUMNS = 120
_MAX_CELL_WIDTH = 26
_GAPS_FROM = 9  # narrower cells are drawn as one bar
_TALL_ROWS = 40  # more layers than these get low rows, and every fourth its name

_States = Sequence[str | None]


@dataclass(frozen=True, slots=True)
class Plot:
    """What the template draws.

    ``equal``, ``differing`` and ``absent`` are path data; ``rows`` and ``ticks`` are labels with
    their y and x; ``first`` is the marked cell's x, y and width; ``span`` is how many positions a
    column stands for.
    """

    width: int
    height: int
    bottom: int
    cell_height: int
    rows: list[tuple[float, str]]
    ticks: list[tuple[float, str]]
    equal: str
    differing: str
    absent: str
    first: tuple[float, float, float]
    label_left: bool
    span: int


def plot(divergence: Divergence) -> Plot:
    """Lay a divergence's grid out."""
    positions = len(divergence.grid[0])
    span = -(-positions // _MAX_COLUMNS)
    columns = -(-positions // span)
    width = min(_MAX_CELL_WIDTH, (_WIDTH - _LEFT - _RIGHT) / columns)
    tall = len(divergence.layers) <= _TALL_ROWS
    height = 15 if tall else 7
    paths: dict[str, list[str]] = {"equal": [], "differing": [], "absent": []}
    for index, row in enumerate(divergence.grid):
        y = _TOP + index * height
        for state, begin, stop in _bars([_state(row[p : p + span]) for p in _steps(row, span)]):
            for left, right in _cells(begin, stop, width):
                paths[state].append(_rect(_LEFT + left, y, right - left - 1, height - 1))
    total = max(_NARROWEST, round(_LEFT + columns * width) + _RIGHT)
    bottom = _TOP + len(divergence.layers) * height
    first_row = next(
        i for i, row in enumerate(divergence.grid) if row[divergence.position] == divergence.op
    )
    first_x = _LEFT + divergence.position // span * width
    return Plot(
        width=total,
        height=bottom + 40,
        bottom=bottom,
        cell_height=height - 1,
        rows=[
            (_TOP + i * height + height / 2, name)
            for i, name in enumerate(divergence.layers)
            if tall or i % 4 == 1 or i in (0, len(divergence.layers) - 1)
        ],
        ticks=[(round(_LEFT + (p // span + 0.5) * width, 1), f"{p:,}") for p in _ticks(positions)],
        equal="".join(paths["equal"]),
        differing="".join(paths["differing"]),
        absent="".join(paths["absent"]),
        first=(round(first_x, 1), _TOP + first_row * height, round(max(width - 1, 3), 1)),
        label_left=first_x < total / 2,
        span=span,
    )


def _steps(row: _States, span: int) -> range:
    return range(0, len(row), span)


def _state(cells: _States) -> str:
    if any(cells):
        return "differing"
    return "absent" if all(cell is None for cell in cells) else "equal"


def _bars(states: Sequence[str]) -> list[tuple[str, int, int]]:
    """Runs of one state: (state, first column, column after the last)."""
    bars, begin = [], 0
    for state, run in groupby(states):
        stop = begin + len(list(run))
        bars.append((state, begin, stop))
        begin = stop
    return bars


def _cells(begin: int, stop: int, width: float) -> list[tuple[float, float]]:
    """A bar's cells as (left, right): one a column where there is room for gaps between them."""
    if width < _GAPS_FROM:
        return [(begin * width, stop * width + 1)]
    return [(column * width, (column + 1) * width) for column in range(begin, stop)]


def _rect(x: float, y: float, width: float, height: float) -> str:
    return f"M{x:.4g} {y:.4g}h{width:.4g}v{height:.4g}h-{width:.4g}z"


def _ticks(positions: int) -> list[int]:
    """About six round positions, from 0."""
    step = 1
    while positions / step > 6:
        step = step * 5 // 2 if str(step)[0] == "2" else step * 2
    return list(range(0, positions, step))
