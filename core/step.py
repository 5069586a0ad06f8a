"""What one model step computes, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

from .request import Request


@dataclass(frozen=True, slots=True)
class ScheduledSeq:
    """Compute tokens ``start … start + num_tokens - 1`` of ``request``.

    ``is_decode``: one token, in the request's decode phase. ``samples``: its last row is followed
    by no known token, so one is sampled, unless the request only scores its prompt.
    """

    request: Request
    start: int
    num_tokens: int
    is_decode: bool
    samples: bool


@dataclass(slots=True)
class Step:
    """What to compute now, decodes first, and which requests lost their pages for it."""

    seqs: list[ScheduledSeq] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    num_tokens: int = 0
