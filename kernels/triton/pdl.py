"""Programmatic dependent launch: a kernel's programs start while the kernel before it ends.

Contract: it changes no bit. A kernel launched with ``overlapping`` calls ``wait_for_inputs`` before
it reads what another such kernel writes, and before it writes anything. The wait ends when the
kernel before has ended and its results can be seen; as that one waited too, so have all before it.
A program that touches nothing of the kind may end without a wait where another of its kernel waits.

Ahead of the wait a program may read weights, and what torch's ops or copies wrote: these are
launched without the attribute, so whatever comes after them starts when they have ended.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import launch


def overlapping(device: torch.device) -> dict[str, bool]:
    """What a kernel that calls ``wait_for_inputs`` is launched with."""
    if launch.OVERLAP and launch.hopper(device):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """The next kernel's programs may start once all of this kernel's have come here."""
    if PDL:
        # Not tl.extra.cuda's, which cannot be called in Triton 3.4.
        tl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; mov.u32 $0, 0;", "=r", [], tl.int32, False, 1
        )


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Go on when all earlier kernels have ended; the next one's programs may start meanwhile."""
    let_next_start(PDL)
    if PDL:
        tl.inline_asm_elementwise(
            "griddepcontrol.wait; mov.u32 $0, 0;", "=r", [], tl.int32, False, 1
        )
