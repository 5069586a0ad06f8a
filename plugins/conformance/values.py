"""The q, k and v of a sequence: seeded, and of kinds that show different mistakes."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as AnySequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import ConfigError
from .scenario import Geometry, Sequence


@dataclass(frozen=True, slots=True)
class Rows:
    """q ``[length, q_heads, head_dim]``; k and v ``[length, kv_heads, head_dim]``."""

    q: Tensor
    k: Tensor
    v: Tensor


def all_rows(sequences: AnySequence[Sequence], geometry: Geometry, layer: int = 0) -> list[Rows]:
    """The values of every sequence, in the geometry's dtype and on its device.

    :param layer: another number gives other values.
    """
    made: list[Rows] = []
    for sequence in sequences:
        rows = _own_rows(sequence, geometry, layer)
        if sequence.prefix_of is not None:
            source, n = made[sequence.prefix_of], sequence.prefix
            rows = Rows(
                torch.cat([source.q[:n], rows.q[n:]]),
                torch.cat([source.k[:n], rows.k[n:]]),
                torch.cat([source.v[:n], rows.v[n:]]),
            )
        made.append(rows)
    return made


def _own_rows(sequence: Sequence, geometry: Geometry, layer: int) -> Rows:
    if sequence.values not in KINDS:
        raise ConfigError(f"values {sequence.values!r}: wanted one of {', '.join(KINDS)}.")
    generator = torch.Generator().manual_seed(1 + sequence.seed + 1_000_003 * layer)
    q, k, v = KINDS[sequence.values](sequence.length, geometry, generator)
    dtype = getattr(torch, geometry.dtype)
    return Rows(*(t.to(dtype).to(geometry.device).contiguous() for t in (q, k, v)))


Drawn = tuple[Tensor, Tensor, Tensor]


def _draw(length: int, geometry: Geometry, generator: torch.Generator) -> Drawn:
    def normal(heads: int) -> Tensor:
        return torch.randn(length, heads, geometry.head_dim, generator=generator)

    return (
        normal(geometry.num_q_heads),
        normal(geometry.num_kv_heads),
        normal(geometry.num_kv_heads),
    )


def _spread(length: int, geometry: Geometry, generator: torch.Generator) -> Drawn:
    """Weights over many positions and some large values: any other order of addition shows."""
    q, k, v = _draw(length, geometry, generator)
    v[::7] *= 30
    return q, k, v


def _needle(length: int, geometry: Geometry, generator: torch.Generator) -> Drawn:
    """Each row and head looks at one position, its own, a neighbour or an edge of a page or tile.

    So one position too many or too few shows, however long the sequence.
    """
    q, k, v = _draw(length, geometry, generator)
    k /= k.norm(dim=-1, keepdim=True)
    position = torch.arange(length)
    page = geometry.page_size
    window = geometry.sliding_window or length
    targets = torch.stack(
        [
            position + 1,  # in the future
            position,
            position - 1,
            position // page * page - 1,
            torch.zeros_like(position),
            position - window,  # just outside a window, and its first position
            position - window + 1,
            position // 64 * 64 - 1,
            (position * 7919) % (position + 1),
        ]
    ).clamp(0, length - 1)
    heads = torch.arange(geometry.num_q_heads)
    choice = (position[:, None] + 4 * heads[None, :]) % len(targets)
    target = targets[choice, position[:, None]]
    group = geometry.num_q_heads // geometry.num_kv_heads
    q = k[target, (heads // group)[None, :]] * (12 * geometry.head_dim**0.5)
    return q, k, v


def _large(length: int, geometry: Geometry, generator: torch.Generator) -> Drawn:
    """Scores far beyond what ``exp`` can hold, and large values."""
    q, k, v = _draw(length, geometry, generator)
    return q * 20, k * 20, v * 500


def _repeated(length: int, geometry: Geometry, generator: torch.Generator) -> Drawn:
    """Every position the same, in k: all weights equal; v in two kinds, taking turns."""
    q, k, v = _draw(length, geometry, generator)
    k[:] = k[:1].clone()
    v[::2], v[1::2] = v[:1].clone(), -v[:1].clone() + 0.125
    return q, k, v


def _ramp(length: int, geometry: Geometry, generator: torch.Generator) -> Drawn:
    """Scores that rise with the position in even KV heads and fall in odd ones."""
    q, k, v = _draw(length, geometry, generator)
    direction = k[:1].sign()
    slope = torch.linspace(0.1, 3, length)[:, None, None]
    slope = torch.where(
        torch.arange(geometry.num_kv_heads)[None, :, None] % 2 == 0, slope, 3 - slope
    )
    k = direction * slope
    group = geometry.num_q_heads // geometry.num_kv_heads
    q = direction.repeat_interleave(group, dim=1) * 0.9 + 0.05 * q
    return q, k, v


KINDS: dict[str, Callable[[int, Geometry, torch.Generator], Drawn]] = {
    "spread": _spread,
    "needle": _needle,
    "large": _large,
    "repeated": _repeated,
    "ramp": _ramp,
}
"""Kinds of values by name."""
