"""Workloads of random tokens: what is asked of an engine while it is measured."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from ..errors import ConfigError

if TYPE_CHECKING:
    from ..sampling.params import SamplingParams


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that all arrive at once, each of ``input_len`` random tokens.

    :raises ConfigError: a number below 1.
    """

    requests: int
    input_len: int
    output_len: int

    def __post_init__(self) -> None:
        if min(self.requests, self.input_len, self.output_len) < 1:
            raise ConfigError(
                f"a workload was {self}; wanted at least 1 request, 1 input token and 1 output "
                "token, as in 16:128:64."
            )

    def __str__(self) -> str:
        return f"{self.requests}:{self.input_len}:{self.output_len}"

    @property
    def length(self) -> int:
        """Prompt and output of a request together, in tokens."""
        return self.input_len + self.output_len

    @classmethod
    def parse(cls, text: str) -> Workload:
        """From ``requests:input:output``, such as ``16:128:64``.

        :raises ConfigError: it is not three whole numbers from 1 up.
        """
        parts = text.strip().split(":")
        if len(parts) != 3 or not all(part.isascii() and part.isdigit() for part in parts):
            raise ConfigError(
                f"a workload was {text!r}; wanted requests:input:output, such as 16:128:64, and a "
                "comma between several."
            )
        return cls(*map(int, parts))


def fixed_length(tokens: int, temperature: float = 0.0) -> SamplingParams:
    """Exactly ``tokens`` long, whatever is generated; greedy unless a temperature is given."""
    from ..sampling.params import SamplingParams

    return SamplingParams(temperature=temperature, max_tokens=tokens, ignore_eos=True)


def random_prompts(vocab_size: int, count: int, length: int, seed: int) -> list[list[int]]:
    """``count`` prompts of ``length`` token ids from a generator of their own.

    Their first tokens differ, as far as the vocabulary goes: no prompt shares a prefix.
    """
    random = Random(seed)
    firsts = random.sample(range(vocab_size), min(count, vocab_size))
    return [
        [firsts[index % vocab_size], *(random.randrange(vocab_size) for _ in range(length - 1))]
        for index in range(count)
    ]
