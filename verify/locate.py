"""Finds the first layer and op at which two runs of the same request part."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..core.engine import Engine
from ..core.request import Request
from ..core.runner import RowOwners
from .workload import Case


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


def first_difference(one: Trace, other: Trace, last: int) -> tuple[int, str] | None:
    """The lowest position up to ``last``, and there the earliest op, with other bits."""
    differing = [
        key
        for key in one.digests.keys() & other.digests.keys()
        if key[0] <= last and _differs(one, other, key)
    ]
    if not differing:
        return None
    return min(differing, key=lambda key: (key[0], one.ops[key[1]]))


@contextmanager
def tracing(engine: Engine, case: Case) -> Iterator[Trace]:
    """Record one case's rows while the block runs."""
    trace = Trace(case)
    engine.runner.observer = trace.observe
    try:
        yield trace
    finally:
        engine.runner.observer = None


def locate(
    engine: Engine,
    reference: Callable[[], object],
    reference_case: Case,
    run: Callable[[], object],
    run_case: Case,
    token: int,
) -> str:
    """Repeat both runs under observation and name the first op where they part.

    :param token: the first output token at which they part; what was computed after it follows
        from it and is not looked at.
    """
    with tracing(engine, reference_case) as expected:
        reference()
    with tracing(engine, run_case) as observed:
        run()
    last = len(reference_case.prompt_token_ids) + token - 1
    found = first_difference(expected, observed, last)
    if found is None:
        return "sampling (every op of the model agrees)"
    position, op = found
    return f"{op} at position {position}"


def _differs(one: Trace, other: Trace, key: tuple[int, str]) -> bool:
    return len(one.digests[key] | other.digests[key]) > 1


def _row_digest(row: Tensor) -> bytes:
    data = row.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(data, digest_size=8).digest()
