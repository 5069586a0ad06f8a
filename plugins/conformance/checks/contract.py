"""What every backend must hold, whatever it declares: memory, layers, the user's generators."""

from __future__ import annotations

from collections.abc import Iterator

from ..check import CONTRACT, Check, trial_check
from ..corners import Corners
from ..scenario import Run, Sequence, Trial, alone, then_decode, together

_CELLS = (CONTRACT,)
_WRITES = (CONTRACT, "engine_writes_kv")


def _sequences(lengths: list[int]) -> tuple[Sequence, ...]:
    return tuple(Sequence(length=n + 3, seed=i) for i, n in enumerate(lengths))


def _unwritten(corners: Corners) -> Iterator[Trial]:
    for geometry in corners.bases():
        for lengths in ([1], [geometry.page_size + 1, 3], [70, 1, 33, 129]):
            pieces = [then_decode(i, n, n + 3) for i, n in enumerate(lengths)]
            yield Trial(
                label=f"{geometry.dtype}, {len(lengths)} sequences on pages that held NaN",
                cells=_CELLS,
                geometry=geometry,
                sequences=_sequences(lengths),
                run=Run(steps=together(*pieces), unwritten="nan"),
            )


def _writes(corners: Corners) -> Iterator[Trial]:
    for geometry in corners.bases():
        for lengths in ([1], [17, 3], [70, 1, 33, 129]):
            pieces = [then_decode(i, n, n + 3) for i, n in enumerate(lengths)]
            yield Trial(
                label=f"{geometry.dtype}, {len(lengths)} sequences",
                cells=_WRITES,
                geometry=geometry,
                sequences=_sequences(lengths),
                run=Run(steps=together(*pieces, delays=(0, 1)), audit=True, layers=2),
            )


def _layers(corners: Corners) -> Iterator[Trial]:
    for geometry in corners.bases():
        lengths = [40, 9]
        steps = together(*(then_decode(i, n, n + 3) for i, n in enumerate(lengths)))
        yield Trial(
            label=f"{geometry.dtype}, the third of three layers",
            cells=_CELLS,
            geometry=geometry,
            sequences=_sequences(lengths),
            run=Run(steps=steps, layers=3),
        )


def _generators(corners: Corners) -> Iterator[Trial]:
    yield Trial(
        label="a prefill and a decode",
        cells=_CELLS,
        geometry=corners.base,
        sequences=_sequences([40]),
        run=Run(steps=alone(then_decode(0, 40, 41)), generators=True),
    )


CHECKS: tuple[Check, ...] = (
    trial_check(
        "unwritten",
        "what a slot holds that nobody has written never reaches out, not even NaN",
        _CELLS,
        _unwritten,
    ),
    trial_check("layers", "one plan serves all layers, each with its own cache", _CELLS, _layers),
    trial_check(
        "writes",
        "only the rows' own slots and out are written; arguments stay as they were",
        _WRITES,
        _writes,
    ),
    trial_check(
        "generators",
        "the global generators are neither read nor set",
        _CELLS,
        _generators,
    ),
)
