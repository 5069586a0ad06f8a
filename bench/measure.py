"""Timing workloads on an engine, from the first request to the last token."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from .floor import Floor
from .limits import Limits
from .step_times import StepTimes, timed_steps
from .workload import Workload, fixed_length, random_prompts

if TYPE_CHECKING:
    from ..core.engine import Engine
    from ..core.outputs import StreamChunk
    from ..sampling.params import SamplingParams

_WARM_STEPS = 2
"""Steps of each shape in a warm-up."""


@dataclass(slots=True)
class Measurement:
    """What the runs of a workload took, in seconds.

    runs:   each run from its first request to its last token
    firsts: of every request, from its arrival to its first token
    gaps:   between the tokens of a request that follow one another
    tokens: that came out, of all runs
    preemptions: of all runs
    steps:  the engine's steps
    """

    workload: Workload
    runs: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    preemptions: int = 0
    steps: StepTimes = field(default_factory=StepTimes)

    def row(self) -> dict[str, Any]:
        """The figures of the run in the middle; a request of one token has no gaps (None)."""
        work, runs = self.workload, len(self.runs)
        seconds = median(self.runs)
        outputs = work.requests * work.output_len
        device = sum(self.steps.device)
        return {
            "requests": work.requests,
            "input_len": work.input_len,
            "output_len": work.output_len,
            "runs": runs,
            "output_tokens": self.tokens // runs,
            "seconds": seconds,
            "output_tokens_per_s": outputs / seconds,
            "total_tokens_per_s": (outputs + work.requests * work.input_len) / seconds,
            "time_to_first_token_ms": 1e3 * median(self.firsts),
            "time_to_first_token_max_ms": 1e3 * max(self.firsts),
            "inter_token_ms": 1e3 * median(self.gaps) if self.gaps else None,
            "inter_token_p99_ms": 1e3 * percentile(self.gaps, 99) if self.gaps else None,
            "steps": len(self.steps.shapes) // runs,
            "preemptions": self.preemptions // runs,
            "host_ms_per_step": 1e3 * median(self.steps.host),
            "device_idle_share": 1 - device / sum(self.runs) if self.steps.device else None,
        }

    def against(self, engine: Engine, limits: Limits) -> dict[str, Any]:
        """The least time of a run on this device, and its share of what the runs took."""
        decoder = engine.runner.decoder
        floor = Floor.of(decoder.config, decoder.dtype.itemsize, self.steps.shapes, limits)
        return {
            "floor_seconds": floor.seconds / len(self.runs),
            "limit": floor.limit,
            "share_of_limit": floor.seconds / sum(self.runs),
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
    temperature: float = 0.0,
    warmup: int = 0,
    repeat: int = 1,
    on_token: Callable[[], object] = lambda: None,
) -> Measurement:
    """Run a workload ``repeat`` times, each on a cold prefix cache.

    Requests go on after EOS, so that every run does the same work.

    :param warmup: rounds of ``warm_up`` before those.
    :param on_token: called after every output token of the runs.
    :raises RequestError: the workload does not fit the engine's limits.
    """
    for _ in range(warmup):
        warm_up(engine, workload, seed=seed, temperature=temperature)
    prompts = random_prompts(engine.vocab_size, workload.requests, workload.input_len, seed)
    params = [fixed_length(workload.output_len, temperature)] * workload.requests
    result = Measurement(workload)
    for _ in range(repeat):
        _timed_run(engine, prompts, params, result, on_token)
    return result


def warm_up(engine: Engine, workload: Workload, *, seed: int, temperature: float) -> None:
    """Steps of the shapes that the workload has, without its length.

    First the prefill, by as many requests as fill some steps; then the decodes, by short prompts
    whose number halves and halves until one is left, as it does when a workload runs out.
    """
    budget = engine.scheduler.config.max_num_batched_tokens
    few = min(workload.requests, -(-_WARM_STEPS * budget // workload.input_len))
    outputs = min(_WARM_STEPS, workload.output_len)
    short = min(16, workload.input_len)
    ladder = [
        min(workload.output_len, _WARM_STEPS * ((workload.requests // (index + 1)).bit_length()))
        for index in range(workload.requests)
    ]
    for length, lengths in ((workload.input_len, [outputs] * few), (short, ladder)):
        prompts = random_prompts(engine.vocab_size, len(lengths), length, seed + 1)
        params = [fixed_length(tokens, temperature) for tokens in lengths]
        run_requests(engine, prompts, params, lambda chunks: None)
        engine.flush_cache()


def run_requests(
    engine: Engine,
    prompts: Sequence[list[int]],
    params: Sequence[SamplingParams],
    on_chunks: Callable[[list[StreamChunk]], object],
) -> None:
    """Requests to their end, step by step; whatever happens, none is left behind."""
    try:
        for index, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
            engine.add_request(f"bench-{index}", prompt, each)
        while engine.has_unfinished():
            on_chunks(engine.step())
    finally:
        for request_id in engine.unfinished_ids():
            engine.abort(request_id)


def _timed_run(
    engine: Engine,
    prompts: Sequence[list[int]],
    params: Sequence[SamplingParams],
    result: Measurement,
    on_token: Callable[[], object],
) -> None:
    engine.flush_cache()
    preempted = engine.stats().preemptions
    last: dict[str, float] = {}

    def record(chunks: list[StreamChunk]) -> None:
        now = time.perf_counter()
        for chunk in chunks:
            if chunk.request_id in last:
                result.gaps.append(now - last[chunk.request_id])
            else:
                result.firsts.append(now - began)
            last[chunk.request_id] = now
            result.tokens += len(chunk.token_ids)
            on_token()

    with timed_steps(engine) as steps:
        began = time.perf_counter()
        run_requests(engine, prompts, params, record)
        result.runs.append(time.perf_counter() - began)
    result.steps.extend(steps)
    result.preemptions += engine.stats().preemptions - preempted
