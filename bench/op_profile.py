"""A step's time by op, from torch's profiler: ranges around ops, and the kernels launched in them.

The ranges are put around the engine's ops while a profile is taken and are not there otherwise. On
a CPU an op's time is its range. On CUDA it is that of the kernels launched within the range, found
by the profiler's correlation of launch and kernel, so that the host's time does not count.
"""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from ..errors import EngineError
from .replaced import replaced

if TYPE_CHECKING:
    from ..core.engine import Engine

_PREFIX = "isobit:"
_STEP, _LAUNCH = "step", "launch"
_LINEARS = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
_KERNELS = {
    "rms_norm": "norm",
    "add_rms_norm": "norm",
    "rope_qkv": "rope",
    "rope_qkv_write": "rope",
    "silu_mul": "act",
}
_ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
_LAUNCHES = {"cuda_runtime", "cuda_driver"}


@dataclass(slots=True)
class OpTime:
    """Over all profiled steps: seconds, calls of the op, kernels launched (None on a CPU)."""

    seconds: float = 0.0
    calls: int = 0
    launches: int | None = None


@dataclass(frozen=True, slots=True)
class StepProfile:
    """Profiled steps: seconds of all from outside, and the ops in the order of their first call.

    ``"sampling"`` is all after the logits. ``"other"`` is what is in no op: the embedding, index
    tensors, and on a CPU also scheduling, text and Python.
    """

    seconds: float
    steps: int
    ops: Mapping[str, OpTime]


class _Range(NamedTuple):
    """Microseconds of the profiler's clock."""

    begin: float
    end: float
    op: str


def profile_steps(engine: Engine, run: Callable[[], object]) -> StepProfile:
    """Profile the steps that ``run`` makes the engine take, but for the first.

    The profiler's own start falls into the first one.

    :raises EngineError: it took fewer than two.
    """
    cuda = engine.runner.backend.config.device.type == "cuda"
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    with op_ranges(engine), profile(activities=activities) as profiler:
        run()
        if cuda:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return read_trace(events, cuda=cuda)


@contextmanager
def op_ranges(engine: Engine) -> Iterator[None]:
    """Around every op, step and launch a range for the profiler, until the block is left."""
    runner, decoder = engine.runner, engine.runner.decoder
    around: list[tuple[object, str, str]] = [
        (engine, "step", _STEP),
        (runner, "launch", _LAUNCH),
        (runner.backend, "run", "attention"),
        (runner.backend, "run_written", "attention"),
        (decoder, "logits", "lm_head"),
        *((layer, name, name) for layer in decoder.layers for name in _LINEARS),
    ]
    ops: dict[str, Any] = {
        name: _ranged(op, getattr(decoder.kernels, name)) for name, op in _KERNELS.items()
    }
    kernels = replace(decoder.kernels, **ops)
    with ExitStack() as stack:
        stack.enter_context(replaced(decoder, "kernels", kernels))
        for owner, name, op in around:
            stack.enter_context(replaced(owner, name, _ranged(op, getattr(owner, name))))
        yield


def read_trace(events: Sequence[Mapping[str, Any]], *, cuda: bool) -> StepProfile:
    """The ops of a Chrome trace of ranges named by ``op_ranges``, less the first step.

    :raises EngineError: there are fewer than two steps in it.
    """
    ranges = sorted(
        _Range(event["ts"], event["ts"] + event["dur"], event["name"].removeprefix(_PREFIX))
        for event in events
        if event.get("cat") == "user_annotation" and event["name"].startswith(_PREFIX)
    )
    steps = [each for each in ranges if each.op == _STEP][1:]
    if not steps:
        raise EngineError("fewer than two steps were profiled. Take more.")
    ranges = [each for each in ranges if each.begin >= steps[0].begin]
    ops = [each for each in ranges if each.op not in (_STEP, _LAUNCH)]
    ops = sorted(ops + _sampling([each for each in ranges if each.op == _LAUNCH], ops))
    times = {each.op: OpTime(launches=0 if cuda else None) for each in ops}
    for each in ops:
        times[each.op].calls += 1
    other = OpTime(calls=len(steps), launches=0 if cuda else None)
    seconds = _length(steps)
    if cuda:
        _add_kernels(events, steps, ops, times, other)
    else:
        for each in ops:
            times[each.op].seconds += _length([each])
        other.seconds = seconds - _length(ops)
    return StepProfile(seconds, len(steps), times | {"other": other})


def _add_kernels(
    events: Sequence[Mapping[str, Any]],
    steps: Sequence[_Range],
    ops: Sequence[_Range],
    times: Mapping[str, OpTime],
    other: OpTime,
) -> None:
    """Put each kernel down to the op in whose range it was launched."""
    launched = {
        event["args"]["correlation"]: event["ts"]
        for event in events
        if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})
    }
    for event in events:
        if event.get("cat") not in _ON_DEVICE:
            continue
        when = launched.get(event["args"].get("correlation"))
        if when is None or _within(steps, when) is None:
            continue  # between the steps
        found = _within(ops, when)
        time = other if found is None else times[found.op]
        time.seconds += event["dur"] / 1e6
        time.launches = (time.launches or 0) + 1


def _sampling(launches: Sequence[_Range], ops: Sequence[_Range]) -> list[_Range]:
    """What each launch does after its last logits."""
    found = []
    for begin, end, _ in launches:
        ends = [each.end for each in ops if each.op == "lm_head" and begin <= each.begin < end]
        if ends:
            found.append(_Range(max(ends), end, "sampling"))
    return found


def _within(ranges: Sequence[_Range], when: float) -> _Range | None:
    """The one of ranges in order, none of which overlap, that holds a time."""
    index = bisect_right(ranges, when, key=lambda each: each.begin) - 1
    return ranges[index] if index >= 0 and when < ranges[index].end else None


def _length(ranges: Sequence[_Range]) -> float:
    """Seconds of all together."""
    return sum(each.end - each.begin for each in ranges) / 1e6


def _ranged(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    name = _PREFIX + op

    def ranged(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return function(*args, **kwargs)

    return ranged
