"""Logits processors: what they see, what they may return, and that no neighbour sees them."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from isobit import LLM, SamplingParams, StreamChunk
from isobit.errors import LogitsProcessorError, RequestError
from isobit.verify.transcript import transcripts

PROMPTS = [[1, 2, 3], [9], list(range(40, 90))]


def only_even(token_ids: Sequence[int], logits: Tensor) -> Tensor:
    logits[1::2] = -torch.inf  # its own copy
    return logits


def params(*processors: Any, **changes: Any) -> SamplingParams:
    values = {"temperature": 1, "max_tokens": 8, "ignore_eos": True, "logprobs": 1} | changes
    return SamplingParams(logits_processors=processors, **values)


def test_it_steers_its_own_request_and_no_other(tiny: LLM) -> None:
    plain = tiny.generate(PROMPTS, params())
    (alone,) = tiny.generate(PROMPTS[:1], params(only_even))
    mixed = tiny.generate(PROMPTS, [params(only_even), params(), params()])
    assert [transcripts(o) for o in mixed[1:]] == [transcripts(o) for o in plain[1:]]
    assert transcripts(mixed[0]) == transcripts(alone) != transcripts(plain[0])
    assert all(token % 2 == 0 for token in alone.outputs[0].token_ids)
    assert any(token % 2 for token in plain[0].outputs[0].token_ids)


def test_it_sees_the_output_so_far_and_the_models_logits(tiny: LLM) -> None:
    seen: list[tuple[int, ...]] = []

    def force(token_ids: Sequence[int], logits: Tensor) -> Tensor:
        assert logits.dtype == torch.float32
        assert logits.shape == (tiny.engine.vocab_size,)
        seen.append(tuple(token_ids))
        forced = torch.full_like(logits, -torch.inf)
        forced[len(token_ids) + 5] = 0.0
        return forced

    (output,) = tiny.generate([[1, 2]], params(force, max_tokens=3))
    assert output.outputs[0].token_ids == (5, 6, 7)
    assert seen == [(), (5,), (5, 6)]
    # Reported logprobs stay the model's own.
    (scored,) = tiny.score([1, 2, 5, 6, 7], prompt_lens=2, top=1)
    assert scored.top_logprobs is not None
    assert scored.top_logprobs[2:] == output.outputs[0].logprobs


def test_they_run_in_order_before_the_bias(tiny: LLM) -> None:
    def keep(*ids: int) -> Any:
        def processor(token_ids: Sequence[int], logits: Tensor) -> Tensor:
            kept = torch.full_like(logits, -torch.inf)
            kept[list(ids)] = 0.0
            return kept

        return processor

    biased = params(keep(1, 2, 3), keep(2, 3), temperature=0, logit_bias={3: 1.0}, max_tokens=1)
    assert tiny.generate([[1]], biased)[0].outputs[0].token_ids == (3,)
    plain = params(keep(2, 3), keep(2, 3), temperature=0, max_tokens=1)
    assert tiny.generate([[1]], plain)[0].outputs[0].token_ids == (2,)


def late(bad: Any) -> Any:
    """Good for two tokens, then returns what ``bad`` makes."""

    def processor(token_ids: Sequence[int], logits: Tensor) -> Any:
        return logits if len(token_ids) < 2 else bad(logits)

    return processor


def run_into(llm: LLM, chunks: list[StreamChunk]) -> None:
    while llm.has_unfinished_requests():
        chunks += llm.step()


def explode(logits: Tensor) -> Tensor:
    raise KeyError("oops")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (lambda logits: logits * torch.nan, "returned nan"),
        (lambda logits: logits + torch.inf, "returned inf"),
        (lambda logits: torch.full_like(logits, -torch.inf), "no possible token"),
        (lambda logits: logits[:-1], r"returned torch.float32 \["),
        (lambda logits: logits.double(), "torch.float64"),
        (lambda logits: None, "returned NoneType"),
        (explode, "raised KeyError"),
    ],
)
def test_a_bad_one_ends_its_own_request_alone(tiny: LLM, bad: Any, message: str) -> None:
    (expected,) = tiny.generate([[1, 2, 3]], params())
    tiny.add_request([1, 2, 3], params(), request_id="good")
    tiny.add_request([7], params(late(bad)), request_id="bad")
    chunks: list[StreamChunk] = []
    with pytest.raises(LogitsProcessorError, match=message) as caught:
        run_into(tiny, chunks)
    assert caught.value.request_id == "bad"
    assert "late.<locals>.processor of request 'bad'" in str(caught.value)
    run_into(tiny, chunks)
    good = [chunk for chunk in chunks if chunk.request_id == "good"]
    assert good[-1].output is not None
    assert transcripts(good[-1].output) == transcripts(expected)
    assert sum(chunk.request_id == "bad" for chunk in chunks) == 2
    assert not tiny.engine.has_unfinished()
    tiny.engine.scheduler.check_integrity()


def test_the_error_reaches_its_own_call(tiny: LLM) -> None:
    (expected,) = tiny.generate([[1, 2, 3]], params())
    stream = tiny.stream([[1, 2, 3]], params())
    with pytest.raises(RequestError, match="returned nan"):
        tiny.generate([[7]], params(late(lambda logits: logits * torch.nan)))
    chunks = list(stream)
    assert chunks[-1].output is not None
    assert transcripts(chunks[-1].output) == transcripts(expected)


def test_params_with_processors_hash_by_identity() -> None:
    assert params(only_even) == params(only_even) != params()
    assert hash(params(only_even)) == hash(params(only_even))
    assert pickle.loads(pickle.dumps(params(only_even))) == params(only_even)
    assert params(lambda t, x: x) != params(lambda t, x: x)


@pytest.mark.parametrize("value", [only_even, [1], "x", {only_even}])
def test_wrong_processors(value: Any) -> None:
    with pytest.raises(RequestError, match=r"^logits_processors: wanted a list of functions"):
        SamplingParams(logits_processors=value)


def test_json_holds_no_functions() -> None:
    with pytest.raises(RequestError, match="JSON holds no functions"):
        SamplingParams.from_mapping({"logits_processors": ["f"]})
