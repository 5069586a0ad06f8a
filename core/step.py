"""What one model step computes, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

from .request import Request


@dataclass(frozen=True, slots=True)
class ScheduledSeq:
    """Compute tokens ``start … start + num_tokens - 1`` of ``request``.

    ``is_decode``: one token, in the request's decode phase. ``samples``: its last row is followed
    by no token that there is, so one is sampled, unless the request only scores its prompt.
    ``admission``: how often the request had been preempted, which tells a step of before from one
    of after.
    """

    request: Request
    start: int
    num_tokens: int
    is_decode: bool
    samples: bool
    admission: int = 0

    @property
    def stop(self) -> int:
        """The position after the last."""
        return self.start + self.num_tokens

    @property
    def pending(self) -> bool:
        """Whether the host does not know its last token: a step under way samples it."""
        return self.stop > self.request.num_known_tokens

    @property
    def counts(self) -> bool:
        """Whether its request still runs, on the pages that it had."""
        return self.request.running and self.request.num_preemptions == self.admission


@dataclass(slots=True)
class Step:
    """What to compute now, decodes first, and which requests lost their pages for it."""

    seqs: list[ScheduledSeq] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    num_tokens: int = 0
