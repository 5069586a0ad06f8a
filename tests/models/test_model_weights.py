"""Random weights are reproducible and private; the digest sees every bit."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from isobit.models.config import ModelConfig
from isobit.models.registry import load_model_config
from isobit.models.shapes import SHAPES
from isobit.models.weights import expected_tensors, random_weights, weights_digest


@pytest.fixture(params=["tiny-qwen3", "tiny-llama"])
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return load_model_config(request.param, random=True)[1]


@pytest.mark.parametrize("shape", SHAPES)
def test_expected_tensors_are_those_of_transformers(shape: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[shape]))
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    config = load_model_config(shape, random=True)[1]
    if config.tie_word_embeddings:
        del theirs["lm_head.weight"]
    assert expected_tensors(config) == theirs


def test_random_weights_are_reproducible(config: ModelConfig) -> None:
    first, again, other = (random_weights(config, seed) for seed in (3, 3, 4))
    assert {name: tuple(tensor.shape) for name, tensor in first.items()} == expected_tensors(config)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    half = random_weights(config, 3, torch.bfloat16)
    assert all(torch.equal(first[name].bfloat16(), half[name]) for name in first)


def test_random_weights_have_the_stated_spread(config: ModelConfig) -> None:
    weights = random_weights(config, 0)
    matrix = weights["model.layers.1.mlp.up_proj.weight"]
    norms = torch.cat([w for w in weights.values() if w.dim() == 1])
    assert matrix.mean().abs() < 1e-3
    assert 0.0195 < matrix.std() < 0.0205
    assert 0.98 < norms.mean() < 1.02
    assert 0.04 < norms.std() < 0.06


def test_no_generator_of_the_user_is_touched(config: ModelConfig) -> None:
    def states() -> tuple[object, ...]:
        numpy_state = np.random.get_state()
        return (
            torch.get_rng_state().numpy().tobytes(),
            random.getstate(),
            str(numpy_state),
        )

    before = states()
    weights_digest(random_weights(config, 5))
    assert states() == before
    torch.rand(1)
    assert states() != before


def digest(**tensors: Tensor) -> str:
    return weights_digest(tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [7, 65_535, 65_537, 1_200_001])
def test_digest_sees_any_change(dtype: torch.dtype, size: int) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(dtype)
    original = digest(a=values)
    assert digest(a=values.clone()) == original
    for place in {0, 1, size // 3, size // 2, size - 2, size - 1}:
        changed = values.clone()
        bits = changed.view(torch.int16 if changed.itemsize == 2 else torch.int32)
        bits[place] ^= 1
        assert digest(a=changed) != original
        bits[place] ^= 1
        assert digest(a=changed) == original
    for first, second in ((0, 1), (0, size - 1), (size // 2, size // 2 + 2), (2, size - 2)):
        swapped = values.clone()
        swapped[[first, second]] = values[[second, first]]
        assert digest(a=swapped) != original


def test_digest_sees_the_sign_of_zero_names_shapes_and_dtypes() -> None:
    values = torch.zeros(4, 6)
    variants = [
        digest(a=values),
        digest(a=-values),
        digest(b=values),
        digest(a=values.view(6, 4)),
        digest(a=values.bfloat16()),
        digest(a=values.half()),
        digest(a=values, b=values),
        digest(a=torch.zeros(4, 7)),
    ]
    assert len(set(variants)) == len(variants)


def test_digest_is_free_of_layout_and_of_the_order_of_names() -> None:
    values = torch.randn(300, 500, generator=torch.Generator().manual_seed(1))
    assert digest(a=values, b=values[0]) == digest(b=values[0].clone(), a=values)
    assert digest(a=values.T) == digest(a=values.T.contiguous()) != digest(a=values.view(500, 300))
    several = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = digest(a=values)
    finally:
        torch.set_num_threads(several)
    assert alone == digest(a=values)
