"""Which products give one set of bits on this GPU, and how fast the Triton provider's ops are.

    python benchmarks/gpu_kernels.py [--models qwen3-8b smollm2] [--rows 1 16] [--dtype bfloat16]

Every time is of one CUDA graph: for a projection over so many weights of its shape that no cache
holds them, for a model over the linears of all its layers. GB/s counts a weight read once, and is
given as a share of what a copy moves (read and written) on the same GPU in the same run.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional
from triton.runtime.errors import OutOfResources

from isobit.kernels.dispatch import load_kernels
from isobit.kernels.kernel_set import Draw, QkNorm
from isobit.kernels.rope import rope_table
from isobit.kernels.triton.candidates import UnfitError, bucket_of, candidates
from isobit.kernels.triton.choose import choose
from isobit.kernels.triton.linear import TritonLinear
from isobit.kernels.triton.logits import log_normalisers
from isobit.kernels.triton.trials import Problem, same_bits, trials

DEVICE = torch.device("cuda")
SPREAD_BYTES = 2**28  # several times the second-level cache


class Shape(NamedTuple):
    """A model's sizes."""

    hidden: int
    intermediate: int
    q_heads: int
    kv_heads: int
    head_dim: int
    layers: int
    vocab: int

    def projections(self) -> dict[str, tuple[int, int]]:
        """(columns, depth) of each linear."""
        q = self.q_heads * self.head_dim
        return {
            "qkv": (q + 2 * self.kv_heads * self.head_dim, self.hidden),
            "o": (self.hidden, q),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
            "lm_head": (self.vocab, self.hidden),
        }


MODELS = {
    "qwen3-8b": Shape(4096, 12288, 32, 8, 128, 36, 151936),
    "qwen3-1.7b": Shape(2048, 6144, 16, 8, 128, 28, 151936),
    "llama-3.2-1b": Shape(2048, 8192, 32, 8, 64, 16, 128256),
    "smollm2": Shape(576, 1536, 9, 3, 64, 30, 49152),
}


def graph_ms(run: Callable[[], object], replays: int = 15) -> float:
    """Median time of a replay of ``run``'s graph, in milliseconds."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    for _ in range(replays):
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    times: list[float] = [start.elapsed_time(end) for start, end in pairs]
    return statistics.median(times)


def copy_rate() -> float:
    """GB/s that a copy of 4 GiB reads and writes, by the driver or by a kernel: the faster one."""
    source = torch.zeros(2**30, device=DEVICE)
    target = torch.empty_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    return 2 * source.nbytes / min(graph_ms(way) for way in ways) / 1e6


def normal(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def bits_and_times(
    columns: int, depth: int, rows: int, dtype: torch.dtype, weights: Sequence[Tensor]
) -> Iterator[tuple[str, bool, float]]:
    """Each candidate with whether it has the canonical bits, and microseconds a product."""
    bucket = bucket_of(rows)
    problem = Problem(columns, depth, dtype, dtype, bucket)
    x = normal(rows, depth, dtype=dtype)
    tried = list(trials(problem, weights[0]))
    for candidate in candidates(dtype, bucket):
        try:
            equal = all(trial.passed(candidate, rows) for trial in tried)
        except (OutOfResources, UnfitError):
            continue

        def every(candidate=candidate) -> None:  # type: ignore[no-untyped-def]
            for weight in weights:
                candidate(x, weight, dtype, bucket, None)

        yield candidate.name, equal, graph_ms(every) * 1e3 / len(weights)
    torch_default = graph_ms(lambda: [functional.linear(x, weight) for weight in weights])
    equal = all(
        same_bits(functional.linear(trial.x[:rows], trial.weight), trial.expected[:rows])
        for trial in tried
        if trial.expected.dtype == dtype
    )
    yield "torch's default", equal, torch_default * 1e3 / len(weights)


def bench_projection(
    name: str, size: tuple[int, int], rows: Sequence[int], dtype: torch.dtype, rate: float
) -> list[str]:
    """Prints a line a row count; returns the candidates that gave other bits."""
    columns, depth = size
    bytes_each = columns * depth * dtype.itemsize
    weights = [
        normal(columns, depth, dtype=dtype) for _ in range(max(1, SPREAD_BYTES // bytes_each))
    ]
    other: list[str] = []
    for m in rows:
        results = list(bits_and_times(columns, depth, m, dtype, weights))
        *ours, (_, default_equal, default_us) = results
        other += [f"{name} M{m}: {candidate}" for candidate, equal, _ in ours if not equal]
        sound = [(us, candidate) for candidate, equal, us in ours if equal]
        us, best = min(sound)
        share = bytes_each / us / 1e3 / rate
        print(
            f"{name:22} N={columns:<6} K={depth:<5} M={m:<4} {len(sound):2}/{len(ours)} equal  "
            f"{best:28} {us:8.1f} us {share:4.0%} of copy   default {default_us:8.1f} us "
            f"{'same' if default_equal else 'other'} bits",
            flush=True,
        )
    return other


def bench_model(
    name: str, shape: Shape, rows: Sequence[int], dtype: torch.dtype, rate: float
) -> list[str]:
    """Lines of the last table: all linears of a step, tuned and by torch's default."""
    sizes = shape.projections()
    repeated = [size for op, size in sizes.items() if op != "lm_head"] * shape.layers
    weights = [normal(n, k, dtype=dtype) for n, k in (*repeated, sizes["lm_head"])]
    linears = [TritonLinear(weight) for weight in weights]
    total = sum(weight.nbytes for weight in weights)
    lines = []
    for m in rows:
        inputs = {k: normal(m, k, dtype=dtype) for _, k in sizes.values()}
        for linear in linears[-5:]:
            linear.tune(m)

        def ours(inputs=inputs) -> None:  # type: ignore[no-untyped-def]
            for linear in linears[:-1]:
                linear(inputs[linear.in_features])
            linears[-1].accumulators(inputs[linears[-1].in_features])

        def default(inputs=inputs) -> None:  # type: ignore[no-untyped-def]
            for weight in weights:
                functional.linear(inputs[weight.shape[1]], weight)

        ms, default_ms = graph_ms(ours), graph_ms(default)
        lines.append(
            f"{name:14} M={m:<4} {ms:8.3f} ms {total / ms / 1e6:6.0f} GB/s "
            f"{total / ms / 1e6 / rate:4.0%} of copy   torch's default {default_ms:8.3f} ms"
        )
    return lines


def rowwise_ops(shape: Shape, m: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """The ops on ``m`` rows, by name."""
    kernels = load_kernels("triton", DEVICE)
    x, residual = normal(m, shape.hidden, dtype=dtype), normal(m, shape.hidden, dtype=dtype)
    weight = normal(shape.hidden, dtype=dtype)
    qkv = normal(m, shape.projections()["qkv"][0], dtype=dtype)
    norm = QkNorm(normal(shape.head_dim, dtype=dtype), normal(shape.head_dim, dtype=dtype), 1e-6)
    table = rope_table(torch.logspace(0, -4, shape.head_dim // 2), 4096).to(DEVICE)
    ids = torch.arange(m, device=DEVICE)
    pages = (-(-m // 16), 16, shape.kv_heads, shape.head_dim)
    k_cache, v_cache = normal(*pages, dtype=dtype), normal(*pages, dtype=dtype)
    gate_up = normal(m, 2 * shape.intermediate, dtype=dtype)
    logits = normal(m, shape.vocab, dtype=torch.float32)

    def draw(filtered: int, top_k: int = 50) -> Draw:
        return Draw(
            temperatures=torch.full((m,), 0.8, device=DEVICE),
            top_k=torch.full((m,), top_k, device=DEVICE),
            top_p=torch.full((m,), 0.9, dtype=torch.float64, device=DEVICE),
            min_p=torch.zeros(m, device=DEVICE),
            filtered=ids[:filtered],
            seeds=ids,
            choices=ids,
            positions=ids,
        )

    plain, both, top_p = draw(0), draw(m), draw(m, shape.vocab)
    return {
        "add_rms_norm": lambda: kernels.add_rms_norm(x, residual, weight, 1e-6),
        "qk norm + rope + write": lambda: kernels.rope_qkv_write(
            qkv, shape.q_heads, shape.kv_heads, norm, table, ids, k_cache, v_cache, ids
        ),
        "silu_mul": lambda: kernels.silu_mul(gate_up),
        "log_normalisers": lambda: log_normalisers(logits),
        "choose": lambda: choose(logits, plain),
        "choose, top-k and top-p": lambda: choose(logits, both),
        "choose, top-p": lambda: choose(logits, top_p),
    }


def bench_rowwise(name: str, shape: Shape, rows: Sequence[int], dtype: torch.dtype) -> list[str]:
    """Lines of microseconds a call, and of a whole step: every layer's ops, then an unfiltered draw
    with its logprobs."""
    a_layer = {"add_rms_norm": 2, "qk norm + rope + write": 1, "silu_mul": 1}
    a_step = {"add_rms_norm": 1, "log_normalisers": 1, "choose": 1}
    lines = []
    for m in rows:
        ops = rowwise_ops(shape, m, dtype)
        us = {op: graph_ms(repeated(run)) * 100 for op, run in ops.items()}
        calls = {op: shape.layers * a_layer.get(op, 0) + a_step.get(op, 0) for op in us}
        total = sum(calls[op] * us[op] for op in us) / 1e3
        times = ", ".join(f"{op} {time:.1f}" for op, time in us.items())
        lines.append(f"{name:14} M={m:<4} us: {times}; a step {total:.3f} ms")
    return lines


def repeated(run: Callable[[], object]) -> Callable[[], None]:
    """Ten calls."""

    def ten_times() -> None:
        for _ in range(10):
            run()

    return ten_times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--rows", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    )
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=("candidates", "rowwise", "models"),
        default=["candidates", "rowwise", "models"],
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("wanted a CUDA device, and torch sees none")
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    torch.manual_seed(0)
    rate = copy_rate()
    head = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
    print(f"{head}, {arguments.dtype}: a copy moves {rate:.0f} GB/s", flush=True)
    other: list[str] = []
    table: list[str] = []
    for name in arguments.models:
        shape = MODELS[name]
        if "candidates" in arguments.parts:
            for op, size in shape.projections().items():
                other += bench_projection(f"{name} {op}", size, arguments.rows, dtype, rate)
        if "rowwise" in arguments.parts:
            few = [m for m in arguments.rows if m <= 128]
            print(*bench_rowwise(name, shape, few, dtype), sep="\n", flush=True)
        if "models" in arguments.parts:
            table += bench_model(name, shape, arguments.rows, dtype, rate)
        torch.cuda.empty_cache()
    print(f"\n{head}, {arguments.dtype}, copy {rate:.0f} GB/s")
    print("candidates with other bits:", "; ".join(other) or "none")
    print(*table, sep="\n")


if __name__ == "__main__":
    main()
