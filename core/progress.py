"""How far the requests have come: their tokens, texts and logprobs so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..sampling.detokenizer import Detokenizer
from ..sampling.logprobs import token_logprobs
from ..sampling.params import SamplingParams
from ..sampling.sampler import SampledRow
from ..sampling.stopping import Finish, check_finish, check_token
from .outputs import CompletionOutput, RequestOutput, TokenLogprobs
from .request import Request


@dataclass(slots=True, eq=False)
class Choice:
    """One choice on its way: the scheduler's request and what was made of its tokens."""

    request: Request
    detokenizer: Detokenizer
    rows: list[SampledRow] = field(default_factory=list)
    text: str = ""

    def append(
        self, row: SampledRow, eos_token_ids: tuple[int, ...], max_model_len: int
    ) -> tuple[str, Finish | None]:
        """Take the token just sampled; the text that is now safe to show, and whether it ends."""
        request = self.request
        params = request.params
        self.rows.append(row)
        count = len(self.rows)
        ends = check_token(row.token_id, params, count, eos_token_ids) is not None
        text = self.detokenizer.append(row.token_id, ends=ends)
        finish = check_finish(
            row.token_id,
            params,
            num_prompt_tokens=request.num_prompt_tokens,
            num_output_tokens=count,
            max_model_len=max_model_len,
            eos_token_ids=eos_token_ids,
            matched_stop=self.detokenizer.matched_stop,
        )
        if finish is not None:
            text += self.detokenizer.finish()
        self.text += text
        return text, finish

    def logprobs(self, last: int, tokenizer: Any | None) -> tuple[TokenLogprobs, ...] | None:
        """The logprobs of the ``last`` tokens, where they were asked for."""
        if self.request.params.logprobs is None:
            return None
        rows = self.rows[len(self.rows) - last :]
        return tuple(token_logprobs(row, tokenizer) for row in rows)

    def output(self, tokenizer: Any | None) -> CompletionOutput:
        """What it has come to."""
        return CompletionOutput(
            index=self.request.choice,
            text=self.text,
            token_ids=tuple(row.token_id for row in self.rows),
            cumulative_logprob=sum(row.logprob for row in self.rows),
            logprobs=self.logprobs(len(self.rows), tokenizer),
            finish_reason=self.request.finish_reason,
            stop_reason=self.request.stop_reason,
        )


@dataclass(slots=True, eq=False)
class Group:
    """A request as the user made it: one prompt, its choices, its prompt's scores by position."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    params: SamplingParams
    score_from: int = 1
    choices: list[Choice] = field(default_factory=list)
    prompt_rows: dict[int, SampledRow] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return all(choice.request.finished for choice in self.choices)

    def output(self, fingerprint: str, tokenizer: Any | None) -> RequestOutput:
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=tuple(self.prompt_token_ids),
            prompt_logprobs=self._prompt_logprobs(tokenizer),
            outputs=tuple(choice.output(tokenizer) for choice in self.choices),
            num_cached_tokens=self.choices[0].request.num_cached_tokens or 0,
            fingerprint=fingerprint,
        )

    def _prompt_logprobs(self, tokenizer: Any | None) -> tuple[TokenLogprobs | None, ...] | None:
        if self.params.prompt_logprobs is None:
            return None
        first = min(self.score_from, len(self.prompt_token_ids))
        scored = range(first, len(self.prompt_token_ids))
        rows = (token_logprobs(self.prompt_rows[p], tokenizer) for p in scored)
        return (*[None] * first, *rows)
