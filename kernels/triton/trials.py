"""Data on which another order of addition shows in nearly every output.

Sums of random products hide it: rounded to bf16 or fp16, few outputs tell two orders apart. So a
candidate is also judged on sums that cancel. Every product has its negative at another, random
place of K, and the products' sizes are spread over many powers of two: the true sums are zero, and
what comes out is the rounding errors alone, which the order of addition decides.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .candidates import BUCKETS, CUT_FROM, Candidate, canonical, prepared

_OUTLIER_STEP = 97
_OUTLIER_FACTOR = 100.0
_POWERS = 6  # sizes from 2^-6 to 2^6
_COLUMNS = 1024  # other columns repeat these: a whole weight in fp32 would take twice its memory


@dataclass(frozen=True, slots=True)
class Problem:
    """A product's shape: ``[up to bucket, depth] @ [depth, columns]``."""

    columns: int
    depth: int
    dtype: torch.dtype
    out_dtype: torch.dtype
    bucket: int

    def __str__(self) -> str:
        dtypes = f"{self.dtype}->{self.out_dtype}".replace("torch.", "")
        return f"N{self.columns} K{self.depth} {dtypes} M{self.bucket}"

    def row_counts(self) -> list[int]:
        """The bucket's most and fewest rows, and one between; a large one is only met whole."""
        if self.bucket > CUT_FROM:
            return [self.bucket]
        fewest = max((b for b in BUCKETS if b < self.bucket), default=0) + 1
        return sorted({fewest, (fewest + self.bucket) // 2, self.bucket})


@dataclass(frozen=True, slots=True)
class Trial:
    """Operands, and the bits that they must give."""

    x: Tensor
    weight: Tensor
    expected: Tensor
    bucket: int

    def passed(self, candidate: Candidate, rows: int) -> bool:
        """Whether the candidate gives the expected bits for the first ``rows`` rows.

        A full bucket goes where it is told to go, as the pieces of a larger batch do.
        """
        some, expected = prepared(self.x[:rows], self.x.dtype), self.expected[:rows]
        out = torch.empty_like(expected) if rows == self.bucket else None
        result = candidate(some, self.weight, expected.dtype, self.bucket, out)
        return same_bits(result if out is None else out, expected)


def trials(problem: Problem, weight: Tensor) -> Iterator[Trial]:
    """The linear's own weight, then sums that cancel; with its own result dtype and in fp32.

    weight: ``[columns, depth]``, aligned
    """
    results = dict.fromkeys((problem.out_dtype, torch.float32))
    for x, w in (
        (random_rows(problem, weight.device), weight),
        cancelling(problem, weight.device),
    ):
        for out_dtype in results:
            yield Trial(x, w, canonical(x, w, out_dtype), problem.bucket)


def random_rows(problem: Problem, device: torch.device) -> Tensor:
    """``[bucket, depth]``: normal variates, every 97th column a hundred times larger."""
    x = torch.randn(
        problem.bucket, problem.depth, generator=_seeded(problem, device), device=device
    )
    x[:, 5::_OUTLIER_STEP] *= _OUTLIER_FACTOR
    return prepared(x, problem.dtype)


def cancelling(problem: Problem, device: torch.device) -> tuple[Tensor, Tensor]:
    """x ``[bucket, depth]`` and a weight ``[columns, depth]`` whose products add up to zero."""
    generator = _seeded(problem, device)
    half = problem.depth // 2
    places = torch.randperm(problem.depth, generator=generator, device=device)

    def spread(rows: int) -> Tensor:
        size = (rows, half)
        powers = torch.rand(size, generator=generator, device=device) * (2 * _POWERS) - _POWERS
        return torch.randn(size, generator=generator, device=device) * powers.exp2()

    def halves(first: Tensor, sign: int) -> Tensor:
        both = first.new_zeros(len(first), problem.depth)
        both[:, places[:half]] = first
        both[:, places[half : 2 * half]] = sign * first
        return prepared(both, problem.dtype)

    x = halves(spread(problem.bucket), 1)
    weight = halves(spread(min(problem.columns, _COLUMNS)), -1)
    copies = -(-problem.columns // len(weight))
    return x, prepared(weight.repeat(copies, 1)[: problem.columns], problem.dtype)


def _seeded(problem: Problem, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(problem.bucket * 1_000_003 + problem.depth)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype agree bit for bit."""
    kind = torch.int16 if a.element_size() == 2 else torch.int32
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))
