"""Which candidate computes a linear: judged by its bits first, then by its time, then remembered.

A candidate must reproduce the canonical tile bit for bit on the linear's own weight and on random
rows with outlier columns. Of those that do, the fastest is taken. As all give the same bits, the
choice is no part of what a request's result depends on.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ...errors import ConfigError, EngineError
from ...folders import cache_folder
from .candidates import BUCKETS, Candidate, candidates, canonical, prepared

_log = logging.getLogger(__name__)

_OUTLIER_STEP = 97
_OUTLIER_FACTOR = 100.0
_REPEATS = 11
_FLUSH_BYTES = 2**28  # more than any second-level cache

Timer = Callable[[Callable[[], Tensor]], float]
"""Milliseconds that a call takes on the device."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A product's shape: ``[up to bucket, depth] @ [depth, columns]``."""

    columns: int
    depth: int
    dtype: torch.dtype
    out_dtype: torch.dtype
    bucket: int

    def __str__(self) -> str:
        dtypes = f"{self.dtype}->{self.out_dtype}".replace("torch.", "")
        return f"N{self.columns} K{self.depth} {dtypes} M{self.bucket}"


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
    """The file for ``device`` under the versions that run now."""
    parts = (
        torch.cuda.get_device_name(device),
        f"torch-{torch.__version__}",
        f"triton-{triton.__version__}",
        f"cuda-{torch.version.cuda}",
    )
    name = "".join(c if c.isalnum() or c in ".-+" else "-" for c in "-".join(("linear", *parts)))
    return ChoiceFile(cache_folder() / f"{name}.json")


class Chooser:
    """Makes each choice once a process.

    ``demoted`` says which candidates gave other bits, and for what; it is logged too.
    """

    def __init__(
        self,
        file: ChoiceFile,
        timer: Timer,
        offered: Callable[[torch.dtype, int], Sequence[Candidate]] = candidates,
    ) -> None:
        self.demoted: list[str] = []
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

    def _judge(self, problem: Problem, weight: Tensor) -> Candidate:
        offered = self._offered(problem.dtype, problem.bucket)
        x = random_rows(problem, weight.device)
        expected = canonical(x, weight, problem.out_dtype)
        name = self._file.get(problem)
        for candidate in offered:
            if candidate.name == name and self._reproduces(candidate, problem, x, weight, expected):
                return candidate
        sound = [c for c in offered if self._reproduces(c, problem, x, weight, expected)]
        if not sound:
            raise EngineError(f"Not even the canonical tile gives its own bits twice: {problem}.")
        times = {
            c.name: self._timer(lambda c=c: c(x, weight, problem.out_dtype, problem.bucket))  # type: ignore[misc]
            for c in sound
        }
        best = min(sound, key=lambda c: times[c.name])
        self._file.put(problem, best.name)
        return best

    def _reproduces(
        self, candidate: Candidate, problem: Problem, x: Tensor, weight: Tensor, expected: Tensor
    ) -> bool:
        """Whether the candidate gives ``expected`` for the bucket's most and fewest rows."""
        fewest = max((b for b in BUCKETS if b < problem.bucket), default=0) + 1
        for rows in (problem.bucket, fewest):
            some = prepared(x[:rows], problem.dtype)
            try:
                result = candidate(some, weight, problem.out_dtype, problem.bucket)
            except OutOfResources:
                return False  # a tile too large for this GPU is no mistake
            if not same_bits(result, expected[:rows]):
                self.demoted.append(f"{candidate.name}: other bits for {problem}, {rows} rows")
                _log.warning("%s", self.demoted[-1])
                return False
        return True


def random_rows(problem: Problem, device: torch.device) -> Tensor:
    """``[bucket, depth]``: normal variates, every 97th column a hundred times larger."""
    generator = torch.Generator(device).manual_seed(problem.bucket * 1_000_003 + problem.depth)
    x = torch.randn(problem.bucket, problem.depth, generator=generator, device=device)
    x[:, 5::_OUTLIER_STEP] *= _OUTLIER_FACTOR
    return prepared(x, problem.dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one dtype agree bit for bit."""
    kind = torch.int16 if a.element_size() == 2 else torch.int32
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def median_ms(run: Callable[[], Tensor]) -> float:
    """Median time of a call on the GPU, its operands out of the caches, in milliseconds."""
    run()
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    for _ in range(_REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()  # long enough for the host to queue the call behind it
        start.record()
        run()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    times: list[float] = [start.elapsed_time(end) for start, end in pairs]
    return statistics.median(times)
