"""A step on its way through the device, and the results that come of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..sampling.sampled import Sampled
from ..sampling.sampler import SampledRow
from .request import Request
from .step import Step


@dataclass(slots=True)
class SeqResult:
    """What a step found out for one sequence.

    ``prompt_rows`` scores prompt tokens, by position.
    """

    sampled: SampledRow | None = None
    prompt_rows: dict[int, SampledRow] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scored:
    """Scores of a piece of a prompt: of sequence ``index`` of the step, from ``position`` on."""

    index: int
    position: int
    rows: Sampled


@dataclass(frozen=True, slots=True)
class Launched:
    """What a launched step computes: nothing here has been waited for.

    ``sampled`` has a row for each sequence with ``samples``, in order, and ``rows`` says which
    request's it is.
    """

    step: Step
    sampled: Sampled | None
    rows: dict[Request, int]
    scored: list[Scored]

    @property
    def token_ids(self) -> Tensor | None:
        """The sampled tokens, int64 on the device."""
        return None if self.sampled is None else self.sampled.token_ids
