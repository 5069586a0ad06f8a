"""Reading Hugging Face configs: what is served, and what each refusal says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from isobit.errors import ConfigError
from isobit.models.config import ARCHITECTURES, ModelConfig, load_config
from isobit.models.rope import RopeScaling
from isobit.models.shapes import SHAPES

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def write(folder: Path, shape: str = "tiny-llama", **changes: Any) -> Path:
    content = dict(SHAPES[shape]) | changes
    content = {name: value for name, value in content.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def test_llama(tmp_path: Path) -> None:
    config = load_config(write(tmp_path))
    assert config == ModelConfig(
        architecture="LlamaForCausalLM",
        model_type="llama",
        vocab_size=1000,
        hidden_size=192,
        intermediate_size=512,
        num_layers=3,
        num_q_heads=6,
        num_kv_heads=2,
        head_dim=32,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        rope_scaling=RopeScaling(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        qk_norm=False,
        dtype=torch.float32,
        sliding_window=None,
        logit_soft_cap=None,
        eos_token_ids=(2,),
        bos_token_id=1,
    )
    assert (config.q_size, config.kv_size) == (192, 64)


def test_qwen3_has_qk_norm_and_its_own_head_dim(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "tiny-qwen3", sliding_window=64, max_window_layers=1))
    assert config.qk_norm
    assert config.head_dim * config.num_q_heads != config.hidden_size
    assert config.sliding_window is None  # given, but use_sliding_window is off


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": "absent", "rope_scaling": "absent"}
        | {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
    ],
    ids=["before transformers 5", "transformers 5"],
)
def test_both_spellings_of_rope(tmp_path: Path, rope: dict[str, Any]) -> None:
    config = load_config(write(tmp_path, **rope))
    assert config.rope_theta == 5e5
    assert config.rope_scaling is not None
    assert config.rope_scaling.original_max_position_embeddings == 64


def test_linear_scaling_by_its_old_name(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, rope_scaling={"type": "linear", "factor": 4.0}))
    assert config.rope_scaling == RopeScaling(rope_type="linear", factor=4.0)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_both_spellings_of_dtype(tmp_path: Path, key: str) -> None:
    changes = {"dtype": "absent"} | {key: "bfloat16"}
    assert load_config(write(tmp_path, **changes)).dtype is torch.bfloat16
    assert load_config(write(tmp_path, dtype="absent")).dtype is torch.float32


def test_end_tokens_come_from_generation_config_first(tmp_path: Path) -> None:
    write(tmp_path, eos_token_id=[5, 6])
    assert load_config(tmp_path).eos_token_ids == (5, 6)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8, 9]}')
    assert load_config(tmp_path).eos_token_ids == (7, 8, 9)
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.6}')
    assert load_config(tmp_path).eos_token_ids == (5, 6)


def test_a_window_on_every_layer_is_kept(tmp_path: Path) -> None:
    changes = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}
    assert load_config(write(tmp_path, "tiny-qwen3", **changes)).sliding_window == 64


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["MistralForCausalLM"], "model_type": "mistral"}, "MistralForCausalLM"),
        ({"architectures": "absent"}, "says none"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"num_key_value_heads": 4}, "multiple of num_key_value_heads=4"),
        ({"dtype": "float64"}, "float64"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "default, linear, llama3"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"rope_scaling": LLAMA3 | {"factor": 0}}, "factor > 0"),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "< high_freq_factor"),
    ],
)
def test_what_cannot_be_served_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, **changes))
    assert said in str(caught.value)


def test_a_window_on_some_layers_is_refused(tmp_path: Path) -> None:
    changes = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2}
    with pytest.raises(ConfigError, match="all layers full_attention"):
        load_config(write(tmp_path, "tiny-qwen3", **changes))


def test_the_refusal_lists_what_is_supported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, architectures=["DeepseekV3ForCausalLM"], model_type="x"))
    assert all(name in str(caught.value) for name in ARCHITECTURES)


def test_several_faults_are_named_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"hidden_act.*attention_bias"):
        load_config(write(tmp_path, hidden_act="gelu", attention_bias=True))


def test_unreadable_folders(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is none"):
        load_config(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"wanted config\.json in"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ConfigError, match="as JSON"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="JSON object"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match="transformers cannot read"):
        load_config(write(tmp_path, hidden_size="wide"))
