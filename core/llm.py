"""The embedding API: ``LLM(model).generate(prompts, params)``."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import MappingProxyType, TracebackType
from typing import Any, Self

from tqdm import tqdm

from ..plugins.manager import PluginHost
from ..sampling.params import SamplingParams
from .chat import Conversation, as_conversations, chat_tokens
from .config import EngineConfig
from .engine import Engine
from .inbox import Inbox, PostOffice, Stream
from .outputs import RequestOutput, ScoreOutput, StreamChunk
from .prompts import Prompt, as_prompts, checked_prompt_lens, one_for_each, prompt_tokens
from .startup import start_engine
from .stats import Stats


class LLM:
    """A model ready to generate, the same bits for the same request.

    >>> from isobit import LLM, SamplingParams
    >>> with LLM("smollm2") as llm:
    ...     output = llm.generate("The capital of France is", SamplingParams(temperature=0))

    One thread at a time; ``AsyncLLM`` serves many callers. Ctrl-C may come at any time: the call
    ends, its requests are aborted, and the object can be used again.

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
        engine, self.report = start_engine(self.config, self.plugins)
        self._office = PostOffice(engine)
        self._added = Inbox(self._office)

    @property
    def engine(self) -> Engine:
        """The engine behind this object, for those who drive it step by step."""
        return self._office.engine

    @property
    def tokenizer(self) -> Any | None:
        """The model's transformers tokenizer; None where its folder has none."""
        return self.engine.tokenizer

    @property
    def fingerprint(self) -> str:
        """Names all that the bits depend on but the request: equal means equal bits."""
        return self.report.fingerprint

    @property
    def fingerprint_parts(self) -> Mapping[str, str]:
        """What is hashed into ``fingerprint``, by name."""
        return MappingProxyType(dict(self.report.fingerprint_parts))

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
        return self._collect(self._submit(many, one_for_each(sampling_params, len(many))), use_tqdm)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        use_tqdm: bool | None = None,
    ) -> list[RequestOutput]:
        """Answer one or many conversations; each output's ``prompt`` is None.

        :param messages: a list of ``{"role": …, "content": …}``, or a list of such lists.
        :param chat_template: a Jinja template instead of the model's own.
        :param add_generation_prompt: end the prompt with the opening of the assistant's turn.
        :raises RequestError: as ``generate``; or there is no tokenizer or template, or the
            template refuses the messages.
        """
        prompts = [
            chat_tokens(
                self.tokenizer,
                conversation,
                chat_template,
                add_generation_prompt=add_generation_prompt,
            )
            for conversation in as_conversations(messages)
        ]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def score(
        self,
        sequences: Prompt | Sequence[Prompt],
        *,
        prompt_lens: int | Sequence[int] | None = None,
        top: int = 0,
        use_tqdm: bool | None = None,
    ) -> list[ScoreOutput]:
        """The logprobs of given tokens; nothing is sampled.

        They are those that decoding reports for the same tokens, bit for bit, where the attention
        backend declares ``decode_equals_prefill``.

        :param sequences: a text, a list of token ids, or a list of either.
        :param prompt_lens: how many leading tokens not to score, one for all or one for each; what
            is not scored costs no logits and may come from the prefix cache.
        :param top: report this many likeliest tokens too.
        :raises RequestError: a sequence can never be served; nothing was run.
        """
        tokens = [prompt_tokens(each, self.tokenizer) for each in as_prompts(sequences)]
        lens = checked_prompt_lens(prompt_lens, tokens)
        params = SamplingParams(max_tokens=0, prompt_logprobs=top)
        starts = [max(1, length) for length in lens]
        stream = self._submit(tokens, [params] * len(tokens), starts)
        outputs = self._collect(stream, use_tqdm)
        return [_score(out, length, top) for out, length in zip(outputs, lens, strict=True)]

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Stream:
        """Complete prompts, yielding each choice's pieces as they come.

        ``chunk.request_id`` is the prompt's place in the list, as a string. The last chunk of a
        request carries its whole ``RequestOutput``. Leaving the loop early aborts what is left.

        :raises RequestError: as ``generate``, before the first chunk.
        """
        many = as_prompts(prompts)
        params = one_for_each(sampling_params, len(many))
        return self._submit(many, params, numbered=True)

    def add_request(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
    ) -> str:
        """Queue a request for ``step``; its id.

        :raises RequestError: it can never be served, or its id is in use; nothing was queued.
        """
        params = SamplingParams() if sampling_params is None else sampling_params
        text = prompt if isinstance(prompt, str) else None
        tokens = prompt_tokens(prompt, self.tokenizer)
        return self._added.add(tokens, params, text, request_id=request_id)

    def step(self) -> list[StreamChunk]:
        """New chunks of the requests from ``add_request``; runs one step where none waits.

        Other calls between two steps may have computed some already. The list may be empty.

        :raises LogitsProcessorError: a request's own processor failed, which ended it.
        """
        added = self._added
        added.check_open()
        if added.unfinished and not added.has_items:
            added.step()
        return added.take_all()

    def abort(self, request_id: str) -> bool:
        """End a request from ``add_request``; False where it is unknown or finished."""
        return self._added.abort(request_id)

    def has_unfinished_requests(self) -> bool:
        """Whether ``step`` has chunks of requests from ``add_request`` still to give."""
        return bool(self._added.unfinished)

    def flush_cache(self) -> int:
        """Empty the prefix cache of all that no request uses; pages freed."""
        return self.engine.flush_cache()

    def stats(self) -> Stats:
        """Counts of now and since start."""
        return self.engine.stats()

    def close(self) -> None:
        """Drop the weights and the cache; the object cannot be used afterwards."""
        self._office.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _submit(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams],
        score_from: Sequence[int] | None = None,
        *,
        numbered: bool = False,
    ) -> Stream:
        """Queue all or none; ``numbered`` names each by its place."""
        inbox = Inbox(self._office)
        names: dict[str, str] = {}
        starts = score_from or [1] * len(prompts)
        try:
            for place, (prompt, param, start) in enumerate(
                zip(prompts, params, starts, strict=True)
            ):
                text = prompt if isinstance(prompt, str) else None
                tokens = prompt_tokens(prompt, self.tokenizer)
                request_id = inbox.add(tokens, param, text, score_from=start)
                names[request_id] = str(place) if numbered else request_id
        except BaseException:
            inbox.close()
            raise
        return Stream(inbox, names)

    def _collect(self, stream: Stream, use_tqdm: bool | None) -> list[RequestOutput]:
        """Run to the end; the outputs in the order of submission."""
        ids = stream.ids
        show = use_tqdm if use_tqdm is not None else len(ids) > 1 and sys.stderr.isatty()
        outputs: dict[str, RequestOutput] = {}
        tokens = 0
        with (
            stream,
            tqdm(total=len(ids), desc="requests", disable=not show, file=sys.stderr) as bar,
        ):
            for chunk in stream:
                tokens += len(chunk.token_ids)
                if chunk.output is not None:
                    outputs[chunk.request_id] = chunk.output
                    bar.update()
                rate = tokens / max(bar.format_dict["elapsed"], 1e-9) if show else 0.0
                bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
        return [outputs[request_id] for request_id in ids]


def _score(output: RequestOutput, prompt_len: int, top: int) -> ScoreOutput:
    rows = output.prompt_logprobs or ()
    own = [
        None if row is None else row[token]
        for token, row in zip(output.prompt_token_ids, rows, strict=True)
    ]
    return ScoreOutput(
        token_ids=output.prompt_token_ids,
        prompt_len=prompt_len,
        logprobs=tuple(None if entry is None else entry.logprob for entry in own),
        ranks=tuple(None if entry is None else entry.rank for entry in own),
        top_logprobs=rows if top else None,
        cumulative_logprob=sum(entry.logprob for entry in own if entry is not None),
        num_cached_tokens=output.num_cached_tokens,
        fingerprint=output.fingerprint,
    )
