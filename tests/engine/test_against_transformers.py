"""Logits and greedy tokens against transformers, with the same weights.

The engine generates in fp32; transformers then computes the logits of every position of prompt and
output in one forward pass, in fp32 and in fp64. If each of its fp32 argmaxes is the engine's token,
its greedy output is too. The engine's logits must lie within 1e-4 of the fp64 ones; from the fp32
ones they may differ by transformers' own distance from fp64 besides (on SmolLM2 up to 1.1e-4).
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from isobit import LLM, SamplingParams
from isobit.core.runner import RowOwners
from isobit.models.registry import resolve_model
from isobit.models.shapes import SHAPES
from isobit.models.weights import random_weights

LOGITS_TOLERANCE = 1e-4
NEAR_TIE = 1e-4

QUESTIONS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "Explain in two sentences why the sky is blue.",
    "List five animals that can fly.",
    "Translate 'good morning' into German.",
    "What is 17 times 23? Show your steps.",
    "Who wrote the play Hamlet?",
    "Give me a recipe for pancakes.",
    "What does a compiler do?",
    "Tell me a short story about a lighthouse keeper.",
    "How do plants make sugar?",
    "Name the planets of the solar system.",
    "def fibonacci(n):",
    "Why do cats purr?",
    "Describe the colour red to somebody who cannot see.",
    "What happened in 1969?",
    "Compare tea and coffee.",
    "Give three tips for sleeping better.",
    "What is the difference between a list and a tuple in Python?",
    "Once upon a time",
)


class LogitsRecorder:
    """Keeps every row of logits that the engine sampled from, by request and position."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, int], Tensor] = {}

    def __call__(self, op: str, rows: Tensor, owners: RowOwners) -> None:
        if op == "lm_head":
            for row, (request, position) in zip(rows, owners, strict=True):
                self.rows[request.request_id, position] = row.clone()


def compare(llm: LLM, reference: torch.nn.Module, prompts: list[list[int]], tokens: int) -> None:
    exact_reference = copy.deepcopy(reference).double()
    recorder = LogitsRecorder()
    llm.engine.runner.observer = recorder
    try:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        outputs = llm.generate(prompts, params, use_tqdm=False)
    finally:
        llm.engine.runner.observer = None
    largest = {"engine - fp64": 0.0, "transformers - fp64": 0.0, "engine - transformers": 0.0}
    for output in outputs:
        generated = output.outputs[0].token_ids
        assert len(generated) == tokens
        whole = torch.tensor([[*output.prompt_token_ids, *generated]])
        with torch.inference_mode():
            fp32 = reference(whole).logits[0]
            fp64 = exact_reference(whole).logits[0]
        for index, token in enumerate(generated):
            position = len(output.prompt_token_ids) + index - 1
            mine = recorder.rows[f"{output.request_id}#0", position]
            exact = fp64[position]
            assert (mine - exact).abs().max() <= LOGITS_TOLERANCE
            theirs = fp32[position]
            rounding = (theirs - exact).abs().max()
            assert (mine - theirs).abs().max() <= LOGITS_TOLERANCE + rounding
            for pair, (one, other) in zip(
                largest, ((mine, exact), (theirs, exact), (mine, theirs)), strict=True
            ):
                largest[pair] = max(largest[pair], float((one - other).abs().max()))
            best = theirs.topk(2)
            if best.values[0] - best.values[1] > NEAR_TIE:
                assert token == best.indices[0], f"token {index} of {output.request_id}"
    print("largest distance of fp32 logits:", {k: f"{v:.2e}" for k, v in largest.items()})


def chat(llm: LLM, question: str) -> list[int]:
    assert llm.tokenizer is not None
    ids: list[int] = llm.tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )
    return ids


def test_smollm2_greedy_and_logits(smollm2: LLM) -> None:
    reference = AutoModelForCausalLM.from_pretrained(resolve_model("smollm2"), dtype=torch.float32)
    prompts = [chat(smollm2, question) for question in QUESTIONS]
    compare(smollm2, reference, prompts, tokens=200)


@pytest.mark.parametrize("shape", ["tiny-qwen3", "tiny-llama"])
def test_random_models(shape: str, tmp_path: Path) -> None:
    """Qwen3 with QK-norm and Llama with scaled rope, prompts far beyond the scaling's corner."""
    config = AutoConfig.for_model(**SHAPES[shape])
    config.save_pretrained(tmp_path)
    reference = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with LLM(str(tmp_path), load_format="random", dtype="float32", max_model_len=512) as llm:
        weights = random_weights(llm.engine.runner.decoder.config, llm.config.load_seed)
        missing, unexpected = reference.load_state_dict(weights, strict=False)
        assert not unexpected
        assert set(missing) <= {"lm_head.weight"}
        reference.tie_weights()
        vocab = llm.engine.vocab_size
        generator = torch.Generator().manual_seed(5)
        prompts = [
            torch.randint(vocab, (1 + 15 * index,), generator=generator).tolist()
            for index in range(20)
        ]
        compare(llm, reference, prompts, tokens=200)


def test_a_saved_folder_gives_what_random_weights_give(tmp_path: Path) -> None:
    """The safetensors loader and the random loader meet in one engine."""
    AutoConfig.for_model(**SHAPES["tiny-qwen3"]).save_pretrained(tmp_path)
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=3)
    with LLM("tiny-qwen3", load_format="random", dtype="float32") as llm:
        save_file(
            random_weights(llm.engine.runner.decoder.config, 0), tmp_path / "model.safetensors"
        )
        expected = llm.generate([5, 6, 7], params)[0].outputs
    with LLM(str(tmp_path), dtype="float32") as llm:
        assert llm.generate([5, 6, 7], params)[0].outputs == expected
