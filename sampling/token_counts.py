"""Which tokens one request holds, and how often its output holds each: what penalties look at."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from ..errors import EngineError
from .params import SamplingParams


def has_penalties(params: SamplingParams) -> bool:
    """Whether any penalty is on."""
    return (
        params.repetition_penalty != 1.0
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
    )


class TokenCounts:
    """The tokens that one choice's penalties concern, each once, and their counts in its output.

    Kept for as long as the choice lives: each token is counted once, however many steps there are,
    so tokens may be added to the output but never changed.

    ids:    int32 token ids, none twice
    counts: int32, how often the output holds each; 0 for one that only the prompt holds

    :param prompt_token_ids: the whole prompt, which only the repetition penalty looks at
    """

    def __init__(self, params: SamplingParams, prompt_token_ids: Sequence[int]) -> None:
        tokens = dict.fromkeys(prompt_token_ids if params.repetition_penalty != 1.0 else ())
        self.ids = array("i", tokens)
        self.counts = array("i", bytes(self.ids.itemsize * len(tokens)))
        self._places = {token_id: place for place, token_id in enumerate(tokens)}
        self._num_counted = 0

    def update(self, output_token_ids: Sequence[int]) -> None:
        """Count the tokens that were added to the output since the last call.

        :raises EngineError: the output is shorter than it was: it is another choice's.
        """
        if len(output_token_ids) < self._num_counted:
            raise EngineError(
                f"Token counts of an output of {self._num_counted} tokens: wanted the same output "
                f"or a longer one, given {len(output_token_ids)} tokens. Keep one TokenCounts for "
                "each choice."
            )
        for token_id in output_token_ids[self._num_counted :]:
            place = self._places.setdefault(token_id, len(self.ids))
            if place == len(self.ids):
                self.ids.append(token_id)
                self.counts.append(0)
            self.counts[place] += 1
        self._num_counted = len(output_token_ids)
