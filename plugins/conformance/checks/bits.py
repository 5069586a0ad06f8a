"""Are they the same bits? One way of computing a sequence against another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from random import Random

from ..check import Check, all_of, needs, needs_feature, trial_check
from ..corners import Corners
from ..scenario import (
    Geometry,
    Run,
    Sequence,
    Trial,
    alone,
    chunks,
    then_decode,
    together,
    whole,
)

_DETERMINISTIC = ("deterministic",)


def _variants(corners: Corners) -> Iterator[Geometry]:
    """The base in every dtype; with other heads; and with what else is declared."""
    for geometry in corners.bases():
        yield geometry
        yield replace(geometry, num_q_heads=9, num_kv_heads=3)
    if not corners.quick:
        yield replace(corners.base, num_q_heads=32, num_kv_heads=8)
        for head_dim in corners.head_dims[-1:]:
            yield replace(corners.base, head_dim=head_dim)
        for page_size in (corners.page_sizes[0], corners.page_sizes[-1]):
            yield replace(corners.base, page_size=page_size)
    if corners.lacks("sliding_window") is None:
        yield replace(corners.base, sliding_window=50)
    if corners.lacks("logit_soft_cap") is None:
        yield replace(corners.base, logit_soft_cap=20.0)


def _crowds() -> list[list[int]]:
    """Lengths of the sequences of a batch, small batches first."""
    return [[3, 2], [70, 1, 20], [130, 5, 64, 17], [1 + 37 * i % 90 for i in range(33)]]


def _uneven(corners: Corners) -> list[list[int]]:
    """The same, and batches where one sequence is much longer than the rest."""
    long = [[20, corners.longest // 2, 40]]
    if not corners.quick:
        long.append([9, corners.longest - 3, 1100, 2049, 33])
    return [*_crowds(), *long]


def _crowd(corners: Corners, geometry: Geometry, lengths: list[int]) -> tuple[Sequence, ...]:
    return tuple(Sequence(length=length + 3, seed=i) for i, length in enumerate(lengths))


def _batch(corners: Corners) -> Iterator[Trial]:
    for geometry in _variants(corners):
        for lengths in _uneven(corners):
            pieces = [then_decode(i, n, n + 3) for i, n in enumerate(lengths)]
            by_itself = Run(steps=alone(*pieces))
            sequences = _crowd(corners, geometry, lengths)
            for name, delays in (
                ("in step", ()),
                ("some decode while others prefill", tuple(i % 4 for i in range(len(lengths)))),
            ):
                yield Trial(
                    label=f"{len(lengths)} sequences of up to {max(lengths)} tokens, {name}",
                    cells=_DETERMINISTIC,
                    geometry=geometry,
                    sequences=sequences,
                    run=Run(steps=together(*pieces, delays=delays)),
                    against=by_itself,
                )


def _rerun(corners: Corners) -> Iterator[Trial]:
    for geometry in _variants(corners):
        lengths = [5, 70, corners.longest // 2]
        pieces = [then_decode(i, n, n + 3) for i, n in enumerate(lengths)]
        run = Run(steps=together(*pieces))
        for attempt in range(2):
            yield Trial(
                label=f"rerun {attempt + 1}",
                cells=_DETERMINISTIC,
                geometry=geometry,
                sequences=_crowd(corners, geometry, lengths),
                run=run,
                against=run,
            )


def _order(corners: Corners) -> Iterator[Trial]:
    for geometry in _variants(corners):
        for lengths in _crowds():
            pieces = [then_decode(i, n, n + 3) for i, n in enumerate(lengths)]
            forward = together(*pieces)
            for name, key in (
                ("backwards", lambda piece: (not piece.decode, -piece.sequence)),
                ("shuffled", lambda piece: (not piece.decode, Random(piece.sequence).random())),
            ):
                steps = tuple(tuple(sorted(step, key=key)) for step in forward)
                yield Trial(
                    label=f"{len(lengths)} sequences {name}",
                    cells=_DETERMINISTIC,
                    geometry=geometry,
                    sequences=_crowd(corners, geometry, lengths),
                    run=Run(steps=steps),
                    against=Run(steps=forward),
                )


def _pages(corners: Corners) -> Iterator[Trial]:
    smallest = replace(corners.base, page_size=corners.page_sizes[0])  # the most pages a tile
    for geometry in dict.fromkeys([*_variants(corners), smallest]):
        lengths = [geometry.page_size + 1, 70, corners.longest // 8]
        steps = together(*(then_decode(i, n, n + 3) for i, n in enumerate(lengths)))
        for placement in (0, 2, 3):
            yield Trial(
                label=f"pages laid out by seed {placement}",
                cells=_DETERMINISTIC,
                geometry=geometry,
                sequences=_crowd(corners, geometry, lengths),
                run=Run(steps=steps, placement=placement),
                against=Run(steps=steps),
            )


def _chunk(corners: Corners) -> Iterator[Trial]:
    page = corners.base.page_size
    for geometry in _variants(corners):
        for length, positions in (
            (2, (1,)),
            (20, (3, 16, 17)),
            (70, (1, page - 1, page, page + 1, 63, 64, 65)),
            (300, tuple(range(0, 300, 33))),
            (300, tuple(range(0, 300, 7))),
            (corners.longest, (1, 513, 1023, 1024, 1025, 2047, 4097, 8000)),
        ):
            cuts = corners.cuts(*positions)
            parts = chunks(0, length, cuts)
            neighbours = [chunks(1, 90, corners.cuts(40)), then_decode(2, 33, 40)]
            if len(parts) < 2:
                continue
            yield Trial(
                label=f"{length} tokens in {len(parts)} chunks among neighbours",
                cells=("chunk_invariant", "alignment", "chunked_prefill"),
                geometry=geometry,
                sequences=tuple(Sequence(length=n, seed=i) for i, n in enumerate((length, 90, 40))),
                run=Run(steps=together(parts, *neighbours, delays=(0, 1, 0))),
                against=Run(steps=alone(whole(0, length), whole(1, 90), then_decode(2, 33, 40))),
            )


def _prefix(corners: Corners) -> Iterator[Trial]:
    by_decoding = corners.capabilities.decode_equals_prefill
    for geometry in _variants(corners):
        for tokens in (1, 50, 200, corners.longest // 4):
            prefix = corners.reuse_boundary(tokens, geometry.page_size)
            length = prefix + 21
            sequences = (
                Sequence(length=length + 5, seed=0),
                Sequence(length=length, seed=1, prefix_of=0, prefix=prefix),
                Sequence(length=length + 9, seed=2, prefix_of=0, prefix=prefix),
            )
            cold = Run(steps=alone(*(whole(i, s.length) for i, s in enumerate(sequences))))
            tails = [chunks(i, sequences[i].length, (prefix,))[1:] for i in (1, 2)]
            writers = [("prefill", whole(0, length + 5))]
            if by_decoding:
                start = max(1, prefix - 20)
                writers.append(("decoding", then_decode(0, start, length + 5)))
            for writer, pieces in writers:
                late = len(pieces)
                yield Trial(
                    label=f"{prefix} tokens of prefix on pages that {writer} wrote",
                    cells=("radix_cache", "chunk_invariant"),
                    geometry=geometry,
                    sequences=sequences,
                    run=Run(steps=together(pieces, *tails, delays=(0, late, late)), shared=True),
                    against=cold,
                )


def _decode(corners: Corners) -> Iterator[Trial]:
    page = corners.base.page_size
    for geometry in _variants(corners):
        for start, length in (
            (1, 3),
            (1, page + 2),
            (60, 70),
            (126, 131),
            (254, 260),
            (510, 516),
            (1021, 1028),
            (corners.longest - 4, corners.longest),
        ):
            if length > corners.longest:
                continue
            yield Trial(
                label=f"positions {start} to {length - 1} decoded",
                cells=("decode_equals_prefill",),
                geometry=geometry,
                sequences=(Sequence(length=length), Sequence(length=24, seed=1)),
                run=Run(steps=together(then_decode(0, start, length), then_decode(1, 3, 24))),
                against=Run(steps=alone(whole(0, length), whole(1, 24))),
            )


CHECKS: tuple[Check, ...] = (
    trial_check(
        "rerun",
        "the same batch again gives the same bits",
        _DETERMINISTIC,
        _rerun,
        needs("deterministic"),
    ),
    trial_check(
        "batch",
        "a sequence among any neighbours has the bits it has alone",
        _DETERMINISTIC,
        _batch,
        needs("deterministic"),
    ),
    trial_check(
        "order",
        "the order of the sequences in a batch changes no bit",
        _DETERMINISTIC,
        _order,
        needs("deterministic"),
    ),
    trial_check(
        "pages",
        "where the pages lie changes no bit",
        _DETERMINISTIC,
        _pages,
        needs("deterministic"),
    ),
    trial_check(
        "chunk",
        "a prompt cut at any aligned positions has the bits of the whole prompt",
        ("chunk_invariant", "alignment", "chunked_prefill"),
        _chunk,
        all_of(needs("deterministic"), needs("chunk_invariant"), needs_feature("chunked_prefill")),
    ),
    trial_check(
        "prefix",
        "a prompt on shared pages of another's prefix has the bits of a cold one",
        ("radix_cache", "chunk_invariant"),
        _prefix,
        all_of(needs("deterministic"), needs("chunk_invariant"), needs_feature("radix_cache")),
    ),
    trial_check(
        "decode",
        "a decoded position has the bits that a prefill gives it",
        ("decode_equals_prefill",),
        _decode,
        all_of(needs("deterministic"), needs("decode_equals_prefill")),
    ),
)
