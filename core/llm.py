"""The embedding API: ``LLM(model).generate(prompts, params)``."""

from __future__ import annotations

import itertools
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from ..errors import RequestError
from ..plugins.manager import PluginHost
from ..sampling.params import SamplingParams
from .config import EngineConfig
from .engine import Engine
from .outputs import RequestOutput, StreamChunk
from .startup import start_engine

Prompt = str | Sequence[int]
"""A text, or the token ids of one."""


@dataclass(frozen=True, slots=True)
class _Submission:
    """The requests of one call and the chunks that wait for it."""

    ids: list[str]
    inbox: deque[StreamChunk]


class LLM:
    """A model ready to generate, the same bits for the same request.

    >>> from isobit import LLM, SamplingParams
    >>> with LLM("smollm2") as llm:
    ...     output = llm.generate("The capital of France is", SamplingParams(temperature=0))

    :param model: the packaged model's name, a Hugging Face folder, or a built-in shape.
    :param options: the fields of ``EngineConfig``, which documents them.
    :raises ConfigError: an option is unknown or out of range, or the backend cannot hold what was
        asked; the message has every reason and what would work.
    :raises SelfCheckError: no kernels keep their contract on this machine.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self.config = EngineConfig(model=model, **options)
        self.plugins = PluginHost(
            disabled=self.config.disable_plugins, strict_plugins=self.config.strict_plugins
        )
        self._engine: Engine | None
        self._engine, self.report = start_engine(self.config, self.plugins)
        self._ids = itertools.count()
        self._inboxes: dict[str, deque[StreamChunk]] = {}

    @property
    def engine(self) -> Engine:
        """The engine behind this object, for those who drive it step by step."""
        if self._engine is None:
            raise RequestError("this LLM is closed. Make a new one.")
        return self._engine

    @property
    def tokenizer(self) -> Any | None:
        """The model's transformers tokenizer; None where its folder has none."""
        return self.engine.tokenizer

    @property
    def fingerprint(self) -> str:
        """Names all that the bits depend on but the request: equal means equal bits."""
        return self.report.fingerprint

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Complete one or many prompts; outputs come in the order of the prompts.

        :param prompts: a text, a list of token ids, or a list of either.
        :param sampling_params: one for all or one for each; None takes the defaults.
        :param use_tqdm: progress bar on stderr; None shows it on a terminal for many prompts.
        :raises RequestError: a prompt or its parameters can never be served; nothing was run.
        """
        many = as_prompts(prompts)
        params = _per_prompt(sampling_params, len(many))
        show = use_tqdm if use_tqdm is not None else len(many) > 1 and sys.stderr.isatty()
        submission = self._submit(many, params)
        outputs: dict[str, RequestOutput] = {}
        with tqdm(total=len(many), desc="requests", disable=not show, file=sys.stderr) as bar:
            tokens = 0
            for chunk in self._drive(submission):
                tokens += len(chunk.token_ids)
                if chunk.output is not None:
                    outputs[chunk.request_id] = chunk.output
                    bar.update()
                rate = tokens / max(bar.format_dict["elapsed"], 1e-9) if show else 0.0
                bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
        return [outputs[request_id] for request_id in submission.ids]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[StreamChunk]:
        """Complete prompts, yielding each choice's pieces as they come.

        ``chunk.request_id`` is the prompt's place in the list, as a string. The last chunk of a
        request carries its whole ``RequestOutput``. Leaving the loop early aborts what is left.

        :raises RequestError: as ``generate``, before the first chunk.
        """
        many = as_prompts(prompts)
        return self._stream(self._submit(many, _per_prompt(sampling_params, len(many))))

    def close(self) -> None:
        """Drop the weights and the cache; the object cannot be used afterwards."""
        self._engine = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _submit(self, prompts: Sequence[Prompt], params: Sequence[SamplingParams]) -> _Submission:
        submission = _Submission([], deque())
        try:
            for prompt, param in zip(prompts, params, strict=True):
                request_id = str(next(self._ids))
                text = prompt if isinstance(prompt, str) else None
                self.engine.add_request(request_id, self._tokens(prompt), param, text)
                submission.ids.append(request_id)
                self._inboxes[request_id] = submission.inbox
        except BaseException:
            self._abort(submission.ids)
            raise
        return submission

    def _drive(self, submission: _Submission) -> Iterator[StreamChunk]:
        """Step until all is done; whatever ends the loop early aborts the rest.

        A step also serves other submissions (two streams read in turns): each has its inbox.
        """
        unfinished = set(submission.ids)
        try:
            while unfinished:
                while submission.inbox:
                    chunk = submission.inbox.popleft()
                    if chunk.output is not None:
                        unfinished.discard(chunk.request_id)
                    yield chunk
                if unfinished:
                    for chunk in self.engine.step():
                        self._inboxes[chunk.request_id].append(chunk)
        finally:
            self._abort(unfinished)
            for request_id in submission.ids:
                self._inboxes.pop(request_id, None)

    def _stream(self, submission: _Submission) -> Iterator[StreamChunk]:
        places = {request_id: str(place) for place, request_id in enumerate(submission.ids)}
        for chunk in self._drive(submission):
            place = places[chunk.request_id]
            output = chunk.output and replace(chunk.output, request_id=place)
            yield replace(chunk, request_id=place, output=output)

    def _abort(self, ids: Iterable[str]) -> None:
        if self._engine is not None:
            for request_id in ids:
                self._engine.abort(request_id)

    def _tokens(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if self.tokenizer is None:
            raise RequestError(
                "a text prompt needs a tokenizer and this model has none. Pass token ids."
            )
        tokens: list[int] = self.tokenizer.encode(prompt)
        return tokens


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many, as many.

    :raises RequestError: neither a text, a list of token ids, nor a list of either.
    """
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise RequestError(
            f"prompts was of type {type(prompts).__name__}; wanted a text, a list of token ids, or "
            "a list of either. Pass list(…) of it."
        )
    token_ids = [item for item in prompts if isinstance(item, int)]
    if token_ids and len(token_ids) == len(prompts):
        return [token_ids]
    many = [item for item in prompts if isinstance(item, (str, Sequence))]
    if len(many) == len(prompts):
        return many
    raise RequestError(
        "prompts mixes token ids with other things; wanted a text, a list of token ids, or a list "
        "of texts and lists of token ids."
    )


def _per_prompt(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * count
    if not isinstance(params, Sequence) or not all(isinstance(p, SamplingParams) for p in params):
        raise RequestError(
            f"sampling_params was {params!r}; wanted a SamplingParams or a list of them. "
            "SamplingParams.from_mapping makes one from a dict."
        )
    if len(params) != count:
        raise RequestError(
            f"{count} prompts came with {len(params)} sampling_params; pass one for all, or one "
            "for each."
        )
    return list(params)
