"""LLM.score: the logprobs that decoding gave, for the rows asked for and no others."""

from __future__ import annotations

from typing import Any

import pytest

from isobit import LLM, SamplingParams
from isobit.errors import RequestError

PROMPTS = [[3, 1, 4], [9], list(range(40, 110))]
PARAMS = SamplingParams(temperature=1, seed=5, max_tokens=40, ignore_eos=True, logprobs=3)


def test_scores_are_those_of_decoding(tiny: LLM) -> None:
    outputs = tiny.generate(PROMPTS, PARAMS)
    choices = [output.outputs[0] for output in outputs]
    sequences = [[*p, *choice.token_ids] for p, choice in zip(PROMPTS, choices, strict=True)]
    scores = tiny.score(sequences, prompt_lens=[len(p) for p in PROMPTS], top=3)
    for prompt, sequence, choice, score in zip(PROMPTS, sequences, choices, scores, strict=True):
        n = len(prompt)
        assert score.token_ids == tuple(sequence)
        assert score.top_logprobs is not None
        assert score.top_logprobs[n:] == choice.logprobs
        assert score.top_logprobs[:n] == score.logprobs[:n] == score.ranks[:n] == (None,) * n
        assert score.cumulative_logprob == choice.cumulative_logprob
        assert score.fingerprint == tiny.fingerprint
    # The comparison can fail: another token after the first prompt has other bits.
    other = tiny.score([*PROMPTS[0], 7, *choices[0].token_ids[1:]], prompt_lens=3, top=3)[0]
    assert other.top_logprobs is not None
    assert other.top_logprobs[4:] != choices[0].logprobs[1:]


def test_a_whole_sequence_equals_its_parts_and_samples_nothing(tiny: LLM) -> None:
    sequence = list(range(10, 110))
    tiny.flush_cache()
    (whole,) = tiny.score(sequence)
    assert whole.logprobs[0] is None
    assert None not in whole.logprobs[1:]
    assert None not in whole.ranks[1:]
    assert whole.top_logprobs is None
    for length in (1, 2, 50, 99, 100):
        (part,) = tiny.score(sequence, prompt_lens=length)
        assert part.logprobs == (None,) * length + whole.logprobs[length:]
        assert part.num_cached_tokens == (length - 1) // 16 * 16


def test_only_the_rows_asked_for_get_logits(tiny: LLM) -> None:
    rows = 0

    def count(op: str, tensor: Any, owners: Any) -> None:
        nonlocal rows
        rows += len(owners) if op == "lm_head" else 0

    tiny.engine.runner.observer = count
    try:
        for length, expected in ((0, 99), (90, 10), (100, 0)):
            rows = 0
            tiny.score([list(range(100))], prompt_lens=length)
            assert rows == expected
    finally:
        tiny.engine.runner.observer = None


def test_chunks_and_neighbours_change_no_score() -> None:
    sequence = list(range(5, 205))
    with LLM("tiny-qwen3", load_format="random", max_model_len=512) as llm:
        (expected,) = llm.score(sequence, prompt_lens=60, top=2)
    options: dict[str, Any] = {"max_num_batched_tokens": 37, "max_model_len": 512}
    with LLM("tiny-qwen3", load_format="random", **options) as llm:
        stream = llm.stream([[1, 2, 3]], PARAMS)
        next(stream)
        assert llm.score(sequence, prompt_lens=60, top=2) == [expected]
        assert (
            llm.score([sequence, sequence], prompt_lens=[60, 0], top=2)[0].ranks[60:]
            == (expected.ranks[60:])
        )


def test_a_sequence_may_fill_the_context(tiny: LLM) -> None:
    assert len(tiny.score([1] * 512)[0].logprobs) == 512
    with pytest.raises(RequestError, match="at most 512 and 0 output"):
        tiny.score([1] * 513)


def test_texts(smollm2: LLM) -> None:
    assert smollm2.tokenizer is not None
    text = "The capital of France is Paris."
    assert smollm2.score(text) == smollm2.score([smollm2.tokenizer.encode(text)])


def test_max_tokens_0_ends_with_the_prompt(tiny: LLM) -> None:
    (chunk,) = tiny.stream([[1, 2, 3]], SamplingParams(max_tokens=0, prompt_logprobs=1))
    assert chunk.token_ids == ()
    assert chunk.finish_reason == "length"
    assert chunk.output is not None
    assert chunk.output.outputs[0].token_ids == ()
    assert len(chunk.output.prompt_logprobs or ()) == 3
    assert not tiny.engine.has_unfinished()


@pytest.mark.parametrize("lens", [4, -1, True, [1, 2], [1.5]])
def test_wrong_prompt_lens(tiny: LLM, lens: Any) -> None:
    with pytest.raises(RequestError, match="prompt_lens"):
        tiny.score([[1, 2, 3]], prompt_lens=lens)
