"""What is compared: token ids and logprobs, as bits."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from ..core.outputs import CompletionOutput, RequestOutput, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Transcript:
    """One output as bits: per token its id, its logprob and the other logprobs asked for."""

    tokens: tuple[tuple[int, bytes], ...]

    @property
    def digest(self) -> str:
        return digest([self])

    def first_difference(self, other: Transcript) -> int | None:
        """Index of the first token at which two transcripts part; None when they are equal."""
        for index, (mine, theirs) in enumerate(zip(self.tokens, other.tokens, strict=False)):
            if mine != theirs:
                return index
        if len(self.tokens) != len(other.tokens):
            return min(len(self.tokens), len(other.tokens))
        return None


def transcripts(output: RequestOutput) -> list[Transcript]:
    """One transcript per choice; the prompt's logprobs, where asked for, lead the first."""
    result = [_of_choice(choice) for choice in output.outputs]
    if output.prompt_logprobs is not None:
        prompt = tuple(
            (token, _bits(logprobs))
            for token, logprobs in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
        )
        result[0] = Transcript(prompt + result[0].tokens)
    return result


def logprob_bits(value: float) -> bytes:
    """The eight bytes of a float, so that even the sign of a zero counts."""
    return struct.pack("<d", value)


def digest(items: Iterable[Transcript]) -> str:
    """Twelve hex digits over the bits of all transcripts, in order."""
    state = hashlib.sha256()
    for item in items:
        state.update(struct.pack("<q", len(item.tokens)))
        for token, bits in item.tokens:
            state.update(struct.pack("<qq", token, len(bits)) + bits)
    return state.hexdigest()[:12]


def _of_choice(choice: CompletionOutput) -> Transcript:
    if choice.logprobs is None:
        total = logprob_bits(choice.cumulative_logprob)
        return Transcript(tuple((token, total) for token in choice.token_ids))
    return Transcript(
        tuple(
            (token, _bits(logprobs))
            for token, logprobs in zip(choice.token_ids, choice.logprobs, strict=True)
        )
    )


def _bits(logprobs: TokenLogprobs | None) -> bytes:
    if logprobs is None:
        return b""
    return b"".join(
        struct.pack("<qq", token, entry.rank) + logprob_bits(entry.logprob)
        for token, entry in sorted(logprobs.items())
    )
