"""Strict loading: every dtype and layout that is read, and every way in which files are wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from isobit.errors import ConfigError
from isobit.models.config import ModelConfig
from isobit.models.loader import load_weights
from isobit.models.registry import load_model_config
from isobit.models.weights import expected_tensors, random_weights

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(params=["tiny-qwen3", "tiny-llama"])
def config(request: pytest.FixtureRequest) -> ModelConfig:
    return load_model_config(request.param, random=True)[1]


@pytest.fixture
def tied() -> ModelConfig:
    return load_model_config("tiny-llama", random=True)[1]


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_dtypes(
    tmp_path: Path, config: ModelConfig, stored: torch.dtype, wanted: torch.dtype
) -> None:
    weights = random_weights(config, 1, stored)
    save_file(weights, tmp_path / SINGLE)
    loaded = load_weights(tmp_path, config, wanted)
    assert {tensor.dtype for tensor in loaded.values()} == {wanted}
    assert_same(loaded, {name: tensor.to(wanted) for name, tensor in weights.items()})


def write_shards(folder: Path, weights: dict[str, Tensor], count: int = 3) -> dict[str, str]:
    names = sorted(weights)
    where = {name: f"model-{i % count:05}.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({name: weights[name] for name in names if where[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return where


def test_shards(tmp_path: Path, config: ModelConfig) -> None:
    weights = random_weights(config, 1)
    write_shards(tmp_path, weights)
    assert_same(load_weights(tmp_path, config, torch.float32), weights)


def test_loaded_weights_outlive_their_files(tmp_path: Path, tied: ModelConfig) -> None:
    weights = random_weights(tied, 1)
    save_file(weights, tmp_path / SINGLE)
    loaded = load_weights(tmp_path, tied, torch.float32)
    size = (tmp_path / SINGLE).stat().st_size
    with (tmp_path / SINGLE).open("r+b") as file:
        file.write(b"\0" * size)
    assert_same(loaded, weights)


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(
    tmp_path: Path, tied: ModelConfig
) -> None:
    weights = random_weights(tied, 1)
    embedding = weights["model.embed_tokens.weight"]
    save_file(weights | {"lm_head.weight": embedding.clone()}, tmp_path / SINGLE)
    assert_same(load_weights(tmp_path, tied, torch.float32), weights)
    save_file(weights | {"lm_head.weight": embedding + 1}, tmp_path / SINGLE)
    with pytest.raises(ConfigError, match="tie_word_embeddings"):
        load_weights(tmp_path, tied, torch.float32)


def test_old_buffers_are_ignored(tmp_path: Path, tied: ModelConfig) -> None:
    weights = random_weights(tied, 1)
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    save_file(weights | buffer, tmp_path / SINGLE)
    assert_same(load_weights(tmp_path, tied, torch.float32), weights)


def test_every_fault_is_in_one_message(tmp_path: Path, config: ModelConfig) -> None:
    weights = random_weights(config, 1)
    del weights["model.norm.weight"]
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(3)
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 5)
    name = "model.layers.1.input_layernorm.weight"
    weights[name] = weights[name].to(torch.float64)
    save_file(weights, tmp_path / SINGLE)
    with pytest.raises(ConfigError) as caught:
        load_weights(tmp_path, config, torch.float32)
    said = str(caught.value)
    assert "1 missing: model.norm.weight" in said
    assert "1 extra: model.layers.0.self_attn.q_proj.bias" in said
    assert "1 misshapen: model.layers.1.mlp.up_proj.weight [3, 5] (wanted [" in said
    assert f"{name} F64" in said


def test_long_lists_are_cut(tmp_path: Path, config: ModelConfig) -> None:
    save_file({"other": torch.zeros(1)}, tmp_path / SINGLE)
    with pytest.raises(ConfigError) as caught:
        load_weights(tmp_path, config, torch.float32)
    assert f"and {len(expected_tensors(config)) - 8} more" in str(caught.value)


@pytest.mark.parametrize("kept", [0, 4, 100, 50_000, -1])
def test_truncated(tmp_path: Path, tied: ModelConfig, kept: int) -> None:
    save_file(random_weights(tied, 1), tmp_path / SINGLE)
    content = (tmp_path / SINGLE).read_bytes()
    (tmp_path / SINGLE).write_bytes(content[:kept])
    with pytest.raises(ConfigError, match=r"not a whole safetensors file.*download it again"):
        load_weights(tmp_path, tied, torch.float32)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<!DOCTYPE html><html>404</html>", "download it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    ],
)
def test_foreign_file(tmp_path: Path, tied: ModelConfig, content: bytes, said: str) -> None:
    (tmp_path / SINGLE).write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        load_weights(tmp_path, tied, torch.float32)


def test_no_weights(tmp_path: Path, tied: ModelConfig) -> None:
    with pytest.raises(ConfigError, match="there is none"):
        load_weights(tmp_path / "nowhere", tied, torch.float32)
    with pytest.raises(ConfigError, match="which holds nothing"):
        load_weights(tmp_path, tied, torch.float32)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"holds pytorch_model\.bin; only safetensors"):
        load_weights(tmp_path, tied, torch.float32)


def test_damaged_index(tmp_path: Path, tied: ModelConfig) -> None:
    where = write_shards(tmp_path, random_weights(tied, 1))
    (tmp_path / where["model.norm.weight"]).unlink()
    with pytest.raises(ConfigError, match=f"1 missing files: {where['model.norm.weight']}"):
        load_weights(tmp_path, tied, torch.float32)
    for content, said in (
        ("{", "weight_map"),
        ('{"metadata": {}}', "weight_map"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "outside"),
    ):
        (tmp_path / INDEX).write_text(content)
        with pytest.raises(ConfigError, match=said):
            load_weights(tmp_path, tied, torch.float32)


def test_a_tensor_in_two_shards(tmp_path: Path, tied: ModelConfig) -> None:
    weights = random_weights(tied, 1)
    where = write_shards(tmp_path, weights)
    save_file(weights, tmp_path / where["model.norm.weight"])
    with pytest.raises(ConfigError, match="stored in two files: "):
        load_weights(tmp_path, tied, torch.float32)
