"""The per-token dict of logprobs."""

from __future__ import annotations

from typing import Any

import pytest

from isobit.errors import EngineError
from isobit.sampling.logprobs import Logprob, token_logprobs
from isobit.sampling.rows import SampledRow


def test_the_sampled_token_comes_first_and_once(byte_tokenizer: Any) -> None:
    row = SampledRow(66, -1.5, 2, ((65, -0.5), (66, -1.5), (256, -2.0)))
    assert list(token_logprobs(row, byte_tokenizer).items()) == [
        (66, Logprob(-1.5, 2, "B")),
        (65, Logprob(-0.5, 1, "A")),
        (256, Logprob(-2.0, 3, "<eos>")),
    ]


def test_only_the_sampled_token_and_no_tokenizer() -> None:
    row = SampledRow(66, -1.5, 9, ())
    assert token_logprobs(row, None) == {66: Logprob(-1.5, 9, None)}


def test_a_row_that_asked_for_none_has_none() -> None:
    with pytest.raises(EngineError, match="asked for no logprobs"):
        token_logprobs(SampledRow(66, -1.5, None, ()), None)
