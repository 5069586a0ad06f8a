"""The requests that the proofs run: mixed lengths, mixed sampling parameters, shared prefixes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from ..sampling.params import SamplingParams

_SENTENCES = (
    "The river bends twice before it reaches the old mill, and the miller knows both bends.",
    "A sum of many small numbers depends on the order in which they are added.",
    "She counted the lamps along the quay: one was out, and nobody had noticed for a week.",
    "In 1843 the first program was written for a machine that was never finished.",
    "Ask the same question tomorrow and the answer ought to be the same.",
    "The cook wrote the recipe in grams, the guests read it in cups, and the cake was a brick.",
    "Every evening the harbour master signs the book, whether a ship has come or not.",
    "If two clocks disagree, a sailor trusts neither; if three agree, he sets out.",
)

_EDGES = (15, 31, 63, 127, 255)
"""One less than a page of 16, 32, 64, 128 or 256 tokens."""

_QUICK_LENGTHS = (1, 16, 17, 700)
_FULL_LENGTHS = (1, 2, 16, 17, 64, 65, 200, 333, 512, 777, 1025, 1500, 2049, 4000)


@dataclass(frozen=True, slots=True)
class Case:
    """One request of a workload."""

    name: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams


def prompt_lengths(
    *, quick: bool, page_size: int, longest: int, reach: int | None = None
) -> list[int]:
    """Prompt lengths at tile and page edges, short and long, up to ``longest`` tokens.

    One lies just below a page's end, so that decoding completes the page. They are the same for
    pages of 16, 32, 64, 128 and 256 tokens, so that digests can be compared across page sizes.

    :param reach: the last length; beyond the usual ones by doubling the longest of them.
    """
    usual = _QUICK_LENGTHS if quick else _FULL_LENGTHS
    lengths = {*usual, *_EDGES, max(1, page_size - 1)}
    if reach is not None:
        length = usual[-1]
        while (length := 2 * length) < reach:
            lengths.add(length)
        lengths.add(reach)
        longest = min(longest, reach)
    return sorted(length for length in lengths if length <= longest)


def long_text(sentences: int) -> str:
    """Prose of numbered sentences, so that no two stretches of it are alike."""
    return " ".join(
        f"({index + 1}) {_SENTENCES[(index * 5 + index // 7) % len(_SENTENCES)]}"
        for index in range(sentences)
    )


def long_tokens(tokenizer: Any | None, vocab_size: int, length: int) -> list[int]:
    """``length`` token ids of prose, or seeded random ids where there is no tokenizer."""
    if tokenizer is None:
        random = Random(length)
        return [random.randrange(vocab_size) for _ in range(length)]
    sentences = max(4, length // 16)
    while True:
        tokens: list[int] = tokenizer.encode(long_text(sentences))
        if len(tokens) >= length:
            return tokens[:length]
        sentences *= 2


def make_cases(
    tokenizer: Any | None,
    vocab_size: int,
    lengths: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float,
    sampling_seed: int | None,
) -> list[Case]:
    """One case a length, each with other sampling parameters; neighbours share long prefixes.

    Even cases are greedy or at ``temperature`` with the user's seed; the others go through every
    filter and penalty with seeds of their own.
    """
    params = _mixed_params(max_new_tokens, temperature, sampling_seed)
    cases = []
    for index, length in enumerate(lengths):
        tokens = long_tokens(tokenizer, vocab_size, length + index % 3)
        prompt = tuple(tokens[index % 3 :])
        cases.append(Case(f"{length} tokens", prompt, params[index % len(params)]))
    return cases


def _mixed_params(
    max_new_tokens: int, temperature: float, seed: int | None
) -> tuple[SamplingParams, ...]:
    base = SamplingParams(
        temperature=temperature, seed=seed, max_tokens=max_new_tokens, ignore_eos=True, logprobs=2
    )
    return (
        base,
        replace(base, temperature=1.0, seed=7, top_k=20),
        replace(base, temperature=0.7, seed=8, top_p=0.9),
        replace(base, temperature=0.0, frequency_penalty=0.5, presence_penalty=0.3),
        replace(base, temperature=1.3, seed=None, min_p=0.02),
        replace(base, temperature=0.9, seed=9, repetition_penalty=1.2, top_k=50, top_p=0.95),
        replace(base, temperature=1.0, seed=-5, logit_bias={3: 4.0, 11: -100.0}),
    )
