"""Does a replayed graph give what an ordinary step gives?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..check import Check, needs_feature, trial_check
from ..corners import Corners
from ..scenario import Geometry, Run, Sequence, Trial, then_decode, together

_CELLS = ("cuda_graph",)


def _crowds(corners: Corners) -> Iterator[list[int]]:
    """Lengths before decoding; short ones first, then some beside the edges of splits."""
    yield [2]
    yield [15, 1, 63]
    yield [20, 127, 5, 255, 64]
    yield [1 + 29 * i % 100 for i in range(17)]
    yield [510, 3, 1022 if not corners.quick else 400]
    if not corners.quick:
        yield [corners.longest - 8, 4095, 2]


def _graphs(corners: Corners) -> Iterator[Trial]:
    geometries = list(corners.bases())
    geometries.append(replace(corners.base, num_q_heads=9, num_kv_heads=3))
    if corners.lacks("sliding_window") is None:
        geometries.append(replace(corners.base, sliding_window=50))
    for geometry in geometries:
        for lengths in _crowds(corners):
            # The first ends early, so that batches shrink and a smaller graph is replayed.
            pieces = [then_decode(i, n, n + (2 if i == 0 else 6)) for i, n in enumerate(lengths)]
            sequences = tuple(Sequence(length=n + 6, seed=i) for i, n in enumerate(lengths))
            steps = together(*pieces)
            deterministic = corners.capabilities.deterministic
            yield Trial(
                label=f"{geometry.dtype}, {len(lengths)} sequences of up to {max(lengths)} tokens",
                cells=_CELLS,
                geometry=geometry,
                sequences=sequences,
                run=Run(steps=steps, graph=True),
                against=Run(steps=steps) if deterministic else None,
            )
            yield Trial(
                label=f"{geometry.dtype}, {len(lengths)} sequences on pages that held NaN",
                cells=_CELLS,
                geometry=geometry,
                sequences=sequences,
                run=Run(steps=steps, graph=True, unwritten="nan"),
            )
        yield _between_mixed_steps(corners, geometry)


def _between_mixed_steps(corners: Corners, geometry: Geometry) -> Trial:
    """Every second step some prefill while others decode; the steps between are replayed."""
    lengths = [20, 127, 5, 255, 64]
    pieces = [then_decode(i, n, n + 6) for i, n in enumerate(lengths)]
    steps = together(*pieces, delays=(0, 2, 4, 6, 6))
    return Trial(
        label=f"{geometry.dtype}, {len(lengths)} sequences, replays between steps that prefill too",
        cells=_CELLS,
        geometry=geometry,
        sequences=tuple(Sequence(length=n + 6, seed=i) for i, n in enumerate(lengths)),
        run=Run(steps=steps, graph=True),
        against=Run(steps=steps) if corners.capabilities.deterministic else None,
    )


CHECKS: tuple[Check, ...] = (
    trial_check(
        "graph",
        "replayed graphs give what ordinary steps give, whatever was captured, whatever ran since",
        _CELLS,
        _graphs,
        needs_feature("cuda_graph"),
    ),
)
