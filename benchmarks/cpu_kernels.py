"""Times the CPU kernels: native, torch's own op (not batch-invariant), and the torch provider.

    python benchmarks/cpu_kernels.py [--threads 2]

Each figure is the minimum of many runs. GB/s counts the weights, or K and V, read once.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from isobit.kernels.dispatch import load_kernels
from isobit.kernels.kernel_set import KernelSet

HIDDEN, INTERMEDIATE, VOCAB, HEADS, KV_HEADS, HEAD_DIM = 576, 1536, 49152, 9, 3, 64
PAGE = 16


def best_us(run: Callable[[], object], seconds: float = 0.3) -> float:
    """Shortest of the runs that fit into ``seconds`` (three at least), in microseconds."""
    run()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times) * 1e6


def report(
    op: str, shape: str, runs: Sequence[Callable[[], object]], flops: float = 0, read: float = 0
) -> None:
    native, default, reference = (best_us(run) for run in runs)
    rate = f"{flops / native / 1e3:8.0f} {read / native / 1e3:7.1f}"
    print(f"{op:12} {shape:26} {native:10.1f} {default:10.1f} {reference:10.1f} {rate}", flush=True)


def bench_linear(native: KernelSet, reference: KernelSet, n: int, k: int, m: int) -> None:
    weight, x = torch.randn(n, k), torch.randn(m, k)
    ours, theirs = native.linear(weight), reference.linear(weight)
    runs = [lambda: ours(x), lambda: functional.linear(x, weight), lambda: theirs(x)]
    report("linear", f"M={m} N={n} K={k}", runs, 2.0 * m * n * k, 4.0 * n * k)


def bench_attention(
    native: KernelSet, reference: KernelSet, batch: int, kv_len: int, new: int
) -> None:
    pages = -(-kv_len // PAGE)
    k_cache, v_cache = torch.randn(2, batch * pages, PAGE, KV_HEADS, HEAD_DIM)
    q = torch.randn(batch * new, HEADS, HEAD_DIM)
    out = torch.empty_like(q)
    table = torch.arange(batch * pages, dtype=torch.int32).view(batch, pages)
    cu = torch.arange(batch + 1, dtype=torch.int32) * new
    lens = torch.full((batch,), kv_len, dtype=torch.int32)

    def paged(kernels: KernelSet) -> Callable[[], None]:
        return lambda: kernels.paged_attention(
            q, k_cache, v_cache, table, cu, lens, HEAD_DIM**-0.5, out
        )

    def dense(t: Tensor, heads: int) -> Tensor:
        return t.reshape(batch, -1, heads, HEAD_DIM).transpose(1, 2).contiguous()

    dq, dk, dv = dense(q, HEADS), dense(k_cache, KV_HEADS), dense(v_cache, KV_HEADS)
    dk, dv = dk[:, :, :kv_len], dv[:, :, :kv_len]
    causal = new == kv_len

    def default() -> Tensor:
        return functional.scaled_dot_product_attention(
            dq, dk, dv, is_causal=causal, enable_gqa=True
        )

    pairs = sum(range(kv_len - new + 1, kv_len + 1))
    flops = 4.0 * batch * HEADS * HEAD_DIM * pairs
    read = 8.0 * batch * kv_len * KV_HEADS * HEAD_DIM
    runs: list[Callable[[], object]] = [paged(native), default, paged(reference)]
    report("attention", f"B={batch} kv={kv_len} new={new}", runs, flops, read)


def bench_rowwise(native: KernelSet, reference: KernelSet, m: int) -> None:
    x, weight = torch.randn(m, HIDDEN), torch.randn(HIDDEN)
    runs: list[Callable[[], object]] = [
        lambda: native.rms_norm(x, weight, 1e-5),
        lambda: functional.rms_norm(x, (HIDDEN,), weight, 1e-5),
        lambda: reference.rms_norm(x, weight, 1e-5),
    ]
    report("rms_norm", f"M={m} H={HIDDEN}", runs)
    gate_up = torch.randn(m, 2 * INTERMEDIATE)
    runs = [
        lambda: native.silu_mul(gate_up),
        lambda: functional.silu(gate_up[:, :INTERMEDIATE]) * gate_up[:, INTERMEDIATE:],
        lambda: reference.silu_mul(gate_up),
    ]
    report("silu_mul", f"M={m} I={INTERMEDIATE}", runs)


def bench_vocabulary(native: KernelSet, reference: KernelSet, m: int) -> None:
    logits = torch.randn(m, VOCAB)
    runs: list[Callable[[], object]] = [
        lambda: native.log_softmax(logits),
        lambda: logits.log_softmax(-1),
        lambda: reference.log_softmax(logits),
    ]
    report("log_softmax", f"M={m} V={VOCAB}", runs)
    ids = torch.arange(m)
    generator = torch.Generator().manual_seed(0)
    runs = [
        lambda: native.gumbel(ids, ids, ids, VOCAB),
        lambda: -torch.empty(m, VOCAB).exponential_(generator=generator).log(),
        lambda: reference.gumbel(ids, ids, ids, VOCAB),
    ]
    report("gumbel", f"M={m} V={VOCAB}", runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    native, reference = load_kernels("native"), load_kernels("torch")
    head = ("op", "shape", "native us", "default us", "torch us", "GFLOP/s", "GB/s")
    print("{:12} {:26} {:>10} {:>10} {:>10} {:>8} {:>7}".format(*head))
    projections = [
        ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
        (2 * INTERMEDIATE, HIDDEN),
        (HIDDEN, INTERMEDIATE),
        (VOCAB, HIDDEN),
    ]
    for n, k in projections:
        for m in (1, 4, 16, 64, 512):
            bench_linear(native, reference, n, k, m)
    for batch, kv_len, new in ((1, 128, 1), (1, 4096, 1), (16, 1024, 1), (1, 512, 512)):
        bench_attention(native, reference, batch, kv_len, new)
    for m in (1, 64, 512):
        bench_rowwise(native, reference, m)
    for m in (1, 16):
        bench_vocabulary(native, reference, m)


if __name__ == "__main__":
    main()
