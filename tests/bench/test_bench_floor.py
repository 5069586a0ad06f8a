"""The least a step must move and multiply, against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch

from isobit.bench.floor import Floor, StepShape, op_costs, step_cost
from isobit.bench.limits import Limits, measure_limits
from isobit.models.config import ModelConfig
from isobit.models.registry import load_model_config
from isobit.models.weights import EMBEDDING, LM_HEAD, expected_tensors

STEP = StepShape(((10, 1), (0, 3)), logit_rows=2)  # a decode and a short prefill


@pytest.fixture
def model() -> ModelConfig:
    """q is 8 wide, k and v 4 each; two layers."""
    return replace(
        load_model_config("tiny-llama", random=True)[1],
        vocab_size=32,
        hidden_size=8,
        intermediate_size=16,
        num_layers=2,
        num_q_heads=2,
        num_kv_heads=1,
        head_dim=4,
    )


def test_a_step_by_hand(model: ModelConfig) -> None:
    matrices = 2 * (16 * 8 + 8 * 8 + 32 * 8 + 8 * 16)
    assert matrices == 1152
    cost = step_cost(model, 2, STEP)
    assert cost.weights == 2 * (1152 + 5 * 8 + 32 * 8)
    assert cost.kv == 2 * 2 * (4 + 4) * (10 + 4)  # bytes, layers, k and v, tokens read and written
    assert cost.activations == 0
    pairs = 11 + (1 + 2 + 3)
    assert cost.flops == 2 * 4 * 1152 + 2 * 4 * 8 * pairs + 2 * 2 * 32 * 8 == 11_328


def test_no_logits_no_output_matrix(model: ModelConfig) -> None:
    cost = step_cost(model, 2, StepShape(((0, 4),), logit_rows=0))
    assert cost.weights == 2 * (1152 + 5 * 8)
    assert cost.flops == 2 * 4 * 1152 + 2 * 4 * 8 * (1 + 2 + 3 + 4)


def test_a_window_hides_earlier_tokens(model: ModelConfig) -> None:
    windowed = replace(model, sliding_window=4)
    cost = op_costs(windowed, 2, STEP)["attention"]
    assert cost.kv == 2 * 2 * 8 * (3 + 4)
    assert cost.flops == 2 * 4 * 8 * (4 + 6)
    across = op_costs(windowed, 2, StepShape(((2, 4),), 0))["attention"]
    assert across.flops == 2 * 4 * 8 * (3 + 4 + 4 + 4)


def test_an_op_counts_what_passes_through_it(model: ModelConfig) -> None:
    costs = op_costs(model, 2, STEP)
    assert costs["down_proj"].num_bytes == 2 * 2 * (8 * 16 + 4 * (8 + 16))
    assert costs["lm_head"].activations == 2 * (8 * 2 + 32 * 4)
    assert costs["norm"].activations == 2 * 4 * 8 * (2 + 4 * 4)


@pytest.mark.parametrize("shape", ["qwen3-8b", "qwen3-1.7b", "llama-3.1-8b"])
def test_weights_are_those_of_the_checkpoint_but_the_embedding(shape: str) -> None:
    model = load_model_config(shape, random=True)[1]
    tensors = expected_tensors(model)
    layers = sum(prod(tensors[name]) for name in tensors if name not in (EMBEDDING, LM_HEAD))
    assert step_cost(model, 2, StepShape(((7, 1),), 0)).weights == 2 * layers
    head = model.vocab_size * model.hidden_size
    assert step_cost(model, 2, StepShape(((7, 1),), 1)).weights == 2 * (layers + head)


def test_each_step_is_held_up_by_its_own_limit(model: ModelConfig) -> None:
    limits = Limits(bytes_per_s=1000.0, flops_per_s=2000.0, matrix_dtype="float32")
    decode, prefill = StepShape(((0, 1),), 1), StepShape(((0, 100),), 1)
    least = step_cost(model, 2, decode).num_bytes / 1000
    most = step_cost(model, 2, prefill).flops / 2000
    assert Floor.of(model, 2, [decode], limits) == Floor(least, "copy")
    both = Floor.of(model, 2, [decode, StepShape((), 0), prefill], limits)
    assert both.seconds == pytest.approx(least + most)
    assert both.limit == "matrix"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_limits_of_a_gpu() -> None:
    limits = measure_limits(torch.device("cuda"))
    assert 1e11 < limits.bytes_per_s < 1e14
    assert 1e13 < limits.flops_per_s < 1e16
    assert limits.matrix_dtype == "bfloat16"


def test_limits_of_this_machine() -> None:
    limits = measure_limits(torch.device("cpu"))
    assert 1e8 < limits.bytes_per_s < 1e13
    assert 1e8 < limits.flops_per_s < 1e15
    assert limits.matrix_dtype == "float32"
    assert measure_limits(torch.device("cpu")) is limits
