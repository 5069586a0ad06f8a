"""Ways to compute a linear of one shape that may give the canonical tile's bits.

Triton's tiles look at a row's own values only, so one proof holds for every batch. cuBLASLt picks
its algorithm from the shape: it is only ever called with the row count of a bucket, the shape that
it was judged with, and the rows that are missing are zeros.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from .launch import aligned, hopper
from .matmul import FLOAT_TILES, HALF_TILES, SWAPPED_TILES, Tile, canonical_tile, matmul

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192)
"""Row counts that a choice is made for; ``pieces`` says which a batch uses."""

CUT_FROM = 2048
"""Rows. Larger buckets lie far apart, so a batch that does not fill one is cut."""


_TALL = 128  # rows; lower tiles are for at most eight times as many


class UnfitError(Exception):
    """A candidate cannot compute such a product here, which is no mistake."""


class Candidate(Protocol):
    """One way to compute ``x @ W^T``; ``name`` identifies it in the cache."""

    @property
    def name(self) -> str: ...

    def __call__(
        self, x: Tensor, weight: Tensor, out_dtype: torch.dtype, bucket: int, out: Tensor | None
    ) -> Tensor:
        """x ``[M, K]`` with M at most ``bucket``, weight ``[N, K]``, both aligned -> ``[M, N]``.

        :param out: contiguous, aligned, in ``out_dtype``: where to put it, instead of somewhere new

        :raises UnfitError: it is not for this shape or this GPU
        """
        ...


class TileCandidate:
    """The Triton kernel with one tile."""

    def __init__(self, tile: Tile) -> None:
        self.tile = tile
        self.name = str(tile)

    def __call__(
        self, x: Tensor, weight: Tensor, out_dtype: torch.dtype, bucket: int, out: Tensor | None
    ) -> Tensor:
        return matmul(x, weight, out_dtype, self.tile, out)


class SwappedCandidate(TileCandidate):
    """The same with the operands changed over, which pays with Hopper's instructions alone."""

    def __call__(
        self, x: Tensor, weight: Tensor, out_dtype: torch.dtype, bucket: int, out: Tensor | None
    ) -> Tensor:
        if not hopper(weight.device):
            raise UnfitError(self.name)
        return super().__call__(x, weight, out_dtype, bucket, out)


class CublasLt:
    """cuBLASLt without split K, on exactly ``bucket`` rows."""

    name = "cublaslt"

    def __call__(
        self, x: Tensor, weight: Tensor, out_dtype: torch.dtype, bucket: int, out: Tensor | None
    ) -> Tensor:
        rows = x.shape[0]
        if rows < bucket:
            padded = x.new_empty(bucket, x.shape[1])
            padded[:rows] = x
            padded[rows:] = 0
            x = padded
        with one_accumulator():
            if out_dtype != x.dtype:
                result = torch.mm(x, weight.t(), out_dtype=out_dtype)
            elif out is not None and rows == bucket:
                return torch.mm(x, weight.t(), out=out)
            else:
                result = torch.mm(x, weight.t())
        return result[:rows] if out is None else out.copy_(result[:rows])


@contextmanager
def one_accumulator() -> Iterator[None]:
    """torch's products go to cuBLASLt, which neither splits K nor rounds partial sums."""
    switches = torch.backends.cuda.matmul
    library = torch.backends.cuda.preferred_blas_library()
    names = tuple(f"allow_{kind}_reduced_precision_reduction" for kind in ("bf16", "fp16"))
    before = {
        name: (getattr(switches, name), getattr(switches, f"{name}_split_k")) for name in names
    }
    try:
        torch.backends.cuda.preferred_blas_library("cublaslt")
        for name in names:
            setattr(switches, name, (False, False))
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(library)
        for name, value in before.items():
            setattr(switches, name, value)


def canonical(
    x: Tensor, weight: Tensor, out_dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """What every candidate must reproduce bit for bit."""
    return matmul(x, weight, out_dtype, out=out)


def candidates(dtype: torch.dtype, bucket: int) -> Sequence[Candidate]:
    """Those worth a try for ``bucket`` rows; the canonical tile is always among them.

    Tiles far taller or lower than the bucket are left out. fp32 has no cuBLASLt, whose order of
    reduction for fp32 is not that of the tiles.
    """

    def fitting(tiles: Sequence[Tile]) -> list[Tile]:
        return [t for t in tiles if t.rows <= max(16, bucket)]

    first = canonical_tile(dtype)
    if dtype == torch.float32:
        return [TileCandidate(tile) for tile in (first, *fitting(FLOAT_TILES))]

    def tall(tiles: Sequence[Tile]) -> list[Tile]:
        return [t for t in fitting(tiles) if t.rows >= min(bucket // 8, _TALL)]

    return [
        *(TileCandidate(tile) for tile in (first, *tall(HALF_TILES))),
        *(SwappedCandidate(tile) for tile in tall(SWAPPED_TILES)),
        CublasLt(),
    ]


def bucket_of(rows: int) -> int:
    """The smallest bucket that holds ``rows``, at most ``BUCKETS[-1]``."""
    return next(bucket for bucket in BUCKETS if bucket >= rows)


def buckets_met(most: int) -> list[int]:
    """The buckets that batches of up to ``most`` rows use."""
    small = bucket_of(min(most, CUT_FROM))
    return [bucket for bucket in BUCKETS if bucket <= max(small, most)]


def pieces(rows: int) -> list[int]:
    """The rows of each piece of a batch: whole large buckets, then what a small one holds."""
    found = []
    for bucket in reversed([bucket for bucket in BUCKETS if bucket >= CUT_FROM]):
        found += [bucket] * (rows // bucket)
        rows %= bucket
    return [*found, rows] if rows else found


def prepared(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows as the candidates take them: in the weight's dtype, contiguous, aligned."""
    return aligned(x.to(dtype))
