"""The text of one request's output, token by token, up to its stop string.

Two things hold text back: a character whose bytes are not all there yet, and an end of the text
that may still become a stop string. The pieces given out always add up to the final text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .params import SamplingParams
from .stop_strings import find_stop, held_back
from .token_decoder import TokenDecoder


class Detokenizer:
    """Decodes one request's output and watches for its stop strings.

    A stop string may span tokens. It counts if it ends in text that came when the output had at
    least ``min_tokens`` tokens. The text ends before it, or after it with
    ``include_stop_str_in_output``. Which one matches first: see ``stop_strings.find_stop``.

    :param tokenizer: any transformers tokenizer; with ``None`` all text is empty.
    :param prompt_token_ids: the first token's text may depend on the prompt's last ones.
    """

    def __init__(
        self, tokenizer: Any | None, params: SamplingParams, prompt_token_ids: Sequence[int]
    ) -> None:
        self._params = params
        self._stops = params.stop_strings
        self._num_tokens = 0
        self._pending = ""  # decoded, not given out; any stop string to come starts in here
        self._matched: str | None = None
        self._decoder: TokenDecoder | None = None
        if tokenizer is not None:
            self._decoder = TokenDecoder(
                tokenizer, prompt_token_ids, skip_special_tokens=params.skip_special_tokens
            )

    @property
    def matched_stop(self) -> str | None:
        """The stop string that was found; the request ends with it."""
        return self._matched

    def append(self, token_id: int, *, ends: bool = False) -> str:
        """Take an output token; the text that became safe to show.

        :param ends: this token ends the request by itself (``stopping.check_token``): its own text
            is left out unless ``include_stop_str_in_output``, and no stop string is looked for.
        """
        self._num_tokens += 1
        hidden = ends and not self._params.include_stop_str_in_output
        if self._decoder is None or hidden or self._matched is not None:
            return ""
        searched = len(self._pending)
        self._pending += self._decoder.append(token_id)
        if not ends and self._stops and self._num_tokens >= self._params.min_tokens:
            match = find_stop(self._pending, self._stops, end_after=searched)
            if match is not None:
                self._matched = match.stop
                include = self._params.include_stop_str_in_output
                return self._give(match.end if include else match.start)
        return self._give(len(self._pending) - held_back(self._pending, self._stops))

    def finish(self) -> str:
        """The text still held back, once no token follows. It is not searched for stop strings."""
        if self._decoder is None or self._matched is not None:
            return ""
        self._pending += self._decoder.flush()
        return self._give(len(self._pending))

    def _give(self, length: int) -> str:
        piece, self._pending = self._pending[:length], self._pending[length:]
        return piece
