"""Is it attention at all? Every declared shape and dtype against float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

from ..check import CONTRACT, Check, needs_feature, trial_check
from ..corners import GQA_RATIOS, Corners
from ..scenario import Geometry, Run, Sequence, Trial, then_decode, together
from ..values import KINDS


def _mixed(
    label: str, cells: tuple[str, ...], geometry: Geometry, lengths: list[int], values: str
) -> Trial:
    """Sequences of all lengths in one batch: prefills, then decodes while others prefill."""
    sequences = tuple(
        Sequence(length=length + 2, seed=index, values=values)
        for index, length in enumerate(lengths)
    )
    pieces = [then_decode(i, length, length + 2) for i, length in enumerate(lengths)]
    delays = tuple(i % 3 for i in range(len(lengths)))
    run = Run(steps=together(*pieces, delays=delays))
    return Trial(label=label, cells=cells, geometry=geometry, sequences=sequences, run=run)


def _values(corners: Corners) -> Iterator[Trial]:
    for geometry in corners.bases():
        cells = (CONTRACT, "dtypes")
        for values in KINDS:
            yield _mixed(f"{geometry.dtype}, {values}: one token", cells, geometry, [1], values)
        lengths = corners.edges(most=300)
        for values in KINDS:
            yield _mixed(f"{geometry.dtype}, {values}: edges", cells, geometry, lengths, values)


def _decoded(corners: Corners) -> Iterator[Trial]:
    """Sequences that only decode, long enough to come to new pages in the same batch."""
    for geometry in corners.bases():
        page = geometry.page_size
        lengths = [page - 1, 3, 2 * page] if page > 1 else [3, 2]
        pieces = [then_decode(i, n, n + page + 2) for i, n in enumerate(lengths)]
        yield Trial(
            label=f"{geometry.dtype}: decoded across pages",
            cells=(CONTRACT, "dtypes"),
            geometry=geometry,
            sequences=tuple(
                Sequence(length=n + page + 2, seed=i, values="needle")
                for i, n in enumerate(lengths)
            ),
            run=Run(steps=together(*pieces)),
        )


def _long(corners: Corners) -> Iterator[Trial]:
    longest = corners.longest
    for geometry in corners.bases():
        narrow = replace(geometry, num_q_heads=2, num_kv_heads=1)
        for values in ("needle", "spread"):
            label = f"{geometry.dtype}, {values}: {longest} tokens among short ones"
            yield _mixed(label, (CONTRACT, "dtypes"), narrow, [longest - 2, 5, 700], values)


def _shapes(corners: Corners) -> Iterator[Trial]:
    for geometry in corners.bases():
        for head_dim in corners.head_dims:
            shape = replace(geometry, head_dim=head_dim)
            label = f"{geometry.dtype}, head_dim {head_dim}"
            yield _mixed(label, ("head_dims",), shape, [1, 17, 70], "needle")
        for page_size in corners.page_sizes:
            shape = replace(geometry, page_size=page_size)
            lengths = sorted({1, max(1, page_size - 1), page_size, page_size + 1, 70})
            label = f"{geometry.dtype}, page_size {page_size}"
            yield _mixed(label, ("page_sizes",), shape, lengths, "needle")


def _groups(corners: Corners) -> Iterator[Trial]:
    for geometry in corners.bases():
        for ratio in GQA_RATIOS:
            for kv_heads in (1, 3):
                heads = replace(geometry, num_q_heads=ratio * kv_heads, num_kv_heads=kv_heads)
                label = f"{geometry.dtype}, {ratio * kv_heads} query over {kv_heads} KV heads"
                yield _mixed(label, ("gqa",), heads, [1, 20, 67], "needle")


def _windows(corners: Corners) -> Iterator[Trial]:
    for geometry in corners.bases():
        for window in (1, 16, 17, 64, 100, 257):
            shape = replace(geometry, sliding_window=window)
            lengths = corners.edges(most=300)
            label = f"{geometry.dtype}, window {window}"
            for values in ("needle", "spread"):
                yield _mixed(f"{label}, {values}", ("sliding_window",), shape, lengths, values)


def _caps(corners: Corners) -> Iterator[Trial]:
    for geometry in corners.bases():
        for cap in (1.0, 30.0):
            shape = replace(geometry, logit_soft_cap=cap)
            for values in ("spread", "needle", "large"):
                label = f"{geometry.dtype}, soft cap {cap}, {values}"
                yield _mixed(label, ("logit_soft_cap",), shape, [1, 20, 65, 130], values)


CHECKS: tuple[Check, ...] = (
    trial_check(
        "reference",
        "attention as float64 gives it: one token, lengths at every edge, every kind of values",
        (CONTRACT, "dtypes"),
        lambda corners: chain(_values(corners), _decoded(corners)),
    ),
    trial_check(
        "shapes",
        "the same for every head_dim and page_size that is declared",
        ("head_dims", "page_sizes"),
        _shapes,
    ),
    trial_check("groups", "the same for 1 to 16 query heads a KV head", ("gqa",), _groups),
    trial_check(
        "long",
        "the same for sequences of thousands of tokens",
        (CONTRACT, "dtypes"),
        _long,
    ),
    trial_check(
        "window",
        "a row under a sliding window sees that many tokens, and no more",
        ("sliding_window",),
        _windows,
        needs_feature("sliding_window"),
    ),
    trial_check(
        "soft cap",
        "scores are capped before they are masked",
        ("logit_soft_cap",),
        _caps,
        needs_feature("logit_soft_cap"),
    ),
)
