"""Names and folders: what resolves to what, and what the refusals say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from isobit.errors import ConfigError
from isobit.models.registry import load_model_config, load_tokenizer, resolve_model
from isobit.models.shapes import SHAPES


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "models").mkdir()
    assert resolve_model("~/models") == tmp_path / "models"


@pytest.mark.parametrize("name", ["Qwen/Qwen3-8B", "gpt2", ""])
def test_nothing_is_downloaded(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"unknown model.*smollm2.*nothing is downloaded"):
        resolve_model(name)


def test_a_shape_wants_random_weights() -> None:
    with pytest.raises(ConfigError, match=r"load_format='random'.*\./qwen3-8b"):
        load_model_config("qwen3-8b")
    folder, config = load_model_config("qwen3-8b", random=True)
    assert folder is None
    assert (config.num_layers, config.head_dim, config.eos_token_ids[0]) == (36, 128, 151645)


def test_random_weights_need_only_a_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(dict(SHAPES["tiny-qwen3"])))
    expected = load_model_config("tiny-qwen3", random=True)[1]
    assert load_model_config(tmp_path, random=True) == (tmp_path, expected)
    assert load_model_config(str(tmp_path)) == (tmp_path, expected)


def test_llama_3_2_shape_has_its_scaling() -> None:
    scaling = load_model_config("llama-3.2-1b", random=True)[1].rope_scaling
    assert scaling is not None
    assert (scaling.rope_type, scaling.factor) == ("llama3", 32.0)


def test_tokenizers(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot read the tokenizer in"):
        load_tokenizer(tmp_path)
    Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast"}'
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer.encode("b") == [1]
