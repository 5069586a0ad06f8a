"""Compiles every Triton kernel for a GPU that need not be there, and launches none.

    python compile_all.py 90             # compute capability 9.0
    python compile_all.py 90 --broken    # a kernel with a mistake besides

Prints a JSON object a kernel: its name, whether a program's shared memory is there, and the options
that the launch names. What a kernel computes is left to the interpreter and to GPUs; here it shows
whether it compiles, and fits.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # read when Triton is imported

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from isobit.kernels.kernel_set import Draw, QkNorm
from isobit.kernels.triton import activation, choose, decode, logits, matmul, norm, philox, rope_qk
from isobit.kernels.triton import prefill as prefills
from isobit.kernels.triton.tiling import HOPPER_PREFILL, Scoring, default_tiling, in_gluon

SHARED_MEMORY = {80: 166_912, 90: 232_448}
"""Bytes that one program may have, by compute capability."""
BF16 = torch.bfloat16
HEADS = {64: (9, 3), 128: (32, 8), 256: (8, 1)}
"""Query and KV heads by head_dim."""


class Nowhere:
    """A driver whose device exists only for the compiler."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@triton.jit
def _broken(n, out):
    part = tl.program_id(0)
    if n != 0:
        part = part * 1.5
    tl.store(out, part)


def products(capability: int) -> Iterator[Callable[[], object]]:
    def product(tile: matmul.Tile, dtype: torch.dtype, depth: int) -> Callable[[], object]:
        x, weight = torch.empty(16, depth, dtype=dtype), torch.empty(64, depth, dtype=dtype)
        return lambda: matmul.matmul(x, weight, torch.float32, tile)

    swapped = matmul.SWAPPED_TILES if capability == 90 else ()
    for tile in (matmul.CANONICAL, *matmul.HALF_TILES, *swapped):
        yield product(tile, BF16, 512)
    for tile in (matmul.FLOAT_CANONICAL, *matmul.FLOAT_TILES):
        yield product(tile, torch.float32, 512)
    yield product(matmul.CANONICAL, torch.float16, 600)  # its last tile is not full


def row_wise() -> Iterator[Callable[[], object]]:
    for dtype in (BF16, torch.float32):
        x, weight = torch.empty(4, 576, dtype=dtype), torch.empty(576, dtype=dtype)
        yield lambda x=x, weight=weight: norm.rms_norm(x, weight, 1e-5)
        yield lambda x=x, weight=weight: norm.add_rms_norm(x, x, weight, 1e-5)
        yield lambda x=x: activation.silu_mul(x)
    cos_sin, positions = torch.empty(100, 128), torch.zeros(4, dtype=torch.int64)
    qkv = torch.empty(4, 48 * 128, dtype=BF16)
    heads = QkNorm(torch.empty(128, dtype=BF16), torch.empty(128, dtype=BF16), 1e-6)
    cache = torch.empty(3, 16, 8, 128, dtype=BF16)
    yield lambda: rope_qk.rope_qkv(qkv, 32, 8, None, cos_sin, positions)
    yield lambda: rope_qk.rope_qkv_write(
        qkv, 32, 8, heads, cos_sin, positions, cache, cache, positions
    )


def sampling() -> Iterator[Callable[[], object]]:
    rows, long = torch.empty(4, 49_152), torch.zeros(4, dtype=torch.int64)
    yield lambda: logits.log_softmax(rows)
    yield lambda: philox.gumbel(long, long, long, 49_152)
    for filtered in (long, long[:0]):
        draw = Draw(
            temperatures=rows[:, 0].contiguous(),
            top_k=long,
            top_p=long.double(),
            min_p=rows[:, 0].contiguous(),
            filtered=filtered,
            seeds=long,
            choices=long,
            positions=long,
        )
        yield lambda draw=draw: choose.choose(rows, draw)


def attention(capability: int) -> Iterator[Callable[[], object]]:
    room = SHARED_MEMORY[capability]
    plain, capped = Scoring(scale=0.1), Scoring(scale=0.1, soft_cap=30.0, window=100)
    for head_dim in HEADS:
        yield from _both(head_dim, BF16, plain, room, hopper=False)
        if capability == 90 and head_dim in HOPPER_PREFILL and in_gluon():
            yield from _both(head_dim, BF16, plain, room, hopper=True)
    yield from _both(64, torch.float32, plain, room, hopper=False)
    yield from _both(128, torch.float16, capped, room, hopper=False)


def _both(
    head_dim: int, dtype: torch.dtype, scoring: Scoring, room: int, hopper: bool
) -> Iterator[Callable[[], object]]:
    """A decode of two sequences, and a prefill of the same."""
    num_q_heads, num_kv_heads = HEADS[head_dim]
    tiling = default_tiling(head_dim, dtype.itemsize, room, hopper)
    q = torch.empty(2, num_q_heads, head_dim, dtype=dtype)
    cache = torch.empty(600, 16, num_kv_heads, head_dim, dtype=dtype)
    lens, table = torch.ones(2, dtype=torch.int32), torch.zeros(2, 300, dtype=torch.int32)
    out, tail = torch.empty_like(q), (lens, table, scoring, tiling)

    def decoded() -> None:
        slots = decode.partial_slots(2, num_kv_heads, 4800, tiling)
        whole = decode.allocate_room(2 * slots, num_q_heads, head_dim, q.device)
        serial = tiling.serial_splits(2 * num_kv_heads)
        partials = decode.Partials.within(whole, 2, slots, num_q_heads, head_dim, serial)
        decode.attend_decode(q, cache, cache, 2, *tail, partials, out)

    def prefilled() -> None:
        work, starts = torch.zeros(1, 2, dtype=torch.int32), torch.arange(3, dtype=torch.int32)
        prefills.attend_prefill(q, cache, cache, work, starts, *tail, out)

    yield decoded
    yield prefilled


def main(capability: int, broken: bool) -> None:
    driver.set_active(Nowhere(capability))
    real = JITFunction.run

    def compiled(self: Any, *arguments: Any, warmup: bool, **options: Any) -> Any:
        kernel = real(self, *arguments, warmup=True, **options)
        name = f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}"
        found = {"kernel": name, "fits": kernel.metadata.shared <= SHARED_MEMORY[capability]}
        print(json.dumps(found | {"options": list(options)}), flush=True)
        return kernel

    JITFunction.run = compiled
    if broken:
        _broken[(1,)](2, torch.empty(1))
    for launches in (products(capability), row_wise(), sampling(), attention(capability)):
        for launch in launches:
            launch()


if __name__ == "__main__":
    main(int(sys.argv[1]), "--broken" in sys.argv)
