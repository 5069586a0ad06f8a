"""Time stamps in the device's own order: of the host on a CPU, of the stream on CUDA."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Stamps of one device. Call ``finish`` before the first ``seconds``."""

    def stamp(self) -> Any:
        """When the device has done all that it was given so far."""
        ...

    def finish(self) -> None:
        """Wait until every stamp has been reached."""
        ...

    def seconds(self, begin: Any, end: Any) -> float:
        """Between two stamps."""
        ...


class HostClock:
    """For a CPU, where a call returns when its work is done."""

    def stamp(self) -> float:
        return time.perf_counter()

    def finish(self) -> None:
        pass

    def seconds(self, begin: float, end: float) -> float:
        return end - begin


class StreamClock:
    """For CUDA: events on the current stream, which hold nobody up."""

    def stamp(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def finish(self) -> None:
        torch.cuda.synchronize()

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return float(begin.elapsed_time(end)) / 1e3


def clock_of(device: torch.device) -> Clock:
    """The clock of a device."""
    return StreamClock() if device.type == "cuda" else HostClock()


def median_seconds(run: Callable[[], object], clock: Clock, repeat: int) -> float:
    """The median time of ``run``, after one that is not counted."""
    run()
    pairs = []
    for _ in range(repeat):
        begin = clock.stamp()
        run()
        pairs.append((begin, clock.stamp()))
    clock.finish()
    return median(clock.seconds(begin, end) for begin, end in pairs)
