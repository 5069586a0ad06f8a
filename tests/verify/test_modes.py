from __future__ import annotations

import pytest

from isobit import LLM, SamplingParams
from isobit.errors import ConfigError, RequestError
from isobit.verify.modes import PREFIX_LENGTHS, run_mode
from isobit.verify.transcript import Transcript

PARAMS = SamplingParams(temperature=0.8, max_tokens=4, ignore_eos=True, logprobs=2)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("tiny-llama", load_format="random", max_num_batched_tokens=512)


def test_single(llm: LLM) -> None:
    (result,) = run_mode(llm.engine, "single", 4, 2, PARAMS)
    assert str(result) == "Total samples: 14, Unique samples: 1"  # batches of 2, 3, 4 and 5


def test_prefix() -> None:
    with (
        LLM("tiny-llama", load_format="random", max_model_len=2048) as llm,
        pytest.raises(RequestError, match="max_model_len"),
    ):
        list(run_mode(llm.engine, "prefix", 2, 1, PARAMS))
    assert PREFIX_LENGTHS == (1, 511, 2048, 4097)


def test_radix_cache(llm: LLM) -> None:
    results = list(run_mode(llm.engine, "radix_cache", 3, 1, PARAMS))
    assert len(results) == 6
    assert all(result.samples == 2 and result.unique == 1 for result in results)


def test_radix_cache_needs_one() -> None:
    with (
        LLM("tiny-llama", load_format="random", radix_cache=False) as llm,
        pytest.raises(ConfigError, match="it is off"),
    ):
        list(run_mode(llm.engine, "radix_cache", 1, 1, PARAMS))


def test_unknown_mode(llm: LLM) -> None:
    with pytest.raises(ConfigError, match="single, prefix, radix_cache"):
        list(run_mode(llm.engine, "mixed", 1, 1, PARAMS))
    with pytest.raises(ConfigError, match="at least 1"):
        list(run_mode(llm.engine, "single", 0, 1, PARAMS))


def test_transcripts_compare_every_bit() -> None:
    one = Transcript(((5, b"ab"), (6, b"cd")))
    assert one.first_difference(one) is None
    assert one.first_difference(Transcript(((5, b"ab"), (6, b"ce")))) == 1
    assert one.first_difference(Transcript(((5, b"ab"),))) == 1
    assert one.digest != Transcript(((5, b"ab"), (6, b"ce"))).digest
