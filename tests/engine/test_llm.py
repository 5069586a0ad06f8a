from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from isobit import LLM, SamplingParams
from isobit.errors import ConfigError, RequestError, UnknownParameterError
from isobit.verify.judge import rng_states
from isobit.verify.transcript import transcripts

GREEDY = SamplingParams(temperature=0, max_tokens=6, logprobs=2)
PROMPTS = [[1, 2, 3], [9], list(range(40, 90)), [7, 7, 7, 7]]


def test_outputs_come_in_the_order_of_the_prompts(tiny: LLM) -> None:
    outputs = tiny.generate(PROMPTS, GREEDY)
    assert [list(output.prompt_token_ids) for output in outputs] == PROMPTS
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        (alone,) = tiny.generate(prompt, GREEDY)
        assert transcripts(alone) == transcripts(output)


def test_each_prompt_may_have_its_own_parameters(tiny: LLM) -> None:
    lengths = [1, 4, 2, 3]
    params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in lengths]
    outputs = tiny.generate(PROMPTS, params)
    assert [len(output.outputs[0].token_ids) for output in outputs] == lengths
    with pytest.raises(RequestError, match="4 prompts came with 2"):
        tiny.generate(PROMPTS, params[:2])


def test_choices_differ_and_repeat(tiny: LLM) -> None:
    params = SamplingParams(n=4, max_tokens=12, temperature=1.0, ignore_eos=True, logprobs=0)
    (first,) = tiny.generate([[1, 2, 3]], params)
    (second,) = tiny.generate([[1, 2, 3]], params)
    assert len({choice.token_ids for choice in first.outputs}) == 4
    assert [choice.index for choice in first.outputs] == [0, 1, 2, 3]
    assert transcripts(first) == transcripts(second)


def test_the_engines_seed_serves_requests_without_one(tiny: LLM) -> None:
    free = SamplingParams(max_tokens=8, ignore_eos=True)
    seeded = SamplingParams(max_tokens=8, ignore_eos=True, seed=42)
    other = SamplingParams(max_tokens=8, ignore_eos=True, seed=43)
    ids = [tiny.generate([[5, 6]], p)[0].outputs[0].token_ids for p in (free, seeded, other)]
    assert ids[0] == ids[1] != ids[2]


def test_stream_pieces_make_up_the_output(smollm2: LLM) -> None:
    params = [
        SamplingParams(temperature=0, max_tokens=20, logprobs=1),
        SamplingParams(temperature=1, max_tokens=15, n=2, logprobs=1),
    ]
    prompts = ["The sea is", "Crème brûlée 🍮 is"]
    texts: dict[tuple[str, int], str] = {}
    finals = {}
    for chunk in smollm2.stream(prompts, params):
        key = (chunk.request_id, chunk.index)
        texts[key] = texts.get(key, "") + chunk.text
        if chunk.output is not None:
            finals[chunk.request_id] = chunk.output
    for place, output in enumerate(smollm2.generate(prompts, params, use_tqdm=False)):
        assert transcripts(finals[str(place)]) == transcripts(output)
        for choice in output.outputs:
            assert texts[str(place), choice.index] == choice.text


def test_two_streams_read_in_turns(tiny: LLM) -> None:
    expected = [output.outputs[0].token_ids for output in tiny.generate(PROMPTS[:2], GREEDY)]
    streams = [tiny.stream([prompt], GREEDY) for prompt in PROMPTS[:2]]
    got: list[list[int]] = [[], []]
    for pair in zip(*streams, strict=True):
        for tokens, chunk in zip(got, pair, strict=True):
            tokens += chunk.token_ids
    assert [tuple(tokens) for tokens in got] == expected


def test_leaving_a_stream_early_frees_everything(tiny: LLM) -> None:
    stream = tiny.stream(PROMPTS, SamplingParams(max_tokens=100, ignore_eos=True))
    next(stream)
    stream.close()
    assert not tiny.engine.has_unfinished()
    tiny.engine.flush_cache()
    pool = tiny.engine.scheduler.pool
    assert pool.num_free == pool.num_pages


def test_stop_string_across_tokens(smollm2: LLM) -> None:
    prompt = "One, two, three,"
    whole = smollm2.generate(prompt, SamplingParams(temperature=0, max_tokens=24))[0].outputs[0]
    stop = whole.text[6:9]
    cut = SamplingParams(temperature=0, max_tokens=24, stop=[stop])
    choice = smollm2.generate(prompt, cut)[0].outputs[0]
    assert choice.text == whole.text[: whole.text.index(stop)]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)


def test_prompt_logprobs_are_those_of_decoding(tiny: LLM) -> None:
    (output,) = tiny.generate([[3, 1, 4]], GREEDY)
    choice = output.outputs[0]
    score = SamplingParams(max_tokens=1, prompt_logprobs=2, temperature=0)
    (scored,) = tiny.generate([[3, 1, 4, *choice.token_ids]], score)
    assert scored.prompt_logprobs is not None
    assert scored.prompt_logprobs[0] is None
    assert scored.prompt_logprobs[3:] == choice.logprobs


def test_a_process_keeps_its_generators_from_import_to_generation() -> None:
    program = """
import random, numpy, torch
random.seed(1); numpy.random.seed(2); torch.manual_seed(3)
def states():
    name, keys, *rest = numpy.random.get_state()
    return random.getstate(), keys.tolist(), rest, torch.get_rng_state().tolist()
before = states()
from isobit import LLM, SamplingParams
assert states() == before, "import"
llm = LLM("tiny-qwen3", load_format="random", sampling_seed=9)
assert states() == before, "construction"
llm.generate([[1, 2]], SamplingParams(seed=4, max_tokens=4))
assert states() == before, "generation"
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_global_generators_are_left_alone() -> None:
    random.seed(11)
    np.random.seed(12)
    torch.manual_seed(13)
    before = rng_states()
    for seed in (0, 42, None):
        with LLM("tiny-llama", load_format="random", sampling_seed=seed or 1) as llm:
            llm.generate([[1, 2]], SamplingParams(seed=seed, max_tokens=4))
    assert rng_states() == before
    torch.rand(1)
    assert rng_states() != before  # the comparison can fail


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], GREEDY, "prompt has no tokens"),
        ([1, 99999], GREEDY, "prompt token 1 was 99999"),
        ([1, -1], GREEDY, "prompt token 1 was -1"),
        ([1] * 600, GREEDY, "max_model_len"),
        ([1] * 500, SamplingParams(max_tokens=100), "Lower max_tokens"),
        ("text", GREEDY, "needs a tokenizer"),
        ([1], SamplingParams(stop=["x"]), "stop strings need a tokenizer"),
        ([1], SamplingParams(stop_token_ids=[5000]), "vocabulary"),
        ([1], SamplingParams(logprobs=5000), "vocabulary"),
    ],
)
def test_requests_that_can_never_be_served(
    tiny: LLM, prompt: list[int] | str, params: SamplingParams, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        tiny.generate([prompt], params)
    assert not tiny.engine.has_unfinished()


def test_one_bad_prompt_queues_none(tiny: LLM) -> None:
    with pytest.raises(RequestError):
        tiny.generate([[1, 2], [99999]], GREEDY)
    assert not tiny.engine.has_unfinished()


def test_options_are_checked() -> None:
    with pytest.raises(UnknownParameterError, match="page_size"):
        LLM("tiny-qwen3", load_format="random", pagesize=16)
    for options, message in (
        ({"page_size": 0}, "page_size was 0"),
        ({"dtype": "int8"}, "dtype was 'int8'"),
        ({"kv_cache_memory": "lots"}, "kv_cache_memory was 'lots'"),
        ({"kv_cache_memory": 5}, "holds 0 pages"),
        ({"max_model_len": 10**6}, "positions end at"),
        ({"kernels": "library"}, "deterministic=False"),
        ({"sampling_seed": 2**63}, "sampling_seed"),
        ({"radix_cache": "yes"}, "radix_cache was 'yes'"),
    ):
        with pytest.raises(ConfigError, match=message):
            LLM("tiny-qwen3", load_format="random", **options)
    with pytest.raises(ConfigError, match="load_format='random'"):
        LLM("tiny-qwen3")
    with pytest.raises(ConfigError, match="tiny-qwen3x"):
        LLM("tiny-qwen3x", load_format="random")


def test_an_explicit_request_is_refused_with_every_reason() -> None:
    with pytest.raises(ConfigError) as caught:
        LLM(
            "tiny-qwen3",
            load_format="random",
            attention_backend="torch",
            cuda_graph=True,
            dtype="float16",
        )
    message = str(caught.value)
    assert "cuda_graph" in message
    assert "float16" in message
    assert "Backends that could" in message


def test_a_closed_llm_says_so() -> None:
    llm = LLM("tiny-qwen3", load_format="random")
    llm.close()
    with pytest.raises(RequestError, match="closed"):
        llm.generate([[1]])


def test_features_can_be_switched_off() -> None:
    options = {"radix_cache": False, "chunked_prefill": False, "max_num_batched_tokens": 1000}
    with LLM("tiny-qwen3", load_format="random", **options) as llm:
        assert llm.engine.scheduler.cache is None
        (first,) = llm.generate([list(range(100))], GREEDY)
        (second,) = llm.generate([list(range(100))], GREEDY)
        assert first.num_cached_tokens == second.num_cached_tokens == 0
        with pytest.raises(RequestError, match="without chunked prefill"):
            llm.generate([[1] * 1500], GREEDY)
