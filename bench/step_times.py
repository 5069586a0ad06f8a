"""Where each step's time goes: timed from outside, without holding the device up."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from .clock import Clock, clock_of
from .floor import StepShape
from .replaced import replaced

if TYPE_CHECKING:
    from ..core.engine import Engine
    from ..core.step import ScheduledSeq

_Method = Callable[..., Any]


@dataclass(slots=True)
class StepTimes:
    """Of every step, in seconds; filled when ``timed_steps`` is left.

    total:  from outside
    model:  in the model: ``Runner.forward`` and ``Decoder.logits``
    device: on CUDA from the model's first op until the sampled tokens are there, gaps between
            kernels included; empty on a CPU
    shapes: what each computed
    """

    total: list[float] = field(default_factory=list)
    model: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)
    shapes: list[StepShape] = field(default_factory=list)

    @property
    def host(self) -> list[float]:
        """What was not the model's: scheduling, packing, sampling, text."""
        return [total - model for total, model in zip(self.total, self.model, strict=True)]

    def extend(self, other: StepTimes) -> None:
        """Add another run's steps."""
        self.total += other.total
        self.model += other.model
        self.device += other.device
        self.shapes += other.shapes


@contextmanager
def timed_steps(engine: Engine) -> Iterator[StepTimes]:
    """Times the engine's steps until the block is left; results are what they were."""
    times = StepTimes()
    runner = engine.runner
    device = runner.backend.config.device
    recorder = _Recorder(clock_of(device))
    with ExitStack() as stack:
        for owner, name, timed in (
            (runner, "forward", recorder.model_call),
            (runner.decoder, "logits", recorder.model_call),
            (runner, "execute", recorder.execution),
            (engine, "step", recorder.step),
        ):
            stack.enter_context(replaced(owner, name, timed(getattr(owner, name))))
        yield times
    recorder.fill(times, on_device=device.type == "cuda")


class _Step(NamedTuple):
    seconds: float
    model: list[tuple[Any, Any]]
    end: Any
    seqs: Sequence[ScheduledSeq]


class _Recorder:
    """Keeps stamps and schedules as they are; all arithmetic waits until the end."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._steps: list[_Step] = []
        self._model: list[tuple[Any, Any]] = []
        self._end: Any = None
        self._seqs: Sequence[ScheduledSeq] = ()

    def model_call(self, method: _Method) -> _Method:
        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = self._clock.stamp()
            result = method(*args, **kwargs)
            self._model.append((begin, self._clock.stamp()))
            return result

        return timed

    def execution(self, method: _Method) -> _Method:
        @functools.wraps(method)
        def timed(step: Any) -> Any:
            result = method(step)
            self._seqs, self._end = step.seqs, self._clock.stamp()
            return result

        return timed

    def step(self, method: _Method) -> _Method:
        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._model, self._end, self._seqs = [], None, ()
            began = time.perf_counter()
            result = method(*args, **kwargs)
            seconds = time.perf_counter() - began
            self._steps.append(_Step(seconds, self._model, self._end, self._seqs))
            return result

        return timed

    def fill(self, times: StepTimes, *, on_device: bool) -> None:
        clock = self._clock
        clock.finish()
        for step in self._steps:
            times.total.append(step.seconds)
            times.model.append(sum(clock.seconds(*pair) for pair in step.model))
            times.shapes.append(StepShape.of(step.seqs))
            if on_device:
                begun = bool(step.model)
                times.device.append(clock.seconds(step.model[0][0], step.end) if begun else 0.0)
