"""When a request ends and what is said about it."""

from __future__ import annotations

import pytest

from isobit.sampling.params import SamplingParams
from isobit.sampling.stopping import (
    Finish,
    FinishReason,
    check_finish,
    check_token,
    ending_token_ids,
)

EOS = (2, 9)
LENGTH = Finish(FinishReason.LENGTH)


def finish(token_id: int, count: int, matched_stop: str | None = None, **params: object) -> object:
    return check_finish(
        token_id,
        SamplingParams(**params),  # type: ignore[arg-type]
        num_prompt_tokens=10,
        num_output_tokens=count,
        max_model_len=30,
        eos_token_ids=EOS,
        matched_stop=matched_stop,
    )


@pytest.mark.parametrize("eos", EOS)
def test_eos_stops_without_a_reason(eos: int) -> None:
    assert finish(eos, 3) == Finish(FinishReason.STOP, None)
    assert finish(eos, 3, ignore_eos=True) is None


def test_a_stop_token_is_its_own_reason() -> None:
    assert finish(5, 3, stop_token_ids=[5]) == Finish(FinishReason.STOP, 5)
    assert finish(2, 3, stop_token_ids=[2]) == Finish(FinishReason.STOP, None)
    assert finish(2, 3, stop_token_ids=[2], ignore_eos=True) == Finish(FinishReason.STOP, 2)


def test_a_stop_string_is_its_own_reason_and_wins_over_length() -> None:
    assert finish(5, 16, "END") == Finish(FinishReason.STOP, "END")
    assert finish(5, 16, "END", stop_token_ids=[5]) == Finish(FinishReason.STOP, 5)


def test_lengths() -> None:
    assert finish(5, 15) is None
    assert finish(5, 16) == LENGTH
    assert finish(5, 19, max_tokens=None) is None
    assert finish(5, 20, max_tokens=None) == LENGTH
    assert finish(2, 16) == Finish(FinishReason.STOP, None)


def test_min_tokens_come_before_eos_and_stop_tokens_but_never_beat_a_length() -> None:
    assert finish(2, 4, min_tokens=4) is None
    assert finish(2, 5, min_tokens=4) == Finish(FinishReason.STOP, None)
    assert finish(5, 4, min_tokens=4, stop_token_ids=[5]) is None
    assert finish(2, 20, min_tokens=25, max_tokens=30) == LENGTH
    assert check_token(2, SamplingParams(min_tokens=4), 4, EOS) is None


def test_what_the_sampler_masks_is_what_would_end() -> None:
    assert ending_token_ids(SamplingParams(stop_token_ids=[5]), EOS) == {2, 5, 9}
    assert ending_token_ids(SamplingParams(stop_token_ids=[5], ignore_eos=True), EOS) == {5}
