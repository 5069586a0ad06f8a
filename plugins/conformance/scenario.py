"""What a trial runs, as plain data: shapes, sequences, and the steps that compute them.

Everything that a failure needs to be repeated is in a ``Trial``; its values are drawn from seeds.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from ...errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """What the backend is built for; the fields of ``AttentionConfig``, as plain data.

    ``dtype`` is a name as torch spells it, ``device`` a device type. ``engine_writes_kv`` is as the
    backend declares.
    """

    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    dtype: str = "float32"
    device: str = "cpu"
    sliding_window: int | None = None
    logit_soft_cap: float | None = None
    deterministic: bool = True
    engine_writes_kv: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence:
    """One sequence: ``length`` tokens whose q, k and v are ``values`` drawn from ``seed``.

    Its first ``prefix`` tokens are those of the sequence ``prefix_of``.
    """

    length: int
    seed: int = 0
    values: str = "spread"
    prefix_of: int | None = None
    prefix: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """The positions ``start … stop - 1`` of one sequence, computed in one step."""

    sequence: int
    start: int
    stop: int
    decode: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop or (self.decode and self.stop - self.start > 1):
            raise ConfigError(f"{self} is no piece: wanted start < stop, and one row to decode.")


Step = tuple[Piece, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One way to compute sequences.

    steps:     what each step computes; pieces that decode come first in a step
    placement: seed of where the pages lie; 0 lays them in ascending order
    shared:    a sequence's whole pages of prefix are those of ``prefix_of``, not its own
    graph:     steps that only decode are replayed from captured graphs
    unwritten: what a slot holds that nobody has written: ``"garbage"`` (large numbers) or ``"nan"``
    layers:    layers that run in each step; all but the last have other values
    audit:     also look for writes where nothing may be written
    generators: also look whether a global random generator is read or set
    """

    steps: tuple[Step, ...]
    placement: int = 1
    shared: bool = False
    graph: bool = False
    unwritten: str = "garbage"
    layers: int = 1
    audit: bool = False
    generators: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """Sequences computed in one way, compared with another way or with fp64.

    label:   what is tried, in words
    cells:   the declarations that this trial is evidence for
    against: must give the same bits wherever both compute a row; ``None`` compares with attention
             in float64 instead, within the rounding of the dtype
    """

    label: str
    cells: tuple[str, ...]
    geometry: Geometry
    sequences: tuple[Sequence, ...]
    run: Run
    against: Run | None = None


def whole(sequence: int, length: int) -> tuple[Piece, ...]:
    """The whole sequence in one prefill."""
    return (Piece(sequence, 0, length),)


def chunks(sequence: int, length: int, cuts: tuple[int, ...]) -> tuple[Piece, ...]:
    """A prefill cut at each of ``cuts`` that lies inside the sequence."""
    edges = [0, *sorted({cut for cut in cuts if 0 < cut < length}), length]
    return tuple(Piece(sequence, a, b) for a, b in pairwise(edges))


def then_decode(sequence: int, prefill: int, length: int) -> tuple[Piece, ...]:
    """``prefill`` tokens in one prefill, and the rest by decoding."""
    decodes = tuple(Piece(sequence, p, p + 1, decode=True) for p in range(prefill, length))
    return (*whole(sequence, prefill), *decodes)


def alone(*pieces: tuple[Piece, ...]) -> tuple[Step, ...]:
    """Each sequence's pieces by themselves: one piece a step."""
    return tuple((piece,) for sequence in pieces for piece in sequence)


def together(*pieces: tuple[Piece, ...], delays: tuple[int, ...] = ()) -> tuple[Step, ...]:
    """Step ``i`` has the ``i``-th piece of every sequence, ``delays`` steps later where given."""
    late = [delays[i] if i < len(delays) else 0 for i in range(len(pieces))]
    count = max(len(p) + d for p, d in zip(pieces, late, strict=True))
    steps = []
    for index in range(count):
        step = [
            sequence[index - delay]
            for sequence, delay in zip(pieces, late, strict=True)
            if 0 <= index - delay < len(sequence)
        ]
        if step:
            steps.append(tuple(sorted(step, key=lambda piece: not piece.decode)))
    return tuple(steps)
