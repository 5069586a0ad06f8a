"""Which cached tokens a later request may reuse, as its attention backend's declarations allow."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from math import lcm

from ..errors import ConfigError


class Provenance(Enum):
    """Which pass wrote a page. One token written by decoding makes its page ``DECODE``."""

    PREFILL = "prefill"
    DECODE = "decode"


class ReuseScope(Enum):
    """Which pages may be handed to another request."""

    ALL = "all"
    PREFILL_ONLY = "prefill_only"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class ReusePolicy:
    """What may be reused, and at which boundaries a reused prefix may end.

    A reused prefix is a chunk boundary like any other, so its length is a multiple of
    ``alignment`` tokens (and of the page size: only whole pages are shared).
    """

    scope: ReuseScope
    alignment: int = 1

    def __post_init__(self) -> None:
        if self.alignment < 1:
            raise ConfigError(f"alignment was {self.alignment}; wanted at least 1 token.")

    def allows(self, provenance: Provenance) -> bool:
        """Whether a page that this pass wrote may be reused."""
        if self.scope is ReuseScope.PREFILL_ONLY:
            return provenance is Provenance.PREFILL
        return self.scope is ReuseScope.ALL

    def boundary(self, num_tokens: int, page_size: int) -> int:
        """``num_tokens`` rounded down to where a reused prefix may end."""
        step = lcm(self.alignment, page_size)
        return num_tokens // step * step


def reuse_policy(
    *, deterministic: bool, chunk_invariant: bool, alignment: int, decode_equals_prefill: bool
) -> ReusePolicy:
    """What a backend's declarations allow (see ``backends.capabilities.Capabilities``).

    Without ``deterministic`` nobody promised equal bits, so everything may be reused. With it,
    reuse means starting a prefill in mid-prompt, which only ``chunk_invariant`` makes harmless;
    and pages that decoding wrote stand for prefilled ones only under ``decode_equals_prefill``.
    """
    if not deterministic:
        return ReusePolicy(ReuseScope.ALL)
    if not chunk_invariant:
        return ReusePolicy(ReuseScope.NONE)
    scope = ReuseScope.ALL if decode_equals_prefill else ReuseScope.PREFILL_ONLY
    return ReusePolicy(scope, alignment)
