"""Logits and greedy tokens against transformers, with the same weights, on a CPU and on a GPU.

The engine generates; transformers then computes the logits of every position of prompt and output
in one forward pass, in the engine's dtype and, from the same weights, in fp64.

In fp32, if each of transformers' argmaxes is the engine's token, its greedy output is too. The
engine's logits must lie within 1e-4 of the fp64 ones.

In bf16 the engine's logits may lie at most 1.25 times as far from fp64 as those of transformers in
bf16 in the root mean square, and 1.5 times at the farthest; and each token's fp64 logit must be the
highest but for twice the engine's distance there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from isobit import LLM, SamplingParams
from isobit.core.runner import RowOwners
from isobit.errors import ConfigError
from isobit.models.registry import load_model_config, load_tokenizer, resolve_model
from isobit.models.shapes import SHAPES
from isobit.models.weights import random_weights

LOGITS_TOLERANCE = 1e-4
NEAR_TIE = 1e-4
BF16_FACTORS = 1.25, 1.5

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


@dataclass
class Distance:
    """Of logits from others: the farthest, and the mean of the squares."""

    farthest: float = 0.0
    squares: float = 0.0
    count: int = 0

    def add(self, one: Tensor, other: Tensor) -> None:
        difference = (one.double() - other.double()).abs()
        self.farthest = max(self.farthest, float(difference.max()))
        self.squares += float(difference.square().sum())
        self.count += difference.numel()

    @property
    def rms(self) -> float:
        return math.sqrt(self.squares / self.count)

    def __str__(self) -> str:
        return f"{self.farthest:.2e} (rms {self.rms:.2e})"


@dataclass
class Compared:
    """One output: its tokens, and for each the logits of the engine, transformers and fp64."""

    token_ids: Tensor
    mine: Tensor
    theirs: Tensor
    exact: Tensor


def compared(
    llm: LLM, reference: torch.nn.Module, prompts: list[list[int]], tokens: int
) -> Iterator[Compared]:
    """Greedy outputs with everybody's logits; the reference is on the engine's device."""
    device = llm.engine.runner.device
    exact_reference = copy.deepcopy(reference).double()
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    unobserved = llm.generate(prompts, params, use_tqdm=False)  # on CUDA with graphs
    recorder = LogitsRecorder()
    llm.engine.runner.observer = recorder
    try:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    finally:
        llm.engine.runner.observer = None
    for output, same in zip(outputs, unobserved, strict=True):
        generated = output.outputs[0].token_ids
        assert len(generated) == tokens
        assert generated == same.outputs[0].token_ids
        first = len(output.prompt_token_ids) - 1
        whole = torch.tensor([[*output.prompt_token_ids, *generated]], device=device)
        rows = slice(first, first + tokens)
        with torch.inference_mode():
            yield Compared(
                torch.tensor(generated, device=device),
                torch.stack(
                    [recorder.rows[f"{output.request_id}#0", first + i] for i in range(tokens)]
                ),
                reference(whole).logits[0, rows],
                exact_reference(whole).logits[0, rows],
            )


def compare(
    llm: LLM,
    reference: torch.nn.Module,
    prompts: list[list[int]],
    tokens: int,
) -> None:
    """In fp32: every clear token the reference's, every row of logits within the bound."""
    ours, theirs, apart = Distance(), Distance(), Distance()
    for one in compared(llm, reference, prompts, tokens):
        ours.add(one.mine, one.exact)
        theirs.add(one.theirs, one.exact)
        apart.add(one.mine, one.theirs)
        best = one.theirs.topk(2)
        clear = best.values[:, 0] - best.values[:, 1] > NEAR_TIE
        assert torch.equal(one.token_ids[clear], best.indices[clear, 0])
    print(f"fp32: engine - fp64 {ours}, transformers - fp64 {theirs}, between them {apart}")
    assert ours.farthest <= LOGITS_TOLERANCE


def compare_bf16(
    llm: LLM, reference: torch.nn.Module, prompts: list[list[int]], tokens: int
) -> None:
    """In bf16: no farther from fp64 than transformers, but for the factor."""
    ours, theirs = Distance(), Distance()
    for one in compared(llm, reference, prompts, tokens):
        ours.add(one.mine, one.exact)
        theirs.add(one.theirs, one.exact)
        off = (one.mine - one.exact).abs().amax(1)
        chosen = one.exact.gather(1, one.token_ids[:, None])[:, 0]
        assert (one.exact.amax(1) - chosen <= 2 * off).all()
    print(f"bf16: engine - fp64 {ours}, transformers - fp64 {theirs}")
    rms, farthest = BF16_FACTORS
    assert ours.rms <= rms * theirs.rms
    assert ours.farthest <= farthest * theirs.farthest


def chat(tokenizer: Any, question: str) -> list[int]:
    ids: list[int] = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
    )
    return ids


@pytest.mark.usefixtures("exact_products")
def test_smollm2_greedy_and_logits(smollm2: LLM) -> None:
    device = smollm2.engine.runner.device.type
    reference = loaded(resolve_model("smollm2"), torch.float32, device)
    prompts = [chat(smollm2.tokenizer, question) for question in QUESTIONS]
    compare(smollm2, reference, prompts, tokens=200)


def checkpoint(shape: Mapping[str, Any], folder: Path) -> Path:
    """Random fp32 weights of a shape, as a folder that both sides load."""
    AutoConfig.for_model(**shape).save_pretrained(folder)
    weights = random_weights(load_model_config(folder, random=True)[1], 0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def random_prompts(vocab: int, lengths: Iterable[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(vocab, (length,), generator=generator).tolist() for length in lengths]


def loaded(folder: Path, dtype: torch.dtype, device: str) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    assert isinstance(model, torch.nn.Module)
    return model


@pytest.mark.parametrize("shape", ["tiny-qwen3", "tiny-llama"])
def test_random_models(shape: str, tmp_path: Path) -> None:
    """Qwen3 with QK-norm and Llama with scaled rope, prompts far beyond the scaling's corner."""
    folder = checkpoint(SHAPES[shape], tmp_path)
    with LLM(str(folder), device="cpu", dtype="float32", max_model_len=512) as llm:
        prompts = random_prompts(llm.engine.vocab_size, range(1, 300, 15))
        compare(llm, loaded(folder, torch.float32, "cpu"), prompts, tokens=200)


@pytest.mark.parametrize("shape", ["tiny-qwen3", "tiny-llama"])
def test_random_models_in_bf16(shape: str, tmp_path: Path) -> None:
    folder = checkpoint(SHAPES[shape], tmp_path)
    with LLM(str(folder), device="cpu", dtype="bfloat16", max_model_len=512) as llm:
        prompts = random_prompts(llm.engine.vocab_size, (1, 16, 90, 300))
        compare_bf16(llm, loaded(folder, torch.bfloat16, "cpu"), prompts, tokens=24)


def test_a_distance_can_be_too_large(tmp_path: Path) -> None:
    """The negative control: the last norm off by one part in 16, which moves every logit."""
    folder = checkpoint(SHAPES["tiny-llama"], tmp_path)
    for dtype, judge in ((torch.float32, compare), (torch.bfloat16, compare_bf16)):
        name = str(dtype).removeprefix("torch.")
        with LLM(str(folder), device="cpu", dtype=name, max_model_len=64) as llm:
            llm.engine.runner.decoder.norm.mul_(1 + 2**-4)
            with pytest.raises(AssertionError):
                judge(llm, loaded(folder, dtype, "cpu"), [[5, 6, 7], [8] * 20], tokens=4)


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


MEDIUM: dict[str, dict[str, Any]] = {
    name: {
        **SHAPES[shape],
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 8,
        "num_attention_heads": heads,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "num_key_value_heads": 4,
        "vocab_size": vocab,
    }
    for name, shape, heads, vocab in (
        ("medium-qwen3", "qwen3-8b", 12, 20_000),
        ("medium-llama", "llama-3.2-1b", 16, 20_008),
    )
}

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def exact_products() -> Iterator[None]:
    """fp32 products of the reference in fp32, not TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def compare_on_gpu(folder: Path, dtype: str, prompts: list[list[int]], tokens: int) -> None:
    """Steps and graphs are kept small: for each larger one kernels would be chosen first."""
    judge = {"float32": compare, "bfloat16": compare_bf16}[dtype]
    options: dict[str, Any] = {"max_model_len": 2304, "kv_cache_memory": "1GiB"}
    options |= {"max_num_batched_tokens": 512, "max_num_seqs": 16}
    with LLM(str(folder), device="cuda", dtype=dtype, **options) as llm:
        judge(llm, loaded(folder, getattr(torch, dtype), "cuda"), prompts, tokens)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", ["tiny-qwen3", "tiny-llama", *MEDIUM])
def test_random_models_on_a_gpu(shape: str, dtype: str, tmp_path: Path) -> None:
    config = MEDIUM.get(shape) or SHAPES[shape] | {"max_position_embeddings": 4096}
    folder = checkpoint(config, tmp_path)
    prompts = random_prompts(config["vocab_size"], (1, 2, 17, 64, 130, 333, 700, 1025, 2049))
    compare_on_gpu(folder, dtype, prompts, tokens=64)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_smollm2_on_a_gpu(dtype: str) -> None:
    try:
        folder = resolve_model("smollm2")
    except ConfigError as error:
        pytest.skip(f"SmolLM2 is not here: {error}")
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    prompts = [chat(tokenizer, question) for question in QUESTIONS]
    compare_on_gpu(folder, dtype, prompts, tokens=100)
