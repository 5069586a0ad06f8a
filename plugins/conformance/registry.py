"""All checks, in the order in which they run: what is wrong altogether shows first."""

from __future__ import annotations

from .check import Check
from .checks import accuracy, bits, contract, engine, graphs, refused

CHECKS: tuple[Check, ...] = (
    *refused.CHECKS,
    *accuracy.CHECKS,
    *contract.CHECKS,
    *bits.CHECKS,
    *graphs.CHECKS,
    *engine.CHECKS,
)
