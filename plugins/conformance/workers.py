"""Runs checks in several processes.

On a GPU most of the suite's time is compiling kernels, and a process compiles one at a time. So
what shares kernels goes to one process: the trials of one geometry that follow each other.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from multiprocessing.connection import Connection, wait

import torch

from ...errors import ConfigError
from ..manager import PluginHost
from .check import Check, Context, Finding, judge_trial, mark_lost
from .scenario import Geometry, Trial
from .snippet import snippet
from .subject import find_subject
from .suite import Judged, make_context
from .waivers import known_check

Task = Trial | str
"""What one process does at a time: a trial, or by its name a check that is not made of trials."""

_SECONDS_TO_END = 10.0
_SECONDS_BETWEEN_LOOKS = 1.0

_Answer = tuple[Sequence[Finding], float, bool]
"""What came of a task, the seconds it took, and whether the process can take another."""


@dataclass(frozen=True, slots=True)
class Processes:
    """Judges checks in ``count`` processes; gives what ``judge_here`` gives.

    A check's seconds are those of the process that spent most on it. Where a process dies, what it
    was judging has failed, and another takes its place. So does another where a failure left the
    device unusable: that is so for the process that met it alone.

    make_host: makes the plugin host anew in each process; can be pickled
    :raises ConfigError: a process ended before it was ready.
    """

    count: int
    make_host: Callable[[], PluginHost]

    def __call__(self, checks: Sequence[Check], context: Context) -> Iterator[Judged]:
        parts = [_Part(check, _tasks(check, context)) for check in checks]
        setting = _Setting(
            self.make_host,
            context.subject.spec.name,
            context.corners.device,
            context.corners.quick,
            torch.get_num_threads(),
            context.judge.probe,
        )
        crew = _Crew(parts, context, setting)
        try:
            crew.hire(self.count)
            for part in parts:
                while not part.complete():
                    crew.serve()
                yield part.judged()
        finally:
            crew.dismiss()


def _tasks(check: Check, context: Context) -> list[Task]:
    return [check.name] if check.trials is None else list(check.trials(context.corners))


def _geometry(task: Task) -> Geometry | None:
    return task.geometry if isinstance(task, Trial) else None


@dataclass(frozen=True, slots=True)
class _Setting:
    """What a process needs to make the same ``Context`` for itself."""

    make_host: Callable[[], PluginHost]
    backend: str
    device: str
    quick: bool
    threads: int
    probe: Callable[[], None] | None


@dataclass(slots=True, eq=False)
class _Part:
    """One check: its tasks in order, and what came of each so far.

    seconds: spent on it, by process
    """

    check: Check
    tasks: list[Task]
    found: dict[int, Sequence[Finding]] = field(default_factory=dict)
    seconds: dict[_Worker, float] = field(default_factory=dict)

    def put(
        self, number: int, findings: Sequence[Finding], worker: _Worker, seconds: float
    ) -> None:
        self.found[number] = findings
        self.seconds[worker] = self.seconds.get(worker, 0.0) + seconds

    def runs(self) -> Iterator[_Run]:
        """The tasks' numbers, cut where the geometry changes."""
        numbers = range(len(self.tasks))
        for _, run in groupby(numbers, key=lambda number: _geometry(self.tasks[number])):
            yield self, list(run)

    def end(self) -> int:
        """Behind the first task that failed, as in one process; else behind the last."""
        failed = (n for n, findings in self.found.items() if any(f.failure for f in findings))
        return min(failed, default=len(self.tasks) - 1) + 1

    def complete(self) -> bool:
        return all(number in self.found for number in range(self.end()))

    def judged(self) -> Judged:
        findings = [f for number in range(self.end()) for f in self.found[number]]
        return tuple(findings), max(self.seconds.values(), default=0.0)


_Run = tuple[_Part, list[int]]
"""Tasks of one check that one process takes, one after the other."""


class _Worker:
    """A process, the task that it has, if any, and what is left of its run."""

    def __init__(self, setting: _Setting) -> None:
        # A forked process could not use CUDA where its parent did.
        spawn = multiprocessing.get_context("spawn")
        self.connection, its_end = spawn.Pipe()
        self.process = spawn.Process(target=_work, args=(its_end, setting), daemon=True)
        self.process.start()
        its_end.close()  # so that the connection ends with the process
        self.ready = False
        self.task: tuple[_Part, int] | None = None
        self.next: deque[tuple[_Part, int]] = deque()

    def how_it_ended(self) -> str:
        self.process.join(_SECONDS_TO_END)
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"was killed by {signal.Signals(-code).name}"
        return f"ended with exit status {code} (standard error may say more)"


class _Crew:
    """The processes at work, and what is left to do."""

    def __init__(self, parts: Sequence[_Part], context: Context, setting: _Setting) -> None:
        self._subject, self._setting = context.subject, setting
        # What cannot be shared begins first, so that nobody waits for it in the end.
        ordered = sorted(parts, key=lambda part: part.check.trials is not None)
        self._left = deque(run for part in ordered for run in part.runs())
        self._workers: list[_Worker] = []

    def hire(self, count: int) -> None:
        """Start processes, no more than there are runs."""
        for _ in range(min(count, len(self._left))):
            self._workers.append(_Worker(self._setting))

    def dismiss(self) -> None:
        """End all processes, whatever they are at."""
        for worker in self._workers:
            worker.process.kill()
        for worker in self._workers:
            worker.process.join()
            worker.connection.close()
        self._workers.clear()

    def serve(self) -> None:
        """Wait until something comes from a process; take it and give out the next tasks.

        A process that ended is looked for too: what it forked may hold its pipe open, and its
        sentinel, which is a pipe as well.
        """
        heard = wait([worker.connection for worker in self._workers], _SECONDS_BETWEEN_LOOKS)
        for worker in list(self._workers):
            ended = worker.process.exitcode is not None
            if worker.connection in heard or (ended and worker.connection.poll()):
                self._hear(worker)
            elif ended:
                self._bury(worker)

    def _hear(self, worker: _Worker) -> None:
        """Take what a process sent, and give it its next task."""
        try:
            answer: _Answer | None = worker.connection.recv()
        except (EOFError, OSError):
            self._bury(worker)
            return
        usable = True
        if answer is not None and worker.task is not None:
            part, number = worker.task
            findings, seconds, usable = answer
            part.put(number, findings, worker, seconds)
        if not usable:
            self._replace(worker)
            return
        worker.ready, worker.task = True, self._next(worker)
        if worker.task is not None:
            part, number = worker.task
            with suppress(OSError):  # it died; the next wait shows it
                worker.connection.send(part.tasks[number])

    def _next(self, worker: _Worker) -> tuple[_Part, int] | None:
        """The next task of its run, or of the next run; none that comes after a failure."""
        while worker.next or self._left:
            if not worker.next:
                part, numbers = self._left.popleft()
                worker.next.extend((part, number) for number in numbers)
            part, number = worker.next.popleft()
            if number < part.end():
                return part, number
        return None

    def _bury(self, worker: _Worker) -> None:
        """Count what a dead process was judging as failed, and start another in its place."""
        how = worker.how_it_ended()
        if not worker.ready:
            raise ConfigError(
                f"a process of the conformance suite {how} before its first trial. "
                "Pass a smaller --jobs, or none."
            )
        if worker.task is not None:
            part, number = worker.task
            finding = self._fatal(part, number, f"the process that judged it {how}")
            part.put(number, [finding], worker, 0.0)
        self._replace(worker)

    def _replace(self, worker: _Worker) -> None:
        """End a process and start another, if there is a run for it.

        The rest of its own run is not to be judged any more, as it comes after a failure.
        """
        self._workers.remove(worker)
        worker.process.kill()
        worker.process.join()
        worker.connection.close()
        self.hire(1)

    def _fatal(self, part: _Part, number: int, failure: str) -> Finding:
        task = part.tasks[number]
        if isinstance(task, Trial):
            return Finding(task.label, task.cells, failure, snippet(self._subject, task))
        return Finding(part.check.name, part.check.cells, failure)


def _work(connection: Connection, setting: _Setting) -> None:
    """What a process does: say that it is ready, then judge what comes until it is ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends all
    torch.set_num_threads(setting.threads)
    subject = find_subject(setting.backend, setting.make_host())
    context = make_context(subject, setting.device, quick=setting.quick, probe=setting.probe)
    connection.send(None)
    with suppress(EOFError):  # the parent is gone
        while not context.judge.lost_to:
            task: Task = connection.recv()
            began = time.perf_counter()
            if isinstance(task, Trial):
                name, findings = task.label, [judge_trial(context, task)]
            else:
                name, findings = task, list(known_check(task).run(context))
            told = mark_lost(context.judge, name, findings)
            usable = not context.judge.lost_to
            connection.send((told, time.perf_counter() - began, usable))
