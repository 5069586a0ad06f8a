"""``isobit bench``: what an engine in this process does, against what its device could."""

from __future__ import annotations

import click

from .bench_startup import startup
from .bench_step import step
from .bench_throughput import throughput
from .bench_turns import turns


@click.group("bench")
def command() -> None:
    """Measure an engine on random prompts, against the limits of its device.

    The limits are measured in the same run, with torch: the bytes that a copy within the device's
    memory reads and writes, and the operations of a matrix product (bf16 on CUDA, fp32 on a CPU).

    A step takes at least the time of its bytes or that of its operations, whichever is longer. The
    bytes are the weights (no embedding; the output matrix only where logits are wanted), the K and
    V of earlier tokens read and those of new ones written; the operations are two for each weight
    and new token, and those of attention. The share of the limit is that least time, summed over
    all steps, in what was measured. On a CPU it can exceed 1: caches are faster than a copy of
    memory, and the native kernels can be faster than torch's product.

    Example: isobit bench throughput --workloads 1:128:128,16:128:128
    """


command.add_command(startup)
command.add_command(step)
command.add_command(throughput)
command.add_command(turns)
