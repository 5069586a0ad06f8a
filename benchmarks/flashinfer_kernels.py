"""Builds the FlashInfer kernels that the proofs and measurements need, several at a time.

    python benchmarks/flashinfer_kernels.py --jobs 8

FlashInfer builds a module when it is first used, one after the other; here they are built side by
side and found afterwards. A compiler takes its time and a good deal of memory.
"""

from __future__ import annotations

import argparse
import os
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import torch
from flashinfer.jit.attention import gen_batch_prefill_module

_PLAIN, _WINDOW, _CAP = (False, False), (True, False), (False, True)
"""Whether a layer has a sliding window, and whether scores are capped."""

VARIANTS = [
    *((torch.bfloat16, head_dim, _PLAIN) for head_dim in (128, 64)),
    *product((torch.bfloat16, torch.float16), (64,), (_WINDOW, _CAP)),
    (torch.float16, 64, _PLAIN),
    (torch.float16, 128, _PLAIN),
    *product((torch.bfloat16, torch.float16), (256,), (_PLAIN,)),
]
"""dtype, head_dim and kind of layer; those of the models' shapes first."""


def modules() -> list[Any]:
    """FlashInfer's recipes: for each variant the prefill's kernel and the decode's."""
    return [
        gen_batch_prefill_module(
            kernel, dtype, dtype, dtype, torch.int32, head_dim, head_dim, 0, *layer, False
        )
        for dtype, head_dim, layer in VARIANTS
        for kernel in ("fa3", "fa2")
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="compilers at a time")
    jobs = parser.parse_args().jobs
    wanted = [module for module in modules() if not module.is_aot]  # others are ready made
    files = max(1, jobs // max(1, len(wanted)))
    os.environ["MAX_JOBS"] = str(files)  # of one module
    began = time.perf_counter()

    def build(module: Any) -> None:
        # Each by itself: built together they would not be found, and built once more.
        module.build(verbose=False)
        print(f"{module.name}: {time.perf_counter() - began:.0f} s", flush=True)

    with ThreadPoolExecutor(max(1, jobs // files)) as pool:
        list(pool.map(build, wanted))


if __name__ == "__main__":
    main()
