"""What each way to a batch-invariant CPU linear costs, and whether it is one on this machine.

python benchmarks/cpu_contracts.py [--threads 2]

Ways: torch's default; the same under MKL's strict reproducible mode (which must be set before torch
is imported, so it runs in a process of its own); tiles of 16 rows (the torch provider); the native
kernel. "Other bits at M" says at how many of the probed numbers of rows, up to 129, the first row
has other bits than alone. Times are minimums in microseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from isobit.kernels.dispatch import load_kernels

SHAPES = ((960, 576), (3072, 576), (576, 1536))
ROWS = (1, 8, 16, 128, 512)
PROBED = (*range(2, 33), 48, 64, 65, 96, 128, 129)
STRICT = "AVX512,STRICT"

Linear = Callable[[Tensor], Tensor]


def ways(weight: Tensor, strict: bool) -> dict[str, Linear]:
    """The ways that this process can measure, by name."""
    if strict:
        return {f"MKL_CBWR={STRICT}": lambda x: functional.linear(x, weight)}
    return {
        "default": lambda x: functional.linear(x, weight),
        "16-row tiles": load_kernels("torch").linear(weight),
        "native": load_kernels("native").linear(weight),
    }


def fastest(run: Callable[[], object]) -> float:
    """The minimum over 0.2 s, in microseconds."""
    run()
    best, end = float("inf"), time.perf_counter() + 0.2
    while time.perf_counter() < end:
        began = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - began)
    return best * 1e6


def measure(strict: bool) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    rows: list[dict[str, Any]] = []
    for n, k in SHAPES:
        weight = torch.randn(n, k, generator=generator)
        x = torch.randn(max(ROWS), k, generator=generator)
        for name, linear in ways(weight, strict).items():
            alone = linear(x[:1].clone())
            other = [m for m in PROBED if not torch.equal(linear(x[:m].clone())[:1], alone)]
            times = [fastest(partial(linear, x[:m])) for m in ROWS]
            rows.append({"shape": f"{n} x {k}", "way": name, "us": times, "other": other})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--strict-child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.strict_child:
        print(json.dumps(measure(strict=True)))
        return
    child = subprocess.run(
        [sys.executable, __file__, "--strict-child", "--threads", str(args.threads)],
        env=os.environ | {"MKL_CBWR": STRICT},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = sorted(
        [*measure(strict=False), *json.loads(child.stdout)], key=lambda row: str(row["shape"])
    )
    print(f"{'N x K':12}{'way':24}" + "".join(f"{f'M={m}':>9}" for m in ROWS) + "  other bits at M")
    for row in rows:
        times = "".join(f"{us:9.1f}" for us in row["us"])
        print(f"{row['shape']:12}{row['way']:24}{times}  {spans(row['other'])}")


def spans(numbers: list[int]) -> str:
    """Short form of an ascending list, or "none"."""
    if not numbers:
        return "none"
    return f"{len(numbers)} of {len(PROBED)} probed, {numbers[0]} … {numbers[-1]}"


if __name__ == "__main__":
    main()
