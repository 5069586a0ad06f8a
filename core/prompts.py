"""What callers may pass as prompts, parameters and prompt lengths, as lists of one shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import RequestError
from ..sampling.params import SamplingParams

Prompt = str | Sequence[int]
"""A text, or the token ids of one."""


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many, as many.

    :raises RequestError: neither a text, a list of token ids, nor a list of either.
    """
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes):
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


def prompt_tokens(prompt: Prompt, tokenizer: Any | None) -> list[int]:
    """The token ids of a prompt.

    :raises RequestError: it is a text and there is no tokenizer.
    """
    if not isinstance(prompt, str):
        return list(prompt)
    if tokenizer is None:
        raise RequestError(
            "a text prompt needs a tokenizer and this model has none. Pass token ids."
        )
    tokens: list[int] = tokenizer.encode(prompt)
    return tokens


def one_for_each(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    """Parameters for each of ``count`` prompts.

    :raises RequestError: something else, or another number of them.
    """
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


def checked_prompt_lens(
    prompt_lens: int | Sequence[int] | None, sequences: Sequence[Sequence[int]]
) -> list[int]:
    """How many leading tokens of each sequence are not scored.

    :raises RequestError: another number of them, or one beyond its sequence.
    """
    if prompt_lens is None:
        prompt_lens = 0
    lens = [prompt_lens] * len(sequences) if isinstance(prompt_lens, int) else list(prompt_lens)
    if len(lens) != len(sequences):
        raise RequestError(
            f"{len(sequences)} sequences came with {len(lens)} prompt_lens; pass one for all, or "
            "one for each."
        )
    for index, (length, sequence) in enumerate(zip(lens, sequences, strict=True)):
        ok = isinstance(length, int) and not isinstance(length, bool)
        if not ok or not 0 <= length <= len(sequence):
            raise RequestError(
                f"prompt_lens[{index}] was {length!r}; wanted 0 to the sequence's {len(sequence)} "
                "tokens."
            )
    return lens
