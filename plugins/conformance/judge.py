"""Runs a trial and says where it fails, if it does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .audit import bits
from .reference import attend
from .rig import Factory, Outputs, execute
from .scenario import Run, Trial
from .values import all_rows

_ALL_ROWS = 600
_EDGES = (64, 128, 256, 512, 1024, 2048, 4096, 8192)


@dataclass(frozen=True, slots=True)
class Difference:
    """The first row that is wrong, and how; ``sequence`` is -1 where nothing was computed."""

    sequence: int
    position: int
    message: str


class Judge:
    """Judges trials for one backend; remembers the last outputs, which the next trial may share.

    probe:   raises where this process cannot use the device any more; None if that cannot be
    lost_to: the check and the trial that left the device unusable; empty while it is usable
    """

    def __init__(self, factory: Factory, probe: Callable[[], None] | None = None) -> None:
        self._factory = factory
        self._remembered: tuple[Any, Outputs] | None = None
        self.probe = probe
        self.lost_to = ""

    def device_usable(self) -> bool:
        """Whether what this process runs now says anything; to be asked after a failure.

        CUDA gives a process no second context: after an illegal memory access all else fails too.
        """
        if self.probe is None:
            return True
        try:
            self.probe()
        except Exception:  # torch's error has another class in each version
            return False
        return True

    def judge(self, trial: Trial) -> Difference | None:
        """The first difference, or ``None`` where the trial holds."""
        try:
            found = execute(self._factory, trial.geometry, trial.sequences, trial.run)
            against = self._expected(trial, trial.against) if trial.against else None
        except Exception as error:  # whatever a backend raises is its answer
            return Difference(-1, -1, f"it raised {type(error).__name__}: {error}")
        if against is None:
            return _against_reference(trial, found)
        return _against_bits(found, against)

    def _expected(self, trial: Trial, run: Run) -> Outputs:
        key = (trial.geometry, trial.sequences, run)
        if self._remembered is None or self._remembered[0] != key:
            self._remembered = (key, execute(self._factory, *key))
        return self._remembered[1]


def _against_bits(found: Outputs, against: Outputs) -> Difference | None:
    for index, (mine, theirs) in enumerate(zip(found.rows, against.rows, strict=True)):
        both = (found.computed[index] & against.computed[index]).to(mine.device)
        wrong = (bits(mine) != bits(theirs)) | mine.isnan()
        wrong &= both[:, None, None]
        if wrong.any():
            position, head, channel = (int(i) for i in wrong.nonzero()[0])
            one, other = mine[position, head, channel], theirs[position, head, channel]
            return Difference(
                index,
                position,
                f"position {position} of sequence {index}: query head {head}, channel {channel} is "
                f"{_exact(one)} one way and {_exact(other)} the other "
                f"({int(wrong.flatten(1).any(1).sum())} rows of the sequence differ)",
            )
    return None


def _against_reference(trial: Trial, found: Outputs) -> Difference | None:
    values = all_rows(trial.sequences, trial.geometry)
    for index, (rows, mine) in enumerate(zip(values, found.rows, strict=True)):
        if not found.computed[index].any():
            continue
        positions = _chosen(found.computed[index]).to(mine.device)
        expected = attend(rows, positions, trial.geometry)
        error = (mine[positions].double() - expected.out).abs()
        wrong = ~(error <= expected.bound)  # NaN is wrong too
        if wrong.any():
            row, head, channel = (int(i) for i in wrong.nonzero()[0])
            position = int(positions[row])
            return Difference(
                index,
                position,
                f"position {position} of sequence {index}: query head {head}, channel {channel} is "
                f"{float(mine[position, head, channel]):.6g}, and attention in float64 gives "
                f"{float(expected.out[row, head, channel]):.6g}, to within "
                f"{float(expected.bound[row, head, channel]):.2g}",
            )
    return None


def _chosen(computed: Tensor) -> Tensor:
    """Which rows are compared with fp64: all of a short sequence, of a long one those at edges."""
    positions = computed.nonzero()[:, 0]
    if len(positions) <= _ALL_ROWS:
        return positions
    length = len(computed)
    chosen = {*range(70), *range(length - 70, length)}
    chosen |= {edge + d for edge in _EDGES for d in range(-2, 3) if edge + d < length}
    chosen |= set(range(0, length, 97))
    return torch.tensor(sorted(set(positions.tolist()) & chosen))


def _exact(value: Tensor) -> str:
    return float(value).hex()


def shrink(
    judge: Judge, trial: Trial, difference: Difference, budget: int = 40
) -> tuple[Trial, Difference]:
    """The smallest trial found that still fails: fewer sequences, then fewer positions.

    It ends where a smaller one leaves the device unusable, as none after it could be judged.
    """
    for smaller in _smaller(trial, difference):
        budget -= 1
        if budget < 0:
            break
        still = judge.judge(smaller)
        if still is not None and not judge.device_usable():
            break
        if still is not None and (still.sequence >= 0) == (difference.sequence >= 0):
            return shrink(judge, smaller, still, budget)
    return trial, difference


def _smaller(trial: Trial, difference: Difference) -> list[Trial]:
    """Trials that are one step smaller, the boldest first."""
    failing = difference.sequence
    others = [index for index in range(len(trial.sequences)) if index != failing]
    half = len(others) // 2
    found = [_without(trial, set(some)) for some in (others, others[half:], others[:half])]
    found += [_without(trial, {index}) for index in others]
    if failing >= 0:
        seen, length = difference.position + 1, trial.sequences[failing].length
        found += [_shortened(trial, failing, n) for n in (seen, seen + 1, (seen + length) // 2)]
    for index in others:
        half = trial.sequences[index].length // 2
        found += [_shortened(trial, index, n) for n in (1, half)]
    return [t for t in found if t.run.steps and (t.against is None or t.against.steps)]


def _without(trial: Trial, left_out: set[int]) -> Trial:
    """The trial with fewer sequences; without steps where it could not be run, or is no smaller."""
    kept = [index for index in range(len(trial.sequences)) if index not in left_out]
    number = {old: new for new, old in enumerate(kept)}
    sources = {s.prefix_of for s in (trial.sequences[i] for i in kept)} - {None}
    if not left_out or not sources <= set(kept):
        return _not_run(trial)

    def cut(run: Run) -> Run:
        steps = (
            tuple(replace(p, sequence=number[p.sequence]) for p in step if p.sequence in number)
            for step in run.steps
        )
        return replace(run, steps=tuple(filter(None, steps)))

    sequences = (
        replace(s, prefix_of=None if s.prefix_of is None else number[s.prefix_of])
        for s in (trial.sequences[i] for i in kept)
    )
    return replace(_every_run(trial, cut), sequences=tuple(sequences))


def _shortened(trial: Trial, index: int, keep: int) -> Trial:
    """The trial with only the first ``keep`` positions of one sequence, at least one."""
    sequence = trial.sequences[index]
    if not 0 < keep < sequence.length or any(s.prefix_of == index for s in trial.sequences):
        return _not_run(trial)

    def cut(run: Run) -> Run:
        steps = (
            tuple(
                replace(p, stop=min(p.stop, keep)) if p.sequence == index else p
                for p in step
                if p.sequence != index or p.start < keep
            )
            for step in run.steps
        )
        return replace(run, steps=tuple(filter(None, steps)))

    sequences = list(trial.sequences)
    sequences[index] = replace(sequence, length=keep, prefix=min(sequence.prefix, keep))
    return replace(_every_run(trial, cut), sequences=tuple(sequences))


def _every_run(trial: Trial, change: Callable[[Run], Run]) -> Trial:
    against = change(trial.against) if trial.against else None
    return replace(trial, run=change(trial.run), against=against)


def _not_run(trial: Trial) -> Trial:
    return replace(trial, run=replace(trial.run, steps=()))
