"""What doctor and a start-up say of fa3, with and without a library that works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from isobit import LLM, SamplingParams
from isobit.backends import fa3, fa3_providers, selfcheck
from isobit.backends.capabilities import BackendSpec
from isobit.cli import checks
from isobit.core import llm as llm_module
from isobit.errors import ConfigError, SelfCheckError
from isobit.plugins import hookimpl
from isobit.plugins.discovery import Candidate
from isobit.plugins.manager import PluginHost

PARAMS = SamplingParams(max_tokens=6, logprobs=1, ignore_eos=True)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(selfcheck, "LENGTH", 301)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def host_of(plugin: object, **options: Any) -> PluginHost:
    return PluginHost(
        candidates=[Candidate("fa3", "isobit", "0", "fa3", lambda: plugin)], **options
    )


def declared() -> BackendSpec:
    (spec,) = fa3.isobit_attention_backends()
    return spec


@pytest.fixture
def finding(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int]], Any]:
    """What doctor finds on a machine with such a GPU."""

    def find(compute_capability: tuple[int, int]) -> Any:
        devices = {"cuda": compute_capability, "cpu": None}
        monkeypatch.setattr(checks, "_devices", lambda: devices)
        return checks._backend(declared(), host_of(fa3))

    return find


def test_doctor_says_what_to_type(finding: Any, put: Any) -> None:
    line = fa3_providers.install_line()
    nothing = finding((9, 0))
    assert (nothing.status, nothing.remedy) == ("absent", f"Install one: {line}")
    assert nothing.found.startswith("wanted FlashAttention 3 of flash_attn_3, vllm or sgl_kernel")
    elsewhere = finding((10, 0))
    assert "wanted 10.0, found 9.0" in elsewhere.found
    put("vllm")
    unloadable = finding((9, 0))
    assert (unloadable.status, unloadable.remedy) == ("warning", line)
    assert "vllm of unknown version (_vllm_fa3_C.abi3.so) cannot be loaded" in unloadable.found


@pytest.mark.usefixtures("fake")
def test_doctor_is_content_with_a_library_that_loads(finding: Any, put: Any) -> None:
    put("vllm")
    assert finding((9, 0)).status == "ok"


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LLM]:
    """An engine on fa3, as if that ran on a CPU and with any head_dim."""
    spec = declared()
    offers = replace(
        spec.capabilities,
        devices={"cpu"},
        head_dims=None,
        compute_capability=None,
        highest_compute_capability=None,
    )
    spec = replace(spec, capabilities=offers)
    plugin = SimpleNamespace(isobit_attention_backends=hookimpl(lambda: [spec]))
    monkeypatch.setattr(llm_module, "PluginHost", lambda **kw: host_of(plugin, **kw))

    def make(name: str = "fa3", **options: Any) -> LLM:
        facts: dict[str, Any] = {"device": "cpu", "dtype": "bfloat16", "max_model_len": 128}
        return LLM("tiny-qwen3", attention_backend=name, load_format="random", **facts | options)

    return make


def test_an_engine_on_it_gives_the_same_bits_alone_and_together(fake: Any, start: Any) -> None:
    prompts = [[1, 2, 3], list(range(40)), [7]]
    with start() as llm:
        together = llm.generate(prompts, PARAMS)
        alone = [llm.generate([prompt], PARAMS)[0] for prompt in prompts]
        rows = {row[0]: row[1:] for row in llm.report.rows}
        assert llm.fingerprint_parts["attention_library"] == "sgl 1.0 (fake.so)"
    assert rows["attention library"][0] == "sgl 1.0 (fake.so)"
    assert rows["attention library"][1].startswith("self-check ")
    for one, other in zip(together, alone, strict=True):
        assert one.outputs[0].token_ids == other.outputs[0].token_ids
        assert one.outputs[0].logprobs == other.outputs[0].logprobs
    assert {call["num_splits"] for call in fake.calls} == {1}


def test_splits_are_the_librarys_own_where_no_bits_are_promised(broken: Any, start: Any) -> None:
    with start(deterministic=False) as llm:
        llm.generate([[1, 2, 3]], PARAMS)
    assert {call["num_splits"] for call in broken.calls} == {0}


@pytest.mark.usefixtures("broken")
def test_a_library_that_splits_by_the_batch_is_not_started(start: Any) -> None:
    with pytest.raises(SelfCheckError, match=r"'fa3' \(sgl 1\.0 .*does not keep what it declares"):
        start()


@pytest.mark.usefixtures("fake")
def test_auto_takes_it(start: Any) -> None:
    with start("auto") as llm:
        assert dict(llm.fingerprint_parts)["attention_library"] == "sgl 1.0 (fake.so)"
    with pytest.raises(ConfigError, match=r"fa3: .*float32"):
        start("auto", dtype="float32")
