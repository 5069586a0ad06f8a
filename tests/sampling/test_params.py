"""SamplingParams: what is accepted, what is refused and how the message reads."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from isobit.errors import RequestError, UnknownParameterError
from isobit.sampling.params import SamplingParams

WRONG: list[tuple[str, Any]] = [
    ("n", 0),
    ("n", 1.0),
    ("n", True),
    ("n", 2**14 + 1),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("temperature", -0.1),
    ("temperature", 1e-9),
    ("temperature", 1e30),
    ("temperature", True),
    ("temperature", "1"),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_p", float("nan")),
    ("top_k", -2),
    ("top_k", 3.0),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("seed", 2**63),
    ("seed", -(2**63) - 1),
    ("seed", 1.5),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("min_tokens", -1),
    ("min_tokens", 17),
    ("stop", ""),
    ("stop", ["a", ""]),
    ("stop", [1]),
    ("stop", 5),
    ("stop", b"a"),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", ["1"]),
    ("stop_token_ids", 3),
    ("stop_token_ids", [True]),
    ("ignore_eos", 1),
    ("skip_special_tokens", None),
    ("include_stop_str_in_output", "no"),
    ("logprobs", -1),
    ("logprobs", True),
    ("prompt_logprobs", 1.5),
    ("presence_penalty", 2.5),
    ("frequency_penalty", -2.5),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", float("inf")),
    ("logit_bias", {"a": 1.0}),
    ("logit_bias", {1: 101.0}),
    ("logit_bias", {1: float("nan")}),
    ("logit_bias", {-1: 1.0}),
    ("logit_bias", [1, 2]),
    ("logit_bias", 4),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=lambda v: repr(v))
def test_wrong_values_are_refused(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"^{name}: wanted .+, given .+\. [A-Z]"):
        SamplingParams(**{name: value})


def test_right_values_are_accepted_and_normalised() -> None:
    p = SamplingParams(
        temperature=0,
        top_p=1,
        top_k=0,
        seed=np.int64(-(2**63)),
        max_tokens=None,
        stop="end",
        stop_token_ids=[3, 2],
        logprobs=0,
        logit_bias={7: -100, 2: 1},
    )
    assert p.greedy
    assert isinstance(p.temperature, float)
    assert type(p.seed) is int
    assert p.stop == p.stop_strings == ("end",)
    assert p.stop_token_ids == p.stop_ids == (3, 2)
    assert p.logit_bias == p.bias_pairs == ((2, 1.0), (7, -100.0))
    assert SamplingParams(stop=["b", "a", "b"]).stop == ("b", "a")
    assert SamplingParams(stop=None, stop_token_ids=None) == SamplingParams()


def test_minus_zero_temperature_is_greedy() -> None:
    assert SamplingParams(temperature=-0.0).greedy


def test_is_frozen_hashable_picklable_and_replaceable() -> None:
    p = SamplingParams(stop="x", logit_bias={3: 1.5}, stop_token_ids=[9], seed=4)
    assert hash(p) == hash(pickle.loads(pickle.dumps(p)))
    assert pickle.loads(pickle.dumps(p)) == p
    assert dataclasses.replace(p, n=2).logit_bias == p.logit_bias
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.n = 2  # type: ignore[misc]


def test_unknown_name_is_refused_with_the_closest_one() -> None:
    with pytest.raises(UnknownParameterError, match="did you mean 'temperature'") as e:
        SamplingParams(temprature=1.0)  # type: ignore[call-arg]
    assert isinstance(e.value, TypeError)
    assert isinstance(e.value, ValueError)
    with pytest.raises(UnknownParameterError, match="zzz"):
        SamplingParams.from_mapping({"zzz": 1})


def test_only_keywords() -> None:
    with pytest.raises(TypeError):
        SamplingParams(1)  # type: ignore[misc]


def test_signature_survives_the_decorator() -> None:
    assert "temperature" in inspect.signature(SamplingParams).parameters


def test_no_tokens_at_all_only_to_score_a_prompt() -> None:
    p = SamplingParams(max_tokens=0, prompt_logprobs=0)
    assert p.scores_only
    assert not SamplingParams(max_tokens=1, prompt_logprobs=0).scores_only
    assert SamplingParams.from_mapping({"max_tokens": 0, "prompt_logprobs": 2}).scores_only
    with pytest.raises(RequestError, match="0 only scores a prompt, with prompt_logprobs"):
        SamplingParams(max_tokens=0)
    with pytest.raises(RequestError, match=r"^n: wanted 1 with max_tokens=0"):
        SamplingParams(max_tokens=0, prompt_logprobs=0, n=2)
    with pytest.raises(RequestError, match="min_tokens"):
        SamplingParams(max_tokens=0, prompt_logprobs=0, min_tokens=1)


def test_from_mapping_reads_json() -> None:
    p = SamplingParams.from_mapping(
        {"temperature": None, "stop": None, "max_tokens": None, "logit_bias": {"12": 3}}
    )
    assert p == SamplingParams(max_tokens=None, logit_bias={12: 3.0})
    with pytest.raises(RequestError, match="logit_bias"):
        SamplingParams.from_mapping({"logit_bias": {"x": 3}})
    with pytest.raises(RequestError, match="temperature"):
        SamplingParams.from_mapping({"temperature": "hot"})


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(logprobs=11),
        SamplingParams(prompt_logprobs=11),
        SamplingParams(stop_token_ids=[10]),
        SamplingParams(logit_bias={10: 1.0}),
    ],
)
def test_vocabulary_is_checked_at_submission(params: SamplingParams) -> None:
    with pytest.raises(RequestError, match="vocabulary's 10"):
        params.check_vocabulary(10)
    params.check_vocabulary(11)


def test_importing_the_params_imports_no_torch() -> None:
    code = "import sys, isobit; isobit.SamplingParams(); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
