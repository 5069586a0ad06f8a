"""Isobit against transformers on the CPU, in fp32, and what waiting requests cost a step.

    python benchmarks/against_transformers.py [--threads 2] [--json]

Both run one after the other in this process, greedy, on the same random tokens, and go on after
EOS. A figure is the best of its runs, as other work on the machine can only slow one down. The
bars: 0.9 times the tokens/s of transformers' ``generate`` for one request, 1.2 times for sixteen;
a first token after a shared prefix in 0.15 of the time that it took for the first request; and a
host time a step that does not grow with the queue. Exit status 1 where one is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from isobit import LLM
from isobit.bench.measure import measure
from isobit.bench.step_times import timed_steps
from isobit.bench.workload import Workload, fixed_length, random_prompts
from isobit.cli.columns import columns
from isobit.models.registry import resolve_model
from isobit.models.shapes import SHAPES

WAITING = (10, 100, 1_000, 5_000)
HOST_STEPS = 50
HOST_SEATS = 8
FLAT = 1.5
"""How much longer a step's host time may be with the longest queue than with the shortest."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table: Isobit's value, what it is compared with, and the bar.

    ``ratio`` is ``isobit / other``; ``limit`` its lowest or highest allowed value.
    """

    name: str
    isobit: float
    other: float
    against: str
    limit: float
    at_least: bool

    @property
    def ratio(self) -> float:
        return self.isobit / self.other

    @property
    def met(self) -> bool:
        return self.ratio >= self.limit if self.at_least else self.ratio <= self.limit

    def row(self) -> list[str]:
        bar = f"{'>=' if self.at_least else '<='} {self.limit:g}"
        pair = (self.isobit, self.other)
        values = [f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in pair]
        verdict = "met" if self.met else "MISSED"
        return [
            self.name,
            values[0],
            f"{values[1]} {self.against}",
            f"{self.ratio:.3f}",
            bar,
            verdict,
        ]


def open_llm(model: str, **options: Any) -> LLM:
    random = {"load_format": "random"} if model in SHAPES else {}
    return LLM(model, dtype="float32", **random, **options)


def open_transformers(model: str) -> Any:
    """The same model in transformers; of a shape, with random weights of its own."""
    if model in SHAPES:
        config = AutoConfig.for_model(**SHAPES[model])
        build: Callable[..., Any] = AutoModelForCausalLM.from_config
        reference = build(config, dtype=torch.float32)
    else:
        reference = AutoModelForCausalLM.from_pretrained(resolve_model(model), dtype=torch.float32)
    # Nothing ends the output early, so both do the same work; padding is then never needed.
    reference.generation_config.eos_token_id = None
    reference.generation_config.pad_token_id = 0
    return reference.eval()


def transformers_seconds(reference: Any, prompts: list[list[int]], tokens: int) -> float:
    ids = torch.tensor(prompts)
    began = time.perf_counter()
    with torch.inference_mode():
        out = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            use_cache=True,
        )
    seconds = time.perf_counter() - began
    if out.shape != (len(prompts), len(prompts[0]) + tokens):
        raise SystemExit(f"transformers gave {tuple(out.shape)} tokens; the output ended early")
    return seconds


def throughput(llm: LLM, reference: Any, work: Workload, repeat: int, least: float) -> Figure:
    """Output tokens/s of both, the prompt's time included; each warms up once."""
    ours = min(measure(llm.engine, work, warmup=1, repeat=repeat).runs)
    prompts = random_prompts(llm.engine.vocab_size, work.requests, work.input_len, seed=0)
    theirs = min(
        [transformers_seconds(reference, prompts, work.output_len) for _ in range(repeat + 1)]
    )
    tokens = work.requests * work.output_len
    name = f"{work.requests} request{'s' if work.requests > 1 else ''}, tokens/s"
    return Figure(name, tokens / ours, tokens / theirs, "transformers", least, True)


def shared_prefix(llm: LLM, prefix_len: int, repeat: int) -> Figure:
    """First token of a second request that shares ``prefix_len`` tokens with the first."""
    rest = 16
    first, second = [], []
    for seed in range(repeat + 1):  # the first round warms up
        one = random_prompts(llm.engine.vocab_size, 1, prefix_len + rest, seed)[0]
        end = random_prompts(llm.engine.vocab_size, 1, rest, seed + 1_000)[0]
        llm.engine.flush_cache()
        first.append(first_token_seconds(llm, one))
        second.append(first_token_seconds(llm, one[:prefix_len] + end))
    name = f"first token after {prefix_len:,} shared tokens, ms"
    best = (1e3 * min(second[1:]), 1e3 * min(first[1:]))
    return Figure(name, *best, "first request", 0.15, False)


def first_token_seconds(llm: LLM, prompt: list[int]) -> float:
    began = time.perf_counter()
    for _ in llm.stream([prompt], fixed_length(1)):
        return time.perf_counter() - began
    raise SystemExit("a request gave no token")


def host_times(model: str, repeat: int) -> dict[int, float]:
    """Seconds of host time a step, by the number of requests that wait: the best median.

    The queues take turns, so that a slow moment of the machine does not fall on one of them.
    """
    medians: dict[int, list[float]] = {waiting: [] for waiting in WAITING}
    with open_llm(model, max_num_seqs=HOST_SEATS) as llm:
        for _ in range(repeat):
            for waiting in WAITING:
                medians[waiting].append(host_time(llm, waiting))
    return {waiting: min(found) for waiting, found in medians.items()}


def host_time(llm: LLM, waiting: int) -> float:
    """The median over steps in which every seat decodes and ``waiting`` requests queue."""
    engine = llm.engine
    queue(llm, waiting + HOST_SEATS)
    while engine.scheduler.num_running < HOST_SEATS:
        engine.step()
    with timed_steps(engine) as steps:
        for _ in range(HOST_STEPS):
            engine.step()
    if engine.scheduler.num_waiting != waiting:
        raise SystemExit("the queue moved while it was measured")
    for request_id in engine.unfinished_ids():
        engine.abort(request_id)
    return median(steps.host)


def queue(llm: LLM, count: int) -> None:
    params = fixed_length(2 * HOST_STEPS)
    for index, prompt in enumerate(random_prompts(llm.engine.vocab_size, count, 16, seed=0)):
        llm.engine.add_request(str(index), prompt, params)


def flat(times: dict[int, float]) -> Figure:
    low, high = min(times), max(times)
    name = f"host ms a step, {high:,} waiting"
    return Figure(name, 1e3 * times[high], 1e3 * times[low], f"with {low}", FLAT, False)


def figures(options: argparse.Namespace) -> Iterator[Figure]:
    """Every figure but the host's, as soon as it is measured."""
    reference = open_transformers(options.model)
    with open_llm(options.model) as llm:
        for requests, least in ((1, 0.9), (16, 1.2)):
            work = Workload(requests, options.input_len, options.output_len)
            yield throughput(llm, reference, work, options.repeat, least)
        yield shared_prefix(llm, options.prefix_len, options.repeat)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="smollm2, a folder, or a shape")
    parser.add_argument("--host-model", default="tiny-qwen3", help="for the host time a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--prefix-len", type=int, default=1_000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if not sys.stderr.isatty():
        no_bars: Callable[[], None] = logging.disable_progress_bar
        no_bars()
    measured = figures(options)
    found = list(tqdm(measured, total=3, unit="figure", disable=not sys.stderr.isatty()))
    times = host_times(options.host_model, options.repeat)
    found.append(flat(times))
    missed = not all(figure.met for figure in found)
    if options.json:
        rows = [asdict(figure) | {"ratio": figure.ratio, "met": figure.met} for figure in found]
        queue_ms = {str(waiting): 1e3 * seconds for waiting, seconds in times.items()}
        print(json.dumps({"figures": rows, "host_ms_per_step": queue_ms}))
    else:
        print(
            columns(
                [
                    ("waiting", "host ms/step"),
                    *((f"{n:,}", f"{1e3 * t:.3f}") for n, t in times.items()),
                ]
            )
        )
        print()
        print(columns([("", "isobit", "against", "ratio", "bar", ""), *(f.row() for f in found)]))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
