"""Work shared out over GPUs: what is timed runs alone, the rest as memory allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Condition
from typing import Generic, Protocol, TypeVar


class Work(Protocol):
    """A piece of work.

    name:   one of its own
    memory: of a GPU, GiB; what takes more than there is runs when nothing else does there
    timed:  whether it shares its GPU with nothing
    after:  the name of what must have ended before, where that was chosen too
    """

    @property
    def name(self) -> str: ...
    @property
    def memory(self) -> float: ...
    @property
    def timed(self) -> bool: ...
    @property
    def after(self) -> str: ...


W = TypeVar("W", bound=Work)
R = TypeVar("R")


class Board(Generic[W]):
    """Work that is to be done; several threads take it.

    :param memory: of one GPU, GiB
    """

    def __init__(self, chosen: Sequence[W], memory: float) -> None:
        self._left = list(chosen)
        self._unfinished = {task.name for task in chosen}
        self._running: list[tuple[W, int]] = []
        self._memory = memory
        self._changed = Condition()

    def take(self, gpu: int, *, timed: bool) -> W | None:
        """The next task for a GPU, waited for where others must end before; None at the end."""
        with self._changed:
            while any(task.timed is timed for task in self._left):
                task = next((t for t in self._left if self._fits(t, gpu, timed)), None)
                if task is not None:
                    self._left.remove(task)
                    self._running.append((task, gpu))
                    return task
                self._changed.wait()
            return None

    def ended(self, task: W, gpu: int) -> None:
        """What waited for the task, or for its GPU's memory, may begin."""
        with self._changed:
            self._unfinished.remove(task.name)
            self._running.remove((task, gpu))
            self._changed.notify_all()

    def _fits(self, task: W, gpu: int, timed: bool) -> bool:
        if task.timed is not timed or task.after in self._unfinished:
            return False
        beside = [other.memory for other, where in self._running if where == gpu]
        return not beside or sum(beside) + task.memory <= self._memory


def share_out(
    chosen: Sequence[W],
    run: Callable[[W, int], R],
    gpus: int,
    beside: int,
    memory: float,
) -> list[R]:
    """Run all: what is timed in turn on the first GPU, others on the other GPUs.

    :param run: given the work and the GPU's number; the results are in the order of ``chosen``
    :param beside: how many others at a time on a GPU
    :param memory: of one GPU, GiB
    """
    board = Board(chosen, memory)

    def work(gpu: int, timed: bool) -> list[tuple[int, R]]:
        done = []
        while (task := board.take(gpu, timed=timed)) is not None:
            try:
                done.append((chosen.index(task), run(task, gpu)))
            finally:
                board.ended(task, gpu)
        return done

    kept = gpus > 1 and any(task.timed for task in chosen)
    others = [gpu for gpu in range(int(kept), gpus) for _ in range(beside)]
    with ThreadPoolExecutor(len(others) + 1) as pool:
        lanes = [pool.submit(work, gpu, False) for gpu in others]
        if gpus == 1:
            for lane in lanes:
                lane.result()
        lanes.append(pool.submit(work, 0, True))
        found = dict(done for lane in lanes for done in lane.result())
    return [found[number] for number in range(len(chosen))]
