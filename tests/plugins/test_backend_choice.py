"""Which dtype a checkpoint is computed in, and what is said where none can be."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from isobit import LLM
from isobit.backends.capabilities import Supported
from isobit.backends.matrix import BackendRefusedError
from isobit.cli.main import main
from isobit.core.backend_choice import choose_backend
from isobit.core.config import EngineConfig
from isobit.models.registry import load_model_config

WORKING = {
    "factory": "isobit.backends.torch_attention:TorchAttention",
    "engine_writes_kv": True,
    "features": {"non_greedy_sampling": Supported()},
    "page_sizes": {16},
}
CHOICES = pytest.mark.parametrize("name", ["one", "auto"])


@pytest.fixture
def choose(make_host, make_spec):
    """The choice for a bfloat16 checkpoint, where there is one backend."""
    model = replace(load_model_config("tiny-qwen3", random=True)[1], dtype=torch.bfloat16)

    def chosen(name, dtypes, **options):
        config = EngineConfig(model="tiny-qwen3", device="cpu", attention_backend=name, **options)
        host = make_host(make_spec("one", dtypes=dtypes, **WORKING))
        return choose_backend(config, model, host, torch.device("cpu"))[1]

    return chosen


@CHOICES
def test_float32_is_taken_where_the_checkpoints_dtype_is_not_offered(choose, name):
    assert choose(name, {"bfloat16", "float32"}) == torch.bfloat16
    assert choose(name, {"float32"}) == torch.float32
    with pytest.raises(BackendRefusedError, match="dtype: wanted bfloat16"):
        choose(name, {"float32"}, dtype="bfloat16")  # it was asked for


@CHOICES
@pytest.mark.parametrize("dtypes", [{"bfloat16"}, {"bfloat16", "float32"}])
def test_what_float32_does_not_mend_is_said_of_the_checkpoints_dtype(choose, name, dtypes):
    with pytest.raises(BackendRefusedError) as caught:
        choose(name, dtypes, page_size=7)
    assert [refusal.rule for refusal in caught.value.refusals] == ["page_size"]
    assert "dtype" not in str(caught.value)


@CHOICES
def test_where_float32_is_refused_too_the_first_refusal_is_raised(choose, name):
    with pytest.raises(BackendRefusedError, match=r"(?s)dtype: wanted bfloat16.*page_size") as no:
        choose(name, {"float32"}, page_size=7)
    assert "wanted float32" not in str(no.value)


def test_explain_takes_what_the_engine_takes(tmp_path):
    """No backend offers float16 on the CPU."""
    _, model = load_model_config("tiny-llama", random=True)
    sizes = {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_q_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": 64,
    }
    kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float16"}
    (tmp_path / "config.json").write_text(json.dumps(kind | sizes))
    asked = ["--model", str(tmp_path), "--load-format", "random", "--device", "cpu"]
    shown = CliRunner().invoke(main, ["backends", "--explain", "--json", *asked])
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    assert found["taken"] == "taken: torch, in float32: float16 is not offered"
    (row,) = [row for row in found["backends"] if row["backend"] == "torch"]
    assert row["refusals"] == []
    with LLM(str(tmp_path), load_format="random", device="cpu") as llm:
        assert llm.engine.runner.backend.config.dtype == torch.float32
    named = CliRunner().invoke(main, ["backends", "--explain", "--dtype", "float16", *asked])
    assert "none is taken: no attention backend can serve" in named.stdout
