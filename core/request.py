"""A request on its way through the engine, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from ..cache.radix import RadixNode
from ..sampling.params import SamplingParams
from ..sampling.stopping import FinishReason
from ..sampling.token_counts import TokenCounts


class RequestStatus(Enum):
    """Where a request stands; ``FINISHED`` is final."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """One choice of one prompt (``n`` choices are ``n`` requests that share a prompt).

    ``num_computed_tokens`` counts the tokens whose K and V are in the cache, and
    ``num_scheduled_tokens`` also those that steps under way are computing. ``num_pending_tokens``
    is how many tokens such steps sample: they count, but the host does not know them yet. The
    request's pages, in order, are ``page_ids``. ``num_cached_tokens`` is how many of the prompt's
    tokens came from the prefix cache at first admission. ``arrival`` orders requests first come,
    first served; the scheduler gives it out.

    Tokens below ``prefill_end`` are computed by prefill, those from there on by decoding, one a
    step; it is set at each admission. Of the tokens below ``num_scored_tokens`` no logit row is
    wanted for scoring: it was computed, perhaps before a preemption, or not asked for. ``lock``
    holds the radix path whose pages ``page_ids`` begins with; those after are the request's own.
    ``token_counts`` is what penalties look at, None where there are none.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    arrival: int = 0
    choice: int = 0
    output_token_ids: list[int] = field(default_factory=list)
    status: RequestStatus = RequestStatus.WAITING
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_computed_tokens: int = 0
    num_scheduled_tokens: int = 0
    num_pending_tokens: int = 0
    num_cached_tokens: int | None = None
    num_scored_tokens: int = 0
    prefill_end: int = 0
    num_preemptions: int = 0
    page_ids: list[int] = field(default_factory=list)
    lock: RadixNode | None = None
    token_counts: TokenCounts | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_known_tokens(self) -> int:
        """Tokens of the prompt and those that were read back from the device."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens that there are, known or pending."""
        return self.num_known_tokens + self.num_pending_tokens

    @property
    def num_output_tokens(self) -> int:
        """Output tokens that there are, known or pending."""
        return len(self.output_token_ids) + self.num_pending_tokens

    @property
    def group_id(self) -> str:
        """The id that the user gave: the engine adds ``#choice`` to it, also where n is 1."""
        return self.request_id.rpartition("#")[0]

    @property
    def decoding(self) -> bool:
        """Whether the next token to schedule is computed by a decode step."""
        return self.num_scheduled_tokens >= self.prefill_end

    @property
    def running(self) -> bool:
        return self.status is RequestStatus.RUNNING

    @property
    def finished(self) -> bool:
        return self.status is RequestStatus.FINISHED

    def is_through(self, max_model_len: int) -> bool:
        """Whether nothing is left to schedule: its last token is pending, or its last score."""
        if not self.num_pending_tokens:
            return self.num_scheduled_tokens == self.num_tokens
        most = self.params.max_tokens
        enough = most is not None and self.num_output_tokens >= most
        return enough or self.num_tokens >= max_model_len

    def recount(self) -> None:
        """Count the tokens for penalties from the start."""
        if self.token_counts is not None:
            self.token_counts = TokenCounts(self.params, self.prompt_token_ids)

    def token_slice(self, start: int, stop: int) -> list[int]:
        """Tokens ``start … stop - 1`` of prompt and output together, as far as they are known."""
        prompt = len(self.prompt_token_ids)
        if stop <= prompt:
            return self.prompt_token_ids[start:stop]
        if start >= prompt:
            return self.output_token_ids[start - prompt : stop - prompt]
        return self.prompt_token_ids[start:] + self.output_token_ids[: stop - prompt]
