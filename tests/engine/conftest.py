from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import save_file

from isobit import LLM
from isobit.models.config import load_config
from isobit.models.weights import random_weights

SMALL_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "dtype": "float32",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 16_384,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""A model so small that what a test measures is the engine: a step takes a quarter millisecond."""


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the small model, its matrices so large that attention decides the tokens."""
    folder = tmp_path_factory.mktemp("small-qwen3")
    (folder / "config.json").write_text(json.dumps(SMALL_CONFIG))
    weights = random_weights(load_config(folder), 0)
    for matrix in weights.values():
        if matrix.dim() == 2:
            matrix.mul_(12)
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="session")
def tiny() -> Iterator[LLM]:
    """A small random Qwen3 in fp32: no tokenizer, so prompts are token ids."""
    with LLM("tiny-qwen3", load_format="random", max_model_len=512) as llm:
        yield llm


@pytest.fixture(scope="session")
def smollm2() -> Iterator[LLM]:
    """The real model, in fp32."""
    with LLM("smollm2", max_model_len=4096) as llm:
        yield llm
