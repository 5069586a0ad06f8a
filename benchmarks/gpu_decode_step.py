"""What shortens a decode step on a GPU: kernels that overlap, W asked for ahead, other tiles.

    python benchmarks/gpu_decode_step.py [--rows 1 16 64 256] [--layers 36] [--specialised]

First every way to compute each linear of the model, on the weights of several layers in one graph:
whether it has the canonical bits, and microseconds without and with the overlap. Then the whole
step as a graph, from the embedding to the final norm, in each variant: whether the hidden states
have the bits of the first variant in every replay, and microseconds. The share is that of the rate
at which a copy on the same GPU reads and writes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import triton
from gpu_decode_model import DEVICE, DTYPE, Choices, Model, chosen, overlap
from gpu_decode_tiles import NEW, OLD, SPECIALISED, compiled, fitting
from gpu_kernels import copy_rate, graph_ms
from torch import Tensor

from isobit.backends.recording import record, warm_up
from isobit.kernels.triton.candidates import Candidate, bucket_of, canonical
from isobit.kernels.triton.linear import TritonLinear
from isobit.kernels.triton.norm import rms_norm
from isobit.kernels.triton.trials import Problem, cancelling, same_bits
from isobit.models.registry import load_model_config

AHEADS = (0, 4, 8, 16, 32)
OLD_NAMES = {way.name for way in OLD}


@dataclass(frozen=True)
class Variant:
    """Whether kernels overlap, MiB of W asked for ahead, and the best of which tiles."""

    overlap: bool
    ahead: int
    new_tiles: bool

    def __str__(self) -> str:
        overlap = f"overlap, {self.ahead:2} MiB ahead" if self.overlap else "one after the other"
        return f"{overlap:22} {'all' if self.new_tiles else 'old'} tiles"


VARIANTS = [
    Variant(False, 0, False),
    Variant(False, 0, True),
    *(Variant(True, ahead, tiles) for tiles in (False, True) for ahead in AHEADS),
]


@dataclass
class Timed:
    """A way's microseconds a product: behind a norm, and norm included, with the overlap; behind
    another product, with the overlap and without."""

    way: Candidate
    behind: float
    overlapped: float
    alone: float

    def line(self, num_bytes: int, flops: int, rate: float) -> str:
        us, alone = self.overlapped, self.alone
        age = "old" if self.way.name in OLD_NAMES else "new"
        return (
            f"  {us:8.1f} us {num_bytes / us / 1e3 / rate:4.0%} of copy {flops / us / 1e6:5.0f} "
            f"TFLOP/s; one after the other {alone:8.1f} us {num_bytes / alone / 1e3 / rate:4.0%}  "
            f"behind a norm {self.behind:8.1f} us  {age} {self.way.name}"
        )


def keeps_bits(
    way: Candidate, trials: Sequence[tuple[Tensor, Tensor, Tensor]], bucket: int
) -> bool:
    """Whether it gives each trial's sums, with and without the overlap."""
    for x, weight, expected in trials:
        for enabled in (True, False):
            with overlap(enabled):
                if not same_bits(way(x, weight, torch.float32, bucket), expected):
                    return False
    return True


def sweep(
    kind: str, linears: Sequence[TritonLinear], rows: int, ways: Sequence[Candidate], rate: float
) -> dict[tuple[bool, bool], Candidate]:
    """The best with the overlap or without, of all ways or the old ones; prints some."""
    weights = [each._weight for each in linears]
    columns, depth = weights[0].shape
    bucket = bucket_of(rows)
    out_dtype = torch.float32 if kind == "lm_head" else DTYPE
    some, other = cancelling(Problem(columns, depth, DTYPE, out_dtype, bucket), DEVICE)
    x = torch.randn(rows, depth, device=DEVICE, dtype=DTYPE)
    ones = torch.ones(depth, device=DEVICE, dtype=DTYPE)
    operands = [(x, weights[0]), (some[:rows].contiguous(), other)]
    trials = [(a, b, canonical(a, b, torch.float32)) for a, b in operands]
    timed, different = [], []
    for way in fitting(ways, rows):
        if not keeps_bits(way, trials, bucket):
            different.append(way.name)
            continue

        def run(way: Candidate = way) -> None:
            for weight in weights:
                way(x, weight, out_dtype, bucket)

        def run_behind(way: Candidate = way) -> None:
            for weight in weights:
                rms_norm(x, ones, 1e-6)
                way(x, weight, out_dtype, bucket)

        times = []
        for enabled, work in ((True, run_behind), (True, run), (False, run)):
            with overlap(enabled):
                times.append(graph_ms(work, 9) * 1e3 / len(weights))
        timed.append(Timed(way, *times))
    print(
        f"\n{kind} {columns} x {depth}, {rows} rows; other bits: {', '.join(different) or 'none'}"
    )
    best = {}
    for new in (True, False):
        among = [t for t in timed if new or t.way.name in OLD_NAMES]
        best[True, new] = min(among, key=lambda t: t.behind)
        best[False, new] = min(among, key=lambda t: t.alone)
    timed.sort(key=lambda t: t.behind)
    shown = {t.way.name: t for t in (*timed[:6], *best.values())}
    for each in shown.values():
        print(each.line(2 * columns * depth, 2 * rows * columns * depth, rate), flush=True)
    return {key: each.way for key, each in best.items()}


def time_step(
    model: Model, rows: int, choices: dict[tuple[bool, bool], Choices], rate: float
) -> list[str]:
    """A line a variant."""
    batch = model.batch(rows)
    lines, expected, before = [], None, 0.0
    weights = [each for layer in model.decoder.layers for each in vars(layer).values()]
    linears = [each for each in weights if isinstance(each, TritonLinear)]
    total = sum(each.out_features * each.in_features * 2 for each in linears)
    head = model.decoder.lm_head
    inputs = {
        each.in_features: torch.randn(rows, each.in_features, device=DEVICE, dtype=DTYPE)
        for each in linears
    }
    hidden = torch.empty(rows, model.config.hidden_size, dtype=DTYPE, device=DEVICE)
    for variant in VARIANTS:
        ways = choices[variant.overlap, variant.new_tiles]
        with overlap(variant.overlap, variant.ahead), chosen(ways):
            step = model.step(batch)

            def work(step: Callable[[], Tensor] = step) -> None:
                hidden.copy_(step())

            warm_up(work, DEVICE)
            graph = record(work, DEVICE)
            equal = True
            for _ in range(5):
                hidden.zero_()
                graph.replay()
                expected = hidden.clone() if expected is None else expected
                equal = equal and same_bits(hidden, expected)
            del graph
            us = graph_ms(work) * 1e3
            of_linears = (
                graph_ms(lambda: [each(inputs[each.in_features]) for each in linears]) * 1e3
            )
            of_head = graph_ms(lambda: head.accumulators(hidden)) * 1e3
        before = before or us
        lines.append(
            f"{rows:4} rows  {variant}  step {us:8.0f} us ({us / before - 1:+5.1%}), + lm_head "
            f"{of_head:5.0f} = {us + of_head:8.0f};  linears alone {of_linears:8.0f} us "
            f"{total / of_linears / 1e3 / rate:4.0%} of copy  bits {'same' if equal else 'OTHER'}"
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 64, 256])
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--specialised", action="store_true", help="try warp specialisation too")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("wanted a CUDA device, and torch sees none")
    _, config = load_model_config("qwen3-8b", random=True)
    config = replace(config, num_layers=options.layers)
    torch.manual_seed(0)
    square = torch.randn(1024, 1024, device=DEVICE).to(DTYPE)
    with overlap(True):  # whether a graph takes such launches shows before all else
        graph_ms(lambda: canonical(canonical(square, square, DTYPE), square, DTYPE), 3)
    rate = copy_rate()
    head = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
    print(f"{head}: a copy moves {rate:.0f} GB/s", flush=True)
    ways = compiled([*OLD, *NEW], config)
    if options.specialised:
        ways += compiled(SPECIALISED, config)
    with torch.inference_mode():
        model = Model(config, max(options.rows), options.context)
        choices: dict[tuple[bool, bool], Choices] = {
            (enabled, new): {} for enabled in (False, True) for new in (False, True)
        }
        table: list[str] = []
        for rows in options.rows:
            for kind, linears in model.linears().items():
                size = (linears[0].out_features, linears[0].in_features, bucket_of(rows))
                for key, way in sweep(kind, linears, rows, ways, rate).items():
                    choices[key][size] = way
            table += time_step(model, rows, choices, rate)
    print(f"\n{head}, copy {rate:.0f} GB/s", *table, sep="\n")


if __name__ == "__main__":
    main()
