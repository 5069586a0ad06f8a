"""Times the triton attention kernels on a GPU, after the checks of ``gpu_attention_bits.py``.

    python benchmarks/gpu_attention.py
    python benchmarks/gpu_attention.py --tune --only decode   # a grid of tilings
    python benchmarks/gpu_attention.py --fa3 _vllm_fa3_C.abi3.so

Times are medians over replays of a CUDA graph, without the writing of K and V; caches larger than
the L2 cache are walked in turn. GB/s counts K and V read once, TFLOP/s the visible pairs alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from gpu_attention_bits import CUDA, capture, check_all

from isobit.kernels.triton.decode import Partials, allocate_room, attend_decode, partial_slots
from isobit.kernels.triton.prefill import attend_prefill, prefill_work
from isobit.kernels.triton.tiling import Launch, Scoring, Tiling, default_tiling, hopper_fits

DECODES = [(1, 4096), (1, 32768), (8, 8192), (64, 4096), (256, 1024)]
PREFILL = 16384
L2_BYTES = 200 << 20


def median_us(runs: list[Callable[[], object]], replays: int = 30) -> float:
    """One of the ``runs``, which a graph does one after the other, in microseconds."""
    graph = capture(lambda: [run() for run in runs])
    event: Any = torch.cuda.Event
    times: list[float] = []
    for _ in range(replays):
        start, end = event(enable_timing=True), event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(runs))
    return statistics.median(times)


@dataclass
class Load:
    """What is timed: ``copies`` caches of ``batch`` sequences of ``length``, ``new`` rows each."""

    batch: int
    length: int
    new: int
    page_size: int
    heads: tuple[int, int, int] = (32, 8, 128)
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        num_q_heads, num_kv_heads, dim = self.heads
        width = self.length // self.page_size
        shape = (self.batch * width, self.page_size, num_kv_heads, dim)
        self.kv_bytes = 2 * 2 * self.batch * self.length * num_kv_heads * dim
        copies = 1 if self.new > 1 else max(1, min(16, -(-L2_BYTES // self.kv_bytes)))
        self.caches = [torch.randn(2, *shape, device=CUDA).to(self.dtype) for _ in range(copies)]
        self.q = torch.randn(self.batch * self.new, num_q_heads, dim, device=CUDA).to(self.dtype)
        self.out = torch.empty_like(self.q)
        self.table = torch.randperm(shape[0], device=CUDA).int().view(self.batch, width)
        self.lens = torch.full((self.batch,), self.length, dtype=torch.int32, device=CUDA)
        self.starts = torch.arange(self.batch + 1, dtype=torch.int32, device=CUDA) * self.new
        self.scale = dim**-0.5

    def rate(self, us: float) -> str:
        if self.new == 1:
            return f"{self.kv_bytes / us / 1e3:7.0f} GB/s"
        pairs = self.batch * sum(range(self.length - self.new + 1, self.length + 1))
        return f"{4 * self.heads[0] * self.heads[2] * pairs / us / 1e6:7.0f} TFLOP/s"

    def each(self, run: Callable[..., None], *arguments: object) -> float:
        """``run(q, k_cache, v_cache, *arguments)`` on every cache, in microseconds a run."""
        return median_us([partial(run, self.q, k, v, *arguments) for k, v in self.caches])

    def ours(self, tiling: Tiling) -> float:
        num_q_heads, num_kv_heads, dim = self.heads
        scoring, group = Scoring(scale=self.scale), num_q_heads // num_kv_heads
        tail = (self.lens, self.table, scoring, tiling)
        if self.new == 1:
            slots = partial_slots(self.batch, num_kv_heads, self.length, tiling)
            serial = tiling.serial_splits(self.batch * num_kv_heads)
            room = allocate_room(self.batch * slots, num_q_heads, dim, CUDA)
            partials = Partials.within(room, self.batch, slots, num_q_heads, dim, serial)
            return self.each(attend_decode, self.batch, *tail, partials, self.out)
        lens = ([self.new] * self.batch, [self.length] * self.batch)
        tiles = prefill_work(*lens, first=0, group=group, rows=tiling.prefill.rows)
        work = torch.tensor(tiles, dtype=torch.int32, device=CUDA)
        return self.each(attend_prefill, work, self.starts, *tail, self.out)

    def fa3(self, splits: int) -> float:
        """Flash Attention 3 on the same tensors, by the library that ``--fa3`` loaded."""
        none = None
        return self.each(
            torch.ops._vllm_fa3_C.fwd, none, none, none, self.out,
            self.starts, none, none, none, self.lens, self.new, self.length,
            self.table, none, none, none, none, none, none, none, none,
            self.scale, True, -1, -1, 0.0, True, none, splits, none, 0,
            none, 1, 0, none,
        )  # fmt: skip


def tilings(base: Tiling, load: Load) -> Iterator[Tiling]:
    """The grid of ``--tune``; ``serial`` costs no compilation."""
    if load.new > 1:
        if base.hopper:
            yield base
        for shape in [(128, 8, 3), (128, 8, 4), (128, 8, 2)]:
            for flat in (False, True):
                yield replace(base, prefill=Launch(*shape), hopper=False, flat=flat)
        for near_split in (512, 1024):
            yield replace(base, near_split=near_split)
        return
    serials = (0, 1024, 2048, 4096) if load.batch * load.heads[1] >= base.serial_from else (0,)
    for shape in [(16, 4, 3), (16, 4, 4), (16, 4, 2), (16, 8, 3), (16, 2, 3), (16, 2, 2)]:
        for serial in serials:
            yield replace(base, decode=Launch(*shape), serial=serial)
    for serial in serials:
        yield replace(base, near_split=512, serial=serial)


def time_load(load: Load, tune: bool, fa3: bool) -> str:
    name = f"{load.batch} x {load.length}, {load.new} new, page {load.page_size}"
    hopper = hopper_fits(CUDA, 2, load.heads[2], load.page_size)
    base = default_tiling(load.heads[2], 2, 232448, hopper)
    best: tuple[float, str] | None = None
    for tiling in tilings(base, load) if tune else [base]:
        launch = tiling.prefill if load.new > 1 else tiling.decode
        free = (
            f"hopper={tiling.hopper} flat={tiling.flat}"
            if load.new > 1
            else f"serial={tiling.serial}"
        )
        label = f"S={tiling.near_split}/{tiling.split} {free} {launch}"
        try:
            us = load.ours(tiling)
        except Exception as error:  # a tiling may be too large for the card
            print(f"{name:36} {label}: {type(error).__name__}", flush=True)
            continue
        print(f"{name:36} {us:9.1f} us {load.rate(us)}  {label}", flush=True)
        best = min(best or (us, label), (us, label))
    line = f"{name:36} " + (
        f"{best[0]:9.1f} us {load.rate(best[0])}  {best[1]}" if best else "nothing ran"
    )
    for splits in (0, 1) if fa3 else ():
        us = load.fa3(splits)
        line += f"\n{'':36} {us:9.1f} us {load.rate(us)}  FA3, num_splits={splits}"
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--skip-checks", action="store_true")
    parser.add_argument("--only", choices=["decode", "prefill"])
    parser.add_argument("--tune", action="store_true", help="time a grid of tilings")
    parser.add_argument("--fa3", help="a library that registers torch.ops._vllm_fa3_C")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("This benchmark needs a CUDA device.")
    if options.fa3:
        load_library: Any = torch.ops.load_library
        load_library(options.fa3)
    good = options.skip_checks or check_all()
    loads = []
    if options.only != "prefill":
        loads += [(batch, length, 1, 16) for batch, length in DECODES]
    if options.only != "decode":
        loads += [(1, PREFILL, PREFILL, page_size) for page_size in (16, 64)]
    summary = [time_load(Load(*load), options.tune, bool(options.fa3)) for load in loads]
    print("\n".join(["", *summary]))
    sys.exit(not good)


if __name__ == "__main__":
    main()
