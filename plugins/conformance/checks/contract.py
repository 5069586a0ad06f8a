"""What every backend must hold, whatever it declares: memory, layers, the user's generators."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch

from ..check import CONTRACT, Check, Context, Finding, trial_check
from ..corners import Corners
from ..rig import execute
from ..scenario import Run, Sequence, Trial, then_decode, together, whole

_CELLS = (CONTRACT,)


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
                cells=_CELLS,
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


def _rng(context: Context) -> Iterator[Finding]:
    """Runs a step between two looks at the global generators."""
    geometry = replace(context.corners.base, deterministic=True)
    sequences = (Sequence(length=40),)
    before = _states()
    try:
        execute(context.subject.factory, geometry, sequences, Run(steps=(whole(0, 40),)))
        changed = [name for name, state in _states().items() if state != before[name]]
        failure = f"the global generator of {', '.join(changed)} was read or set" if changed else ""
    except Exception as error:  # whatever a backend raises is its answer
        failure = f"it raised {type(error).__name__}: {error}"
    yield Finding("one prefill", _CELLS, failure)


def _states() -> dict[str, object]:
    states: dict[str, object] = {
        "random": random.getstate(),
        "NumPy": str(np.random.get_state()),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }
    if torch.cuda.is_available():
        states["torch.cuda"] = torch.cuda.get_rng_state().numpy().tobytes()
    return states


CHECKS: tuple[Check, ...] = (
    trial_check(
        "unwritten",
        "what a slot holds that nobody has written never reaches out, not even NaN",
        _CELLS,
        _unwritten,
    ),
    trial_check(
        "writes",
        "only the rows' own slots and out are written; arguments stay as they were",
        _CELLS,
        _writes,
    ),
    trial_check("layers", "one plan serves all layers, each with its own cache", _CELLS, _layers),
    Check(
        "generators",
        "the global generators are neither read nor set",
        _CELLS,
        lambda corners: None,
        _rng,
    ),
)
