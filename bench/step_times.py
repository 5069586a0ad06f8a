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
    """Of every call of ``Engine.step``, in seconds; filled when ``timed_steps`` is left.

    total:  from outside
    away:   that were not the host's own: on a CPU in the model (``Runner.forward`` and
            ``Decoder.logits``), on CUDA in waiting for the device
    device: on CUDA, of each step launched, from the model's first op until the sampled tokens are
            there, gaps between kernels included; empty on a CPU
    shapes: what each step launched computes
    """

    total: list[float] = field(default_factory=list)
    away: list[float] = field(default_factory=list)
    device: list[float] = field(default_factory=list)
    shapes: list[StepShape] = field(default_factory=list)

    @property
    def host(self) -> list[float]:
        """What the host itself took: scheduling, packing, sampling, launching, text."""
        return [total - away for total, away in zip(self.total, self.away, strict=True)]

    def extend(self, other: StepTimes) -> None:
        """Add another run's steps."""
        self.total += other.total
        self.away += other.away
        self.device += other.device
        self.shapes += other.shapes


@contextmanager
def timed_steps(engine: Engine) -> Iterator[StepTimes]:
    """Times the engine's steps until the block is left; results are what they were."""
    times = StepTimes()
    runner = engine.runner
    recorder = _Recorder(clock_of(runner.device), on_device=runner.device.type == "cuda")
    with ExitStack() as stack:
        for owner, name, timed in (
            (runner, "forward", recorder.model_call),
            (runner.decoder, "logits", recorder.model_call),
            (runner, "launch", recorder.launch),
            (runner, "read", recorder.read),
            (engine, "step", recorder.step),
        ):
            stack.enter_context(replaced(owner, name, timed(getattr(owner, name))))
        yield times
    recorder.fill(times)


class _Call(NamedTuple):
    """A call of ``step``: its seconds, those spent in reading, and stamps around the model."""

    seconds: float
    reading: float
    model: list[tuple[Any, Any]]


class _Launch(NamedTuple):
    """A step launched: stamps at its first op and at its end, and its sequences."""

    begin: Any
    end: Any
    seqs: Sequence[ScheduledSeq]


class _Recorder:
    """Keeps stamps and schedules as they are; all arithmetic waits until the end."""

    def __init__(self, clock: Clock, *, on_device: bool) -> None:
        self._clock = clock
        self._on_device = on_device
        self._calls: list[_Call] = []
        self._launches: list[_Launch] = []
        self._model: list[tuple[Any, Any]] = []
        self._reading = 0.0

    def model_call(self, method: _Method) -> _Method:
        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = self._clock.stamp()
            result = method(*args, **kwargs)
            self._model.append((begin, self._clock.stamp()))
            return result

        return timed

    def launch(self, method: _Method) -> _Method:
        @functools.wraps(method)
        def timed(step: Any) -> Any:
            result = method(step)
            begin = self._model[0][0]
            self._launches.append(_Launch(begin, self._clock.stamp(), step.seqs))
            return result

        return timed

    def read(self, method: _Method) -> _Method:
        @functools.wraps(method)
        def timed(launched: Any) -> Any:
            began = time.perf_counter()
            result = method(launched)
            self._reading += time.perf_counter() - began
            return result

        return timed

    def step(self, method: _Method) -> _Method:
        @functools.wraps(method)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._model, self._reading = [], 0.0
            began = time.perf_counter()
            result = method(*args, **kwargs)
            seconds = time.perf_counter() - began
            self._calls.append(_Call(seconds, self._reading, self._model))
            return result

        return timed

    def fill(self, times: StepTimes) -> None:
        clock = self._clock
        clock.finish()
        for call in self._calls:
            times.total.append(call.seconds)
            model = sum(clock.seconds(*pair) for pair in call.model)
            times.away.append(call.reading if self._on_device else model)
        for launch in self._launches:
            times.shapes.append(StepShape.of(launch.seqs))
            if self._on_device:
                times.device.append(clock.seconds(launch.begin, launch.end))
