"""RoPE frequencies and tables against transformers' own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from isobit.models.rope import RopeScaling, cos_sin_table, inverse_frequencies

LLAMA_3_2 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SCALINGS: dict[str, dict[str, Any] | None] = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": LLAMA_3_2,
    "llama3 short": LLAMA_3_2 | {"factor": 8.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize(("head_dim", "theta"), [(32, 1e4), (64, 1e5), (128, 5e5), (128, 1e6)])
def test_same_as_transformers(name: str, head_dim: int, theta: float) -> None:
    given = SCALINGS[name]
    scaling = RopeScaling(**given) if given else None
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(
            head_dim=head_dim,
            rope_parameters=dict(given or {"rope_type": "default"}) | {"rope_theta": theta},
            max_position_embeddings=8192,
        )
    )
    ours = inverse_frequencies(head_dim, theta, scaling)
    if name.startswith("llama3"):  # the blend may be rounded in another order
        torch.testing.assert_close(ours, theirs.inv_freq, rtol=3e-7, atol=0)
    else:
        assert torch.equal(ours, theirs.inv_freq)

    table = cos_sin_table(head_dim, theta, scaling, 3000)
    cos, sin = theirs(torch.zeros(1), torch.arange(3000)[None])
    half = head_dim // 2
    torch.testing.assert_close(table[:, :half], cos[0, :, :half], rtol=0, atol=3e-4)
    torch.testing.assert_close(table[:, half:], sin[0, :, :half], rtol=0, atol=3e-4)


def test_scaling_is_felt() -> None:
    scaling = RopeScaling(**LLAMA_3_2)
    plain, scaled = (inverse_frequencies(128, 5e5, s) for s in (None, scaling))
    wavelength = 2 * math.pi / plain
    assert torch.equal(plain[wavelength < 2048], scaled[wavelength < 2048])
    assert torch.equal(plain[wavelength > 8192] / 32, scaled[wavelength > 8192])
    assert not torch.equal(plain, scaled)


def test_rows_do_not_depend_on_the_tables_length() -> None:
    long = cos_sin_table(64, 1e5, None, 4099)
    for length in (1, 2, 7, 63, 1000, 4096):
        assert torch.equal(cos_sin_table(64, 1e5, None, length), long[:length])
