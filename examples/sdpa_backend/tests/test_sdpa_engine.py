"""The engine with this backend: served, proved, and refused where it should be."""

from __future__ import annotations

import pytest

from isobit import LLM, SamplingParams
from isobit.errors import ConfigError
from isobit.verify.judge import INVARIANCES, judge_all
from isobit.verify.restart import RestartSpec
from isobit.verify.workload import make_cases

PROMPTS = [[1, 2, 3], [7] * 40, list(range(5, 135))]


def tokens(backend: str) -> list[list[int]]:
    options = {"load_format": "random", "dtype": "float32", "attention_backend": backend}
    params = SamplingParams(temperature=0.0, max_tokens=12)
    with LLM("tiny-llama", **options) as llm:
        return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, params)]


def test_the_tokens_are_those_of_the_torch_backend() -> None:
    assert tokens("sdpa") == tokens("torch")


@pytest.mark.parametrize(
    ("shape", "dtype"), [("tiny-llama", "float32"), ("tiny-qwen3", "bfloat16")]
)
def test_the_proofs_hold(shape: str, dtype: str) -> None:
    options = {
        "model": shape,
        "load_format": "random",
        "dtype": dtype,
        "attention_backend": "sdpa",
        "kv_cache_memory": "64MiB",  # the restarted engine shares the device
    }
    with LLM(**options) as llm:
        vocab = llm.engine.vocab_size
        cases = make_cases(
            None, vocab, (1, 15, 63, 130), max_new_tokens=6, temperature=0.0, sampling_seed=None
        )
        verdicts = list(judge_all(llm.engine, cases, RestartSpec(options, 1)))
    assert [v.invariance for v in verdicts] == list(INVARIANCES)
    assert [v.failure for v in verdicts if not v.holds] == []
    assert all(v.runs > 0 and v.distinct == 1 for v in verdicts)


def test_a_graph_is_refused() -> None:
    with pytest.raises(ConfigError, match="cuda_graph"):
        LLM("tiny-llama", load_format="random", attention_backend="sdpa", cuda_graph=True)
