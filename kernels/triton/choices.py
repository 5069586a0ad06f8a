"""Which candidate computes a linear: judged by its bits first, then by its time, then remembered.

A candidate must reproduce the canonical tile bit for bit on every trial (``trials.py``). Of those
that do, the fastest is taken. As all give the same bits, the choice is no part of what a request's
result depends on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ...errors import ConfigError, EngineError
from ...folders import cache_folder
from . import candidates as _ways
from . import matmul
from .candidates import Candidate, UnfitError, candidates
from .trials import Problem, Trial, random_rows, trials

_log = logging.getLogger(__name__)

_REPEATS = 11
_FLUSH_BYTES = 2**28  # more than any second-level cache

Timer = Callable[[Callable[[], Tensor]], float]
"""Milliseconds that a call takes on the device."""


class ChoiceFile:
    """The choices of one GPU and one set of versions, as JSON in the user's cache folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._choices = _read(path)

    def get(self, problem: Problem) -> str | None:
        """The name of the candidate chosen earlier."""
        return self._choices.get(str(problem))

    def put(self, problem: Problem, name: str) -> None:
        """Remember a choice, beside those that other processes wrote meanwhile.

        :raises ConfigError: the folder cannot be written
        """
        self._choices = _read(self.path) | self._choices | {str(problem): name}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, work = tempfile.mkstemp(dir=self.path.parent, suffix=".json")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(self._choices, file, indent=1, sort_keys=True)
            os.replace(work, self.path)
        except OSError as error:
            raise ConfigError(
                f"cannot write the cache {self.path.parent}: {error}; set ISOBIT_CACHE to another "
                "folder"
            ) from error


def _read(path: Path) -> dict[str, str]:
    """The file's choices; none where it is missing or damaged: they can be made again."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def choice_file(device: torch.device) -> ChoiceFile:
    """The file for ``device`` under the versions that run now, and this code: other candidates, or
    the same ones written otherwise, are judged and timed anew."""
    parts = (
        torch.cuda.get_device_name(device),
        f"torch-{torch.__version__}",
        f"triton-{triton.__version__}",
        f"cuda-{torch.version.cuda}",
        code_digest(),
    )
    name = "".join(c if c.isalnum() or c in ".-+" else "-" for c in "-".join(("linear", *parts)))
    return ChoiceFile(cache_folder() / f"{name}.json")


def code_digest() -> str:
    """Of the candidates and of the kernels that they are made of."""
    digest = hashlib.sha256()
    for module in (_ways, matmul):
        digest.update(Path(str(module.__file__)).read_bytes())
    return digest.hexdigest()[:12]


class Chooser:
    """Makes each choice once a process.

    ``demoted`` has, for each candidate that gave other bits, in which cases; they are logged too.
    """

    def __init__(
        self,
        file: ChoiceFile,
        timer: Timer,
        offered: Callable[[torch.dtype, int], Sequence[Candidate]] = candidates,
    ) -> None:
        self.demoted: dict[str, list[str]] = {}
        self._file = file
        self._timer = timer
        self._offered = offered
        self._chosen: dict[Problem, Candidate] = {}

    def choose(self, problem: Problem, weight: Tensor) -> Candidate:
        """The fastest candidate that keeps the bits; from the file after checking it again.

        weight: ``[columns, depth]``, aligned

        :raises EngineError: a choice is wanted while a CUDA graph is captured
        """
        if problem not in self._chosen:
            if weight.is_cuda and torch.cuda.is_current_stream_capturing():
                raise EngineError(
                    f"No candidate is chosen yet for {problem}, and a graph is being captured. "
                    "Run the batch once before its capture."
                )
            self._chosen[problem] = self._judge(problem, weight)
        return self._chosen[problem]

    def report(self) -> list[str]:
        """A line for each candidate that gave other bits."""
        return [
            f"{name}, of other bits for {len(cases)} products, first {cases[0]}"
            for name, cases in self.demoted.items()
        ]

    def _judge(self, problem: Problem, weight: Tensor) -> Candidate:
        offered = self._offered(problem.dtype, problem.bucket)
        name = self._file.get(problem)
        remembered = [candidate for candidate in offered if candidate.name == name]
        if remembered and self._sound(remembered, problem, weight):
            return remembered[0]
        others = [candidate for candidate in offered if candidate not in remembered]
        sound = self._sound(others, problem, weight)
        if not sound:
            raise EngineError(f"Not even the canonical tile gives its own bits twice: {problem}.")
        x = random_rows(problem, weight.device)
        times = {
            c.name: self._timer(lambda c=c: c(x, weight, problem.out_dtype, problem.bucket, None))  # type: ignore[misc]
            for c in sound
        }
        best = min(sound, key=lambda c: times[c.name])
        self._file.put(problem, best.name)
        return best

    def _sound(
        self, offered: Sequence[Candidate], problem: Problem, weight: Tensor
    ) -> Sequence[Candidate]:
        """Those that pass every trial; one trial's operands at a time are kept."""
        for trial in trials(problem, weight):
            offered = [c for c in offered if self._passes(c, problem, trial)]
        return offered

    def _passes(self, candidate: Candidate, problem: Problem, trial: Trial) -> bool:
        for rows in problem.row_counts():
            try:
                if trial.passed(candidate, rows):
                    continue
            except (OutOfResources, UnfitError):
                return False  # a tile too large for this GPU is no mistake
            case = f"{problem}, {rows} rows"
            self.demoted.setdefault(candidate.name, []).append(case)
            _log.warning("%s: other bits for %s", candidate.name, case)
            return False
        return True


def median_ms(run: Callable[[], Tensor]) -> float:
    """Median time of a call whose operands are out of the GPU's caches, in milliseconds."""
    run()
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    for _ in range(_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(2):  # long enough for the host to queue the rest behind it
            flush.zero_()
        start.record()
        run()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    times: list[float] = [start.elapsed_time(end) for start, end in pairs]
    return statistics.median(times)
