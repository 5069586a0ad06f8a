"""From a stream of tokens to a stream of whole characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what an incomplete character decodes to
_CONTEXT_TOKENS = 6
_LONGEST_WINDOW = 24


class TokenDecoder:
    """Decodes a stream of tokens with a short window of earlier tokens before them.

    The window is there because a token's text may depend on its neighbours: bytes of one character,
    or a word's leading space. Its length is bounded, so the work is linear in the tokens.
    """

    def __init__(
        self, tokenizer: Any, context_token_ids: Sequence[int], *, skip_special_tokens: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._window = list(context_token_ids[-_CONTEXT_TOKENS:])
        self._text = self._decode(self._window)
        self._given = len(self._text)  # characters of the window's text that are given out
        self._fresh = 0  # where in the window the tokens after the last whole character begin
        self._open_prompt = self._text.endswith(_REPLACEMENT)

    def append(self, token_id: int) -> str:
        """Text that is now certain; empty while a character is incomplete."""
        self._window.append(token_id)
        before, self._text = self._text, self._decode(self._window)
        if self._open_prompt:
            # The prompt may end inside a character; if this token changes that end, it is ours.
            self._given = _shared_prefix(before, self._text)
        if not self._text.endswith(_REPLACEMENT):
            piece = self._text[self._given :]
            self._settle()
            return piece
        if len(self._window) <= _LONGEST_WINDOW:
            return ""
        return self._cut()

    def flush(self) -> str:
        """The rest, with what never became a character as U+FFFD; nothing may follow."""
        piece = self._text[self._given :]
        self._given = len(self._text)
        return piece

    def _settle(self) -> None:
        """Every character is whole: forget all tokens but the newest piece's, if they show."""
        self._open_prompt = False
        self._given = len(self._text)
        newest = self._window[self._fresh :]
        text = self._decode(newest)
        if text or len(self._window) > _LONGEST_WINDOW:
            self._window, self._text, self._given = newest, text, len(text)
        self._fresh = len(self._window)

    def _cut(self) -> str:
        """Bound a window in which every token ends inside a character.

        Only the last character can still change (UTF-8 is self-synchronising), so the others are
        given out and the window keeps enough tokens to complete that one.
        """
        self._open_prompt = False
        piece = self._text[self._given : -1]
        self._given = max(self._given, len(self._text) - 1)
        kept = self._window[-_CONTEXT_TOKENS:]
        text = self._decode(kept)
        if text.endswith(_REPLACEMENT):
            self._window, self._text, self._given, self._fresh = kept, text, len(text) - 1, 0
        return piece

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(
            token_ids,
            skip_special_tokens=self._skip_special_tokens,
            # The clean-up rewrites text that came before, so it cannot be streamed.
            clean_up_tokenization_spaces=False,
        )
        return text


def _shared_prefix(a: str, b: str) -> int:
    """How many characters ``a`` and ``b`` have in common from their start."""
    differ = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differ, min(len(a), len(b)))
