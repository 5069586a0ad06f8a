"""Which shapes and lengths are tried: the declared values, and the edges between them."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from math import lcm

from ...backends.capabilities import BackendSpec, Capabilities, Unsupported
from .scenario import Geometry

_ANY_HEAD_DIM = (16, 32, 64, 80, 96, 128, 192, 256)
_ANY_PAGE_SIZE = (1, 7, 16, 32, 64, 100, 128, 256)
_MOST_VALUES = {"cpu": 256, "cuda": 12}  # where each value compiles a kernel, fewer are tried
_DTYPES = ("float32", "bfloat16", "float16")
_EDGES = (16, 32, 64, 128, 256, 512, 1024)
GQA_RATIOS = tuple(range(1, 17))


@dataclass(frozen=True, slots=True)
class Corners:
    """The corners of one backend's declaration on one device.

    quick: sequences to 600 tokens instead of 8,192, and fewer values of each set
    """

    spec: BackendSpec
    device: str
    quick: bool = False

    @property
    def capabilities(self) -> Capabilities:
        return self.spec.capabilities

    @property
    def base(self) -> Geometry:
        """The plainest geometry that is declared."""
        return Geometry(
            head_dim=_nearest(self._declared("head_dims", _ANY_HEAD_DIM), 64),
            page_size=_nearest(self._declared("page_sizes", _ANY_PAGE_SIZE), 16),
            dtype=self.dtypes[0],
            device=self.device,
            deterministic=self.capabilities.deterministic,
            engine_writes_kv=self.capabilities.engine_writes_kv,
        )

    @property
    def dtypes(self) -> list[str]:
        """The declared dtypes, the most exact first."""
        declared = self.capabilities.dtypes
        return [d for d in _DTYPES if d in declared] + sorted(declared - set(_DTYPES))

    @property
    def head_dims(self) -> list[int]:
        return self._sampled("head_dims", _ANY_HEAD_DIM)

    @property
    def page_sizes(self) -> list[int]:
        return self._sampled("page_sizes", _ANY_PAGE_SIZE)

    @property
    def longest(self) -> int:
        return 600 if self.quick else 8192

    def bases(self) -> Iterator[Geometry]:
        """The base geometry in every dtype."""
        for dtype in self.dtypes:
            yield replace(self.base, dtype=dtype)

    def edges(self, *, most: int, page_size: int | None = None) -> list[int]:
        """Lengths beside the edges of tiles, splits and pages, ascending, up to ``most``."""
        page = page_size or self.base.page_size
        around = {edge + d for edge in (*_EDGES, page, 2 * page) for d in (-1, 0, 1)}
        return sorted(length for length in {1, 2, 3, *around} if 0 < length <= most)

    def cuts(self, *positions: int) -> tuple[int, ...]:
        """Positions rounded up to where the declaration allows a prompt to be cut."""
        step = self.capabilities.alignment
        return tuple(sorted({-(-position // step) * step for position in positions}))

    def reuse_boundary(self, tokens: int, page_size: int) -> int:
        """``tokens`` rounded up to where a reused prefix may end: whole pages, aligned."""
        step = lcm(self.capabilities.alignment, page_size)
        return -(-tokens // step) * step

    def lacks(self, feature: str) -> str | None:
        """Why a feature is not judged; ``None`` where it is declared."""
        cell = self.capabilities.cell(feature)
        return f"{feature}: {cell.reason}" if isinstance(cell, Unsupported) else None

    def tried(self, name: str) -> str:
        """How many of the declared values of ``head_dims`` or ``page_sizes`` are tried, if not all.

        Of a backend that takes any value, some are tried.
        """
        any_value = getattr(self.capabilities, name) is None
        where_any = _ANY_HEAD_DIM if name == "head_dims" else _ANY_PAGE_SIZE
        declared, tried = self._declared(name, where_any), self._sampled(name, where_any)
        if not any_value and len(tried) == len(declared):
            return ""
        return f"{', '.join(map(str, tried))} tried"

    def _declared(self, name: str, where_any: tuple[int, ...]) -> list[int]:
        declared: AbstractSet[int] | None = getattr(self.capabilities, name)
        return sorted(where_any if declared is None else declared)

    def _sampled(self, name: str, where_any: tuple[int, ...]) -> list[int]:
        """All declared values, or where they are many some from end to end."""
        values = self._declared(name, where_any)
        most = 5 if self.quick else _MOST_VALUES[self.device]
        if len(values) <= most:
            return values
        last = len(values) - 1
        return [values[round(i * last / (most - 1))] for i in range(most)]


def _nearest(values: list[int], wanted: int) -> int:
    return min(values, key=lambda value: (abs(value - wanted), value))
