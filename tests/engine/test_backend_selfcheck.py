"""The start-up self-check of an attention backend passes the right one and catches wrong ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from isobit import LLM, SamplingParams
from isobit.backends import selfcheck
from isobit.backends.base import AttentionBackend, AttentionConfig
from isobit.backends.capabilities import BackendSpec
from isobit.backends.matrix import load_factory
from isobit.backends.pair import join
from isobit.backends.selfcheck import check_backend
from isobit.core import llm as llm_module
from isobit.errors import ConfigError, SelfCheckError
from isobit.plugins import hookimpl
from isobit.plugins.conformance.mutants.catalogue import MUTANTS, RIGHT, RIGHT_WRITTEN
from isobit.plugins.conformance.mutants.right import RightAttention
from isobit.plugins.discovery import Candidate
from isobit.plugins.manager import PluginHost

SPECS = {mutant.name: mutant.spec for mutant in MUTANTS}
CONFIG = AttentionConfig(
    num_layers=2,
    num_q_heads=2,
    num_kv_heads=1,
    head_dim=16,
    scale=0.25,
    page_size=16,
    dtype=torch.float32,
    device=torch.device("cpu"),
    max_model_len=300,
)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(selfcheck, "LENGTH", 301)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def mismatches(spec: BackendSpec, **changes: Any) -> list[str]:
    config = replace(CONFIG, **changes)
    return [str(m) for m in check_backend(load_factory(spec), config, spec.capabilities).mismatches]


@pytest.mark.parametrize("spec", [RIGHT, RIGHT_WRITTEN], ids=["it writes", "is written for"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"max_model_len": 5000}, {"sliding_windows": (None, 20), "logit_soft_cap": 5.0}],
    ids=["plain", "long", "windows"],
)
def test_the_right_backend_passes(spec: BackendSpec, changes: dict[str, Any]) -> None:
    assert mismatches(spec, **changes) == []


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        ("mutant-splits-by-batch", "rows at once"),
        ("mutant-tile-by-rows", "rows at once"),
        ("mutant-decode-apart", "by decoding"),
        ("mutant-prefix-apart", "in chunks"),
        ("mutant-causal-off-by-one", "float64"),
        ("mutant-scale-missing", "float64"),
        ("mutant-tail-not-cleared", "float64"),
    ],
)
def test_a_wrong_backend_is_caught(name: str, seen: str) -> None:
    assert any(seen in found for found in mismatches(SPECS[name]))


def test_a_window_that_is_ignored_is_caught_in_its_layer() -> None:
    found = mismatches(SPECS["mutant-window-ignored"], sliding_windows=(None, 20))
    assert found
    assert all("window 20" in line for line in found)


def test_the_digest_is_of_the_bits_and_not_of_the_longest_sequence() -> None:
    def digest(**changes: Any) -> str:
        return check_backend(RightAttention, replace(CONFIG, **changes), offers).digest

    offers = RIGHT.capabilities
    assert digest() == digest(max_model_len=7) == digest(page_size=64)
    assert digest() != digest(scale=0.2)


def test_what_is_not_declared_is_not_judged() -> None:
    spec = SPECS["mutant-decode-apart"]
    weaker = replace(spec.capabilities, decode_equals_prefill=False)
    found = check_backend(load_factory(spec), CONFIG, weaker)
    assert found.mismatches == []


def paired(decode: str) -> BackendSpec:
    """The right backend's prefill, and a mutant's decode."""
    spec = SPECS[decode]
    written = replace(spec.capabilities, engine_writes_kv=True)
    return join(RIGHT_WRITTEN, replace(spec, capabilities=written))


def test_decodes_of_other_bits_are_judged_by_float64() -> None:
    assert mismatches(paired("mutant-decode-apart")) == []
    found = mismatches(paired("mutant-scale-missing"))
    assert found
    assert all("decoding position" in line for line in found)


def test_decodes_of_other_bits_enter_the_digest() -> None:
    def digest(spec: BackendSpec) -> str:
        return check_backend(load_factory(spec), CONFIG, spec.capabilities).digest

    assert digest(paired("mutant-decode-apart")) != digest(paired("mutant-gathered-once"))


class Found(RightAttention):
    """The right backend on a library that it found."""

    @classmethod
    def library(cls) -> str:
        return "flash 1.2 (flash.so)"


class Splitting(Found):
    """Of a version that splits by the batch."""

    def splits(self, plan: Any, rows: slice) -> list[range]:
        self.SPLIT = 64 if plan.batch.num_seqs > 1 else 128  # type: ignore[misc]
        return super().splits(plan, rows)


class Crashing(Found):
    def plan(self, batch: Any) -> Any:
        raise RuntimeError("no kernel image")


class Unloadable(Found):
    @classmethod
    def load(cls) -> None:
        raise OSError("libcudart.so.13: no such file")


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LLM]:
    """An engine on a backend that must check itself."""

    def make(
        factory: type[AttentionBackend], install: str = "pip install flash", **options: Any
    ) -> LLM:
        spec = replace(
            RIGHT, name="found", self_check=True, factory=f"found:{factory.__name__}",
            install=install,
        )  # fmt: skip
        monkeypatch.setitem(__import__("sys").modules, "found", SimpleNamespace(**globals()))
        hooks = SimpleNamespace(isobit_attention_backends=hookimpl(lambda: [spec]))
        plugins = [Candidate("found", "found-dist", "1.0", "found", lambda: hooks)]
        monkeypatch.setattr(
            llm_module, "PluginHost", lambda **kw: PluginHost(candidates=plugins, **kw)
        )
        options = {"load_format": "random", "device": "cpu", "max_model_len": 200} | options
        return LLM("tiny-qwen3", attention_backend="found", **options)

    return make


def test_the_library_and_its_check_are_reported_and_in_the_fingerprint(start: Any) -> None:
    with start(Found) as llm:
        (row,) = [row for row in llm.report.rows if row[0] == "attention library"]
        digest = llm.fingerprint_parts["attention_self_check"]
        assert row == ("attention library", "flash 1.2 (flash.so)", f"self-check {digest}")
        assert llm.fingerprint_parts["attention_library"] == "flash 1.2 (flash.so)"
        assert llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2))


def test_a_version_that_splits_by_the_batch_is_not_started(start: Any) -> None:
    message = r"'found' \(flash 1\.2 .*does not keep what it declares(.|\n)*decoding 40 rows"
    with pytest.raises(SelfCheckError, match=message):
        start(Splitting)
    with start(Splitting, deterministic=False) as llm:
        assert "attention_self_check" not in llm.fingerprint_parts


def test_kernels_that_cannot_run_are_a_line(start: Any) -> None:
    message = "cannot compute its self-check: RuntimeError: no kernel image.*pip install flash"
    with pytest.raises(ConfigError, match=message):
        start(Crashing)
    with pytest.raises(ConfigError, match=r"or install another version of found-dist\.$"):
        start(Crashing, install="")


def test_a_library_that_cannot_be_loaded_is_a_line(start: Any) -> None:
    message = r"'found' cannot load its library: OSError: libcudart.*To mend it: pip install flash"
    with pytest.raises(ConfigError, match=message):
        start(Unloadable)
