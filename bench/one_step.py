"""One kind of step, timed and taken apart into ops."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from .floor import Cost, Floor, op_costs
from .limits import Limits
from .op_profile import OpTime, StepProfile, profile_steps
from .replaced import replaced
from .steady import StepKind, steady
from .step_times import timed_steps

if TYPE_CHECKING:
    from ..core.engine import Engine

_WARM_STEPS = 3


def steps_needed(steps: int) -> int:
    """How many ``measure_step`` takes: to warm up, timed, for the profiler's start, profiled."""
    return _WARM_STEPS + 2 * steps + 1


@dataclass(frozen=True, slots=True)
class StepReport:
    """A step's seconds without the profiler (the median), its floor, and its ops as rows.

    ``replayed``: the timed steps came from CUDA graphs; the profiled ones never do.
    """

    seconds: float
    replayed: bool
    floor: Floor
    profile: StepProfile
    rows: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """Milliseconds a step; what only a device has is None on a CPU."""
        launches = [op.launches for op in self.profile.ops.values() if op.launches is not None]
        busy = sum(op.seconds for op in self.profile.ops.values()) / self.profile.steps
        return {
            "step_ms": 1e3 * self.seconds,
            "replayed": self.replayed,
            "profiled_step_ms": 1e3 * self.profile.seconds / self.profile.steps,
            "device_ms": 1e3 * busy if launches else None,
            "device_idle_share": max(0.0, 1 - busy / self.seconds) if launches else None,
            "launches": sum(launches) / self.profile.steps if launches else None,
            "floor_ms": 1e3 * self.floor.seconds,
            "limit": self.floor.limit,
            "share_of_limit": self.floor.seconds / self.seconds,
            "ops": self.rows,
        }


def measure_step(
    engine: Engine, kind: StepKind, limits: Limits, *, steps: int, seed: int, temperature: float
) -> StepReport:
    """Time ``steps`` steps of a kind as the engine takes them, then profile as many more.

    A graph would hide the ops from the profiler, so those are run without.

    :raises ConfigError: the engine cannot make such a step.
    """
    source = steady(engine, kind, steps=steps_needed(steps), seed=seed, temperature=temperature)

    def run(count: int) -> None:
        for _ in range(count):
            source.advance()

    try:
        with timed_steps(engine) as warm:
            run(_WARM_STEPS)
        with timed_steps(engine) as times:
            run(steps)
        for shape in (*warm.shapes, *times.shapes):
            kind.check(shape)
        with replaced(engine.runner, "graphs", None), replaced(engine.runner, "pieces", None):
            profile = profile_steps(engine, lambda: run(steps + 1))
    finally:
        source.close()
    decoder = engine.runner.decoder
    model, itemsize = decoder.config, decoder.dtype.itemsize
    middle = times.shapes[len(times.shapes) // 2]
    return StepReport(
        median(times.total),
        _replayed(engine, kind),
        Floor.of(model, itemsize, [middle], limits),
        profile,
        rows(profile, op_costs(model, itemsize, middle), limits),
    )


def _replayed(engine: Engine, kind: StepKind) -> bool:
    graphs, pieces = engine.runner.graphs, engine.runner.pieces
    if kind.decode:
        return graphs is not None and graphs.padding(kind.batch) is not None
    return pieces is not None and kind.batch * kind.tokens <= pieces.sizes[-1]


def rows(profile: StepProfile, costs: dict[str, Cost], limits: Limits) -> list[dict[str, Any]]:
    """Each op of one step: its time, and what it moved against what it could have."""
    total = sum(op.seconds for op in profile.ops.values())
    return [
        {"op": name}
        | _times(op, profile.steps, total)
        | _shares(costs.get(name), op.seconds / profile.steps, limits)
        for name, op in profile.ops.items()
    ]


def _times(op: OpTime, steps: int, total: float) -> dict[str, Any]:
    return {
        "ms": 1e3 * op.seconds / steps,
        "share_of_step": op.seconds / total,
        "calls": op.calls / steps,
        "launches": None if op.launches is None else op.launches / steps,
    }


def _shares(cost: Cost | None, seconds: float, limits: Limits) -> dict[str, Any]:
    """None where an op's work is not known."""
    if cost is None:
        return dict.fromkeys(("bytes", "flops", "limit", "share_of_limit"))
    least = limits.seconds(cost.num_bytes, cost.flops)
    return {
        "bytes": cost.num_bytes,
        "flops": cost.flops,
        "limit": limits.name(cost.num_bytes, cost.flops),
        "share_of_limit": least / seconds if seconds else None,
    }
