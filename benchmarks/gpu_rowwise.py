"""How fast the ops between the matrix products are on this GPU, beside a copy of as many bytes.

    python benchmarks/gpu_rowwise.py [--model qwen3-8b] [--rows 1 16 256 2048 8192]

Every time is of one CUDA graph, over so many inputs that no cache holds them, up to 64, and as many
outputs. Bytes are those that must be read or written once. The digest is of the results' bits: by
it two versions of a kernel are compared.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
from gpu_kernels import DEVICE, MODELS, SPREAD_BYTES, Shape, copy_rate, graph_ms, normal
from torch import Tensor

from isobit.kernels.dispatch import load_kernels
from isobit.kernels.kernel_set import QkNorm
from isobit.kernels.rope import rope_table

PAGE = 16
_MOST_INPUTS = 64


class Op(NamedTuple):
    """An op on some rows.

    elements: read and written once, of the dtype
    inputs:   makes new ones
    run:      from inputs to what it gives or fills
    """

    name: str
    elements: int
    inputs: Callable[[], tuple[Tensor, ...]]
    run: Callable[..., tuple[Tensor, ...]]


def ops(shape: Shape, m: int, dtype: torch.dtype) -> Iterator[Op]:
    """The ops on ``m`` rows."""
    kernels = load_kernels("triton", DEVICE)
    hidden, inner, dim = shape.hidden, shape.intermediate, shape.head_dim
    width = (shape.q_heads + 2 * shape.kv_heads) * dim
    weight, table = normal(hidden, dtype=dtype), normal(shape.vocab, hidden, dtype=dtype)
    norm = QkNorm(normal(dim, dtype=dtype), normal(dim, dtype=dtype), 1e-6)
    angles = rope_table(torch.logspace(0, -4, dim // 2), 16384).to(DEVICE)
    positions = torch.arange(m, device=DEVICE)
    pages = 1 + torch.randperm(-(-m // PAGE), device=DEVICE)
    slots = pages[positions // PAGE] * PAGE + positions % PAGE

    def rows(columns: int) -> Tensor:
        return torch.randn(m, columns, dtype=dtype, device=DEVICE)

    def cache() -> Tensor:
        shape_ = (len(pages) + 1, PAGE, shape.kv_heads, dim)
        return torch.zeros(shape_, dtype=dtype, device=DEVICE)

    def split(qkv: Tensor) -> tuple[Tensor, ...]:
        return kernels.rope_qkv(qkv, shape.q_heads, shape.kv_heads, norm, angles, positions)

    def written(qkv: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        heads = (qkv, shape.q_heads, shape.kv_heads, norm, angles, positions)
        return kernels.rope_qkv_write(*heads, k, v, slots), k, v

    yield Op(
        "embedding",
        2 * m * hidden,
        lambda: (torch.randint(shape.vocab, (m,), device=DEVICE),),
        lambda ids: (table[ids],),
    )
    yield Op(
        "rms_norm",
        2 * m * hidden,
        lambda: (rows(hidden),),
        lambda x: (kernels.rms_norm(x, weight, 1e-6),),
    )
    yield Op(
        "add_rms_norm",
        4 * m * hidden,
        lambda: (rows(hidden), rows(hidden)),
        lambda x, residual: kernels.add_rms_norm(x, residual, weight, 1e-6),
    )
    yield Op("qk norm + rope", 2 * m * width, lambda: (rows(width),), split)
    yield Op(
        "qk norm + rope + write", 2 * m * width, lambda: (rows(width), cache(), cache()), written
    )
    yield Op(
        "silu_mul", 3 * m * inner, lambda: (rows(2 * inner),), lambda x: (kernels.silu_mul(x),)
    )


def digest(results: tuple[Tensor, ...]) -> str:
    hashed = hashlib.sha256()
    for result in results:
        hashed.update(result.contiguous().view(torch.uint8).cpu().numpy().tobytes())
    return hashed.hexdigest()[:12]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=MODELS, default="qwen3-8b")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 256, 2048, 8192])
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("wanted a CUDA device, and torch sees none")
    dtype: torch.dtype = getattr(torch, arguments.dtype)
    rate = copy_rate()
    head = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
    print(f"{head}, {arguments.model}, {arguments.dtype}: a copy moves {rate:.0f} GB/s")
    for m in arguments.rows:
        torch.manual_seed(m)
        for op in ops(MODELS[arguments.model], m, dtype):
            num_bytes = op.elements * dtype.itemsize
            inputs = [op.inputs() for _ in range(min(_MOST_INPUTS, 1 + SPREAD_BYTES // num_bytes))]

            def every(op: Op = op, inputs: list[tuple[Tensor, ...]] = inputs) -> object:
                return [op.run(*given) for given in inputs]

            us = graph_ms(every) * 1e3 / len(inputs)
            share = num_bytes / us / 1e3 / rate
            print(
                f"M={m:<5} {op.name:24} {us:8.2f} us {num_bytes / us / 1e3:6.0f} GB/s "
                f"{share:4.0%} of copy   {digest(op.run(*inputs[0]))}",
                flush=True,
            )


if __name__ == "__main__":
    main()
