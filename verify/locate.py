"""Finds the first layer and op at which two runs of the same request part."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.engine import Engine
from ..core.request import Request
from ..core.runner import RowOwners
from .drive import drive_alone
from .invariances import Run
from .workload import Case

SAMPLING = "sampling"
"""The op that follows the logits: named where every op of the model agrees."""


class Trace:
    """Digests of one case's rows, by absolute position and op.

    A position that was computed more than once (after a preemption, or for a second request of
    the same case) has several digests where they are not the same bits.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.ops: dict[str, int] = {}
        self.digests: dict[tuple[int, str], set[bytes]] = {}

    def observe(self, op: str, rows: Tensor, owners: RowOwners) -> None:
        self.ops.setdefault(op, len(self.ops))
        for index, (request, position) in enumerate(owners):
            if self._owns(request):
                key = (position, op)
                self.digests.setdefault(key, set()).add(_row_digest(rows[index]))

    def _owns(self, request: Request) -> bool:
        prompt = self.case.prompt_token_ids
        return request.params == self.case.params and tuple(request.prompt_token_ids) == prompt


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where a request first differs from what it gives alone.

    ``op`` at ``position`` is the first difference: the lowest position, and there the earliest op.
    ``run`` and ``request`` are their names, ``token`` the first output token that differs.

    ``grid[row][position]`` is for the layer ``layers[row]`` and every position that token follows
    from: ``""`` where all its ops agree, else the first op that differs; None where no op was
    computed in both runs.
    """

    run: str
    request: str
    token: int
    position: int
    op: str
    layers: tuple[str, ...]
    grid: tuple[tuple[str | None, ...], ...]

    def __str__(self) -> str:
        where = f"{self.op} at position {self.position}"
        if self.op == SAMPLING:
            where = "sampling (every op of the model agrees)"
        return f"{self.run}: {self.request}: token {self.token}; first differs in {where}"

    def as_dict(self) -> dict[str, object]:
        """All but the grid."""
        names = ("run", "request", "token", "position", "op")
        return {name: getattr(self, name) for name in names}


@contextmanager
def tracing(engine: Engine, case: Case) -> Iterator[Trace]:
    """Record one case's rows while the block runs."""
    trace = Trace(case)
    engine.runner.observer = trace.observe
    try:
        yield trace
    finally:
        engine.runner.observer = None


def locate(engine: Engine, run: Run, index: int, token: int) -> Divergence:
    """Repeat a run and its reference under observation, and find the first op where they part.

    :param index: the request, by its place in ``run.expected``.
    :param token: the first output token at which they part; what was computed after it follows
        from it and is not looked at.
    """
    reference, case = run.references[index], run.cases[index]
    with tracing(engine, reference) as expected:
        drive_alone(engine, [reference])
    with tracing(engine, case) as observed:
        run.execute()
    last = len(reference.prompt_token_ids) + token - 1
    layers, grid = compare(expected, observed, last)
    for position in range(last + 1):
        for row in grid:
            if op := row[position]:
                return Divergence(run.label, case.name, token, position, op, layers, grid)
    sampled = (*[None] * last, SAMPLING)
    return Divergence(
        run.label, case.name, token, last, SAMPLING, (*layers, SAMPLING), (*grid, sampled)
    )


def compare(
    one: Trace, other: Trace, last: int
) -> tuple[tuple[str, ...], tuple[tuple[str | None, ...], ...]]:
    """``layers`` and ``grid`` of a divergence, over positions 0 to ``last``."""
    layers = dict.fromkeys(_layer(op) for op in one.ops)
    grid: dict[str, list[str | None]] = {layer: [None] * (last + 1) for layer in layers}
    for op in one.ops:  # in the order of computation, so the first op that differs stays
        row = grid[_layer(op)]
        for position in range(last + 1):
            mine, theirs = one.digests.get((position, op)), other.digests.get((position, op))
            if mine and theirs and not row[position]:
                row[position] = op if len(mine | theirs) > 1 else ""
    return tuple(layers), tuple(map(tuple, grid.values()))


def _layer(op: str) -> str:
    """The row of an op: ``layers.3.mlp.act`` is in layer 3."""
    if op.startswith("layers."):
        return f"layer {op.split('.')[1]}"
    return "embedding" if op == "embed_tokens" else "logits"


def _row_digest(row: Tensor) -> bytes:
    data = row.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(data, digest_size=8).digest()
