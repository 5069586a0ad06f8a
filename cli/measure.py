"""Timing an engine from outside: workloads of random tokens, and where each step's time goes."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from random import Random
from statistics import median
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..core.engine import Engine
    from ..sampling.params import SamplingParams

_Finish = Callable[[], object] | None
"""Waits for the device's work; None where a call returns when its work is done."""


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that all arrive at once, each of ``input_len`` random tokens.

    :raises ConfigError: a number below 1.
    """

    requests: int
    input_len: int
    output_len: int

    def __post_init__(self) -> None:
        if min(self.requests, self.input_len, self.output_len) < 1:
            raise ConfigError(
                f"a workload was {self}; wanted at least 1 request, 1 input token and 1 output "
                "token."
            )

    def __str__(self) -> str:
        return f"{self.requests}:{self.input_len}:{self.output_len}"

    @classmethod
    def parse(cls, text: str) -> Workload:
        """From ``requests:input:output``, such as ``16:128:64``.

        :raises ConfigError: it is not three whole numbers from 1 up.
        """
        parts = text.strip().split(":")
        if len(parts) != 3 or not all(part.isascii() and part.isdigit() for part in parts):
            raise ConfigError(
                f"a workload was {text!r}; wanted requests:input:output, such as 16:128:64."
            )
        return cls(*map(int, parts))


@dataclass(slots=True)
class StepTimes:
    """For every step: its seconds from outside, and those that the model took of them."""

    total: list[float] = field(default_factory=list)
    model: list[float] = field(default_factory=list)

    @property
    def host(self) -> list[float]:
        """Seconds of each step that were not the model's: scheduling, packing, sampling, text."""
        return [total - model for total, model in zip(self.total, self.model, strict=True)]


@dataclass(slots=True)
class Measurement:
    """What the runs of a workload took, in seconds.

    runs:   each run from its first request to its last token
    firsts: of every request, from its arrival to its first token
    gaps:   between the tokens of a request that follow one another
    steps:  the engine's steps
    """

    workload: Workload
    runs: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    steps: StepTimes = field(default_factory=StepTimes)

    def row(self) -> dict[str, Any]:
        """The figures of the run in the middle; a request of one token has no gaps (None)."""
        work = self.workload
        seconds = median(self.runs)
        outputs = work.requests * work.output_len
        return {
            "requests": work.requests,
            "input_len": work.input_len,
            "output_len": work.output_len,
            "runs": len(self.runs),
            "seconds": seconds,
            "output_tokens_per_s": outputs / seconds,
            "total_tokens_per_s": (outputs + work.requests * work.input_len) / seconds,
            "time_to_first_token_ms": 1e3 * median(self.firsts),
            "inter_token_ms": 1e3 * median(self.gaps) if self.gaps else None,
            "inter_token_p99_ms": 1e3 * percentile(self.gaps, 99) if self.gaps else None,
            "steps": len(self.steps.total) // len(self.runs),
            "host_ms_per_step": 1e3 * median(self.steps.host),
        }


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that at least ``percent`` of a hundred values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-percent * len(ordered) // 100) - 1)]


def measure(
    engine: Engine,
    workload: Workload,
    *,
    seed: int = 0,
    warmup: int = 0,
    repeat: int = 1,
    on_token: Callable[[], object] = lambda: None,
) -> Measurement:
    """Run a workload ``warmup + repeat`` times, each on a cold prefix cache; time the last ones.

    Requests are greedy and go on after EOS, so that every run does the same work.

    :param on_token: called after every output token, also of the warm-up.
    :raises RequestError: the workload does not fit the engine's limits.
    """
    prompts = random_prompts(engine.vocab_size, workload.requests, workload.input_len, seed)
    params = fixed_length(workload.output_len)
    for _ in range(warmup):
        _run(engine, prompts, params, Measurement(workload), on_token)
    result = Measurement(workload)
    for _ in range(repeat):
        _run(engine, prompts, params, result, on_token)
    return result


def fixed_length(tokens: int) -> SamplingParams:
    """Greedy, and exactly ``tokens`` long."""
    from ..sampling.params import SamplingParams

    return SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


def random_prompts(vocab_size: int, count: int, length: int, seed: int) -> list[list[int]]:
    """``count`` prompts of ``length`` token ids from a generator of their own."""
    random = Random(seed)
    return [[random.randrange(vocab_size) for _ in range(length)] for _ in range(count)]


@contextmanager
def timed_steps(engine: Engine) -> Iterator[StepTimes]:
    """Times the engine's steps until the block is left; results are what they were.

    The model's share is ``Runner.forward`` and ``Decoder.logits``; on a CUDA device each is
    waited for, as its work would otherwise be counted where the host happens to wait.
    """
    times = StepTimes()
    model = [0.0]

    def add_model(seconds: float) -> None:
        model[0] += seconds

    def add_step(seconds: float) -> None:
        times.total.append(seconds)
        times.model.append(model[0])
        model[0] = 0.0

    runner = engine.runner
    wait = _waiter(runner.backend.config.device.type)
    wrapped: list[tuple[object, str, _Finish, Callable[[float], None]]] = [
        (runner, "forward", wait, add_model),
        (runner.decoder, "logits", wait, add_model),
        (engine, "step", None, add_step),
    ]
    replaced = [vars(owner).get(name) for owner, name, _, _ in wrapped]
    for owner, name, finish, add in wrapped:
        setattr(owner, name, _timed(getattr(owner, name), finish, add))
    try:
        yield times
    finally:
        for (owner, name, _, _), own in zip(wrapped, replaced, strict=True):
            if own is None:
                delattr(owner, name)  # the class's own method shows again
            else:
                setattr(owner, name, own)


def _timed(
    method: Callable[..., Any], finish: _Finish, add: Callable[[float], None]
) -> Callable[..., Any]:
    @functools.wraps(method)
    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        result = method(*args, **kwargs)
        if finish is not None:
            finish()
        add(time.perf_counter() - began)
        return result

    return timed


def _waiter(device: str) -> _Finish:
    if device != "cuda":
        return None
    import torch

    return torch.cuda.synchronize


def _run(
    engine: Engine,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    result: Measurement,
    on_token: Callable[[], object],
) -> None:
    engine.flush_cache()
    with timed_steps(engine) as steps:
        began = time.perf_counter()
        last: dict[str, float] = {}
        try:
            for index, prompt in enumerate(prompts):
                engine.add_request(f"bench-{index}", prompt, params)
            while engine.has_unfinished():
                chunks = engine.step()
                now = time.perf_counter()
                for chunk in chunks:
                    if chunk.request_id in last:
                        result.gaps.append(now - last[chunk.request_id])
                    else:
                        result.firsts.append(now - began)
                    last[chunk.request_id] = now
                    on_token()
        finally:
            for request_id in engine.unfinished_ids():
                engine.abort(request_id)
    result.runs.append(now - began)
    result.steps.total += steps.total
    result.steps.model += steps.model
