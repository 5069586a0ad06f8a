"""Which device is taken, what is said where it is missing, how much memory the KV cache gets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from isobit import LLM
from isobit.backends import triton
from isobit.backends.capabilities import Requirements
from isobit.backends.rules import refusals
from isobit.core import startup
from isobit.core.config import EngineConfig
from isobit.core.devices import resolve_device
from isobit.core.memory import DeviceMemory, num_pages
from isobit.core.packing import pack
from isobit.core.phases import OTHER, PHASES, Phases
from isobit.core.request import Request
from isobit.core.step import ScheduledSeq
from isobit.errors import ConfigError
from isobit.kernels.triton import launch
from isobit.models.config import ModelConfig
from isobit.models.registry import load_model_config
from isobit.models.weights import random_weights_digest
from isobit.sampling.params import SamplingParams
from isobit.verify.judge import rng_states

CPU = torch.device("cpu")
GIB = 2**30
H200 = DeviceMemory(
    total=140 * GIB, free=100 * GIB, reserved=20 * GIB, weights=16 * GIB, peak=18 * GIB
)
PAGE = 2**20
SHORTAGE = "CUDA out of memory. Tried to allocate 20 GiB. GPU 0 has a total capacity of 10 GiB"


def test_auto_without_cuda_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == CPU


def pretend_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], built: list[str]
) -> None:
    """A second GPU of two, of this compute capability, and a torch built for these."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old card")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)


def test_auto_takes_the_current_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, (9, 0), ["sm_75", "sm_90a", "compute_120"])
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda", 1)
    assert resolve_device("cpu") == CPU


@pytest.mark.parametrize(
    ("cuda", "message"),
    [
        (None, r"built without CUDA\. Install a CUDA build .* Or pass device='cpu'"),
        (
            "13.0",
            r"for CUDA 13\.0 sees no device: The NVIDIA driver .* is too old \(found version "
            r"11040\)\. .* Check with nvidia-smi\. Or pass",
        ),
    ],
)
def test_cuda_that_is_missing_is_explained(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, message: str
) -> None:
    """A driver that is too old is named in torch's own words."""
    monkeypatch.setattr(torch.cuda, "init", old_driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(ConfigError, match=message):
        LLM("tiny-qwen3", load_format="random", device="cuda")
    with LLM("tiny-qwen3", load_format="random") as llm:  # auto says why it is not the GPU
        reasons = [row[2] for row in llm.report.rows if row[0] == "  not cuda"]
    assert [reason.startswith("The NVIDIA driver") for reason in reasons] == [True][: bool(cuda)]


def old_driver() -> None:
    raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")


def test_a_gpu_too_old_for_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu(monkeypatch, (7, 0), ["sm_75", "sm_80", "sm_90a", "compute_120"])
    message = (
        r"an old card, compute capability 7\.0 is too old for torch .* starts at 7\.5\. Install"
    )
    for device in ("cuda", "auto"):
        with pytest.raises(ConfigError, match=message):
            LLM("tiny-qwen3", load_format="random", device=device)
    pretend_gpu(monkeypatch, (7, 5), ["sm_75", "sm_80"])
    assert resolve_device("cuda").type == "cuda"
    pretend_gpu(monkeypatch, (12, 0), [])
    assert resolve_device("cuda").type == "cuda"


@pytest.mark.parametrize(
    ("changes", "rule", "offered"),
    [
        ({"compute_capability": (7, 5)}, "compute_capability", "8.0 and up"),
        ({"head_dim": 20}, "head_dim", "16 to 256 in steps of 8"),
        ({"page_size": 512}, "page_size", "1 to 256"),
        ({}, "requires", "triton 3.3.1 is installed"),
    ],
)
def test_what_triton_does_not_offer_is_refused_with_what_it_does(
    changes: dict[str, Any], rule: str, offered: str
) -> None:
    (spec,) = triton.isobit_attention_backends()
    asked = Requirements(
        dtype="bfloat16",
        head_dim=128,
        page_size=16,
        device="cuda",
        compute_capability=(9, 0),
        deterministic=True,
        features={},
    )
    version = "3.3.1" if rule == "requires" else "3.6.0"
    assert refusals(asked, spec, installed={"triton": "3.6.0"}.get) == []
    (refusal,) = refusals(replace(asked, **changes), spec, installed={"triton": version}.get)
    assert (refusal.rule, refusal.offered) == (rule, offered)
    assert refusal.remedy


def test_triton_kernels_want_what_the_backend_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    (spec,) = triton.isobit_attention_backends()
    assert spec.capabilities.compute_capability == launch.OLDEST_GPU
    assert spec.requires == (f"triton>={launch.OLDEST_TRITON}",)
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(launch.metadata, "version", lambda name: "3.5.0")
    for capability, reason in (((8, 0), None), ((7, 5), "capability 7.5, and at least 8.0 is")):
        pretend_gpu(monkeypatch, capability, [])
        assert (reason or "None") in str(launch.unavailable_reason(cuda))
    monkeypatch.setattr(launch.metadata, "version", lambda name: "3.4.0")
    assert "at least 3.5 is wanted; run: pip install" in str(launch.unavailable_reason(cuda))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, r"device was 'tpu'; wanted one of 'auto', 'cpu', 'cuda'"),
        ({"gpu_memory_utilization": 0}, r"gpu_memory_utilization was 0; wanted a number above 0"),
        ({"gpu_memory_utilization": 1.5}, r"was 1\.5; wanted .* at most 1"),
        ({"gpu_memory_utilization": True}, r"was True; wanted"),
        ({"cuda_graph_max_bs": 0}, r"cuda_graph_max_bs was 0; wanted a whole number from 1"),
    ],
)
def test_options_out_of_range(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineConfig(model="tiny-qwen3", **options)  # type: ignore[arg-type]


def test_the_kv_cache_takes_what_is_left() -> None:
    """0.9 of 140 GiB; 20 are others', a step at its height takes 18: 88 are left."""
    assert H200.for_kv(0.9) == int(0.9 * 140 * GIB) - 38 * GIB
    config = EngineConfig(model="m", gpu_memory_utilization=0.5)
    assert num_pages(config, PAGE, 1000, H200) == 32 * GIB // PAGE


def test_a_share_too_small_says_what_to_lower() -> None:
    config = EngineConfig(model="m", gpu_memory_utilization=0.1, max_model_len=1000)
    message = (
        r"holds 0 pages of 16 tokens .* max_model_len = 1000 tokens takes 63 .*"
        r"gpu_memory_utilization = 0\.1 .* Raise gpu_memory_utilization, lower max_num_batched"
    )
    with pytest.raises(ConfigError, match=message):
        num_pages(config, PAGE, 1000, H200)


def test_an_amount_that_was_asked_for_is_taken_or_refused() -> None:
    config = EngineConfig(model="m", kv_cache_memory="1GiB")
    assert num_pages(config, PAGE, 1000, H200) == num_pages(config, PAGE, 1000, None) == 1024
    with pytest.raises(ConfigError, match=r"Raise kv_cache_memory, or lower .* at most 16384"):
        num_pages(config, PAGE, 16385, H200)
    with pytest.raises(ConfigError, match=r"150323855360 bytes of memory\. Lower kv_cache_memory"):
        num_pages(EngineConfig(model="m", kv_cache_memory="200GiB"), PAGE, 1000, H200)


@pytest.mark.parametrize(
    ("phase", "remedy"),
    [
        ("weights", "Choose a smaller model"),
        ("kernels", "Choose a smaller model"),
        ("largest step", "Lower max_num_batched_tokens or max_num_seqs"),
        ("KV cache", "Lower kv_cache_memory or gpu_memory_utilization"),
        ("graphs", "Lower cuda_graph_max_bs"),
    ],
)
def test_a_shortage_at_start_up_says_what_to_lower(phase: str, remedy: str) -> None:
    message = rf"start-up, phase '{phase}': .* allocate 20 GiB\. {remedy}.*, or free"
    with pytest.raises(ConfigError, match=message), Phases(CPU).timed(phase):
        raise torch.OutOfMemoryError(SHORTAGE)


@pytest.mark.usefixtures("graphs_on")
@pytest.mark.parametrize(
    ("function", "phase"),
    [
        ("random_weights", "weights"),
        ("choose_kernels", "kernels"),
        ("_measured", "largest step"),
        ("allocate_layers", "KV cache"),
        ("DecodeGraphs", "graphs"),
    ],
)
def test_every_phase_of_a_start_is_watched(
    monkeypatch: pytest.MonkeyPatch, function: str, phase: str
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError(SHORTAGE)

    monkeypatch.setattr(startup, function, fail)
    with pytest.raises(ConfigError, match=f"phase '{phase}'"):
        LLM("tiny-qwen3", load_format="random", device="cpu")


def test_the_report_has_the_seconds_of_every_phase(small_folder: Path) -> None:
    with LLM(str(small_folder), device="cpu", max_model_len=64) as llm:
        report = llm.report
    assert tuple(report.phases) == (*PHASES, OTHER)
    assert all(seconds >= 0 for seconds in report.phases.values())
    assert report.phases["weights"] > 0
    assert report.phases["kernels"] > 0
    assert report.seconds == pytest.approx(sum(report.phases.values()))
    without = report.seconds_without_weights
    assert without == pytest.approx(report.seconds - report.phases["weights"])
    row = next(row for row in report.rows if row[0] == "start-up")
    assert row[1] == f"{report.seconds:.1f} s"
    assert row[2].endswith(f"{without:.1f} without weights")


def test_padding_lies_on_the_null_page() -> None:
    request = Request("r", [5, 6, 7], SamplingParams(max_tokens=4))
    request.page_ids = [3, 9]
    batch = pack([ScheduledSeq(request, 2, 1, True, True)], 2, CPU, padding=2)
    assert batch.token_ids.tolist() == [7, 0, 0]
    assert batch.positions.tolist() == [2, 0, 0]
    assert batch.slot_mapping.tolist() == [18, 0, 0]
    assert batch.cu_seqlens_q.tolist() == [0, 1, 2, 3]
    assert batch.seq_lens.tolist() == batch.kv_lens == [3, 1, 1]
    assert batch.block_table.tolist() == [[3, 9], [0, 0], [0, 0]]
    assert batch.num_decodes == batch.num_seqs == 3
    base = batch.token_ids.data_ptr()
    assert (batch.positions.data_ptr() - base) % 256 == 0
    assert (batch.block_table.data_ptr() - batch.cu_seqlens_q.data_ptr()) % 256 == 0


def test_the_digest_of_weights_drawn_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part that decides the values changes it."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "one")
    cuda = torch.device("cuda", 0)

    def digest(shape: str = "tiny-qwen3", seed: int = 0, dtype: torch.dtype = torch.float32) -> str:
        model: ModelConfig = load_model_config(shape, random=True)[1]
        return random_weights_digest(model, seed, dtype, cuda)

    found = {digest(), digest("tiny-llama"), digest(seed=1), digest(dtype=torch.bfloat16)}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another")
    found.add(digest())
    assert len(found) == 5
    assert digest() == digest()


def test_the_report_names_the_device(small_folder: Path) -> None:
    with LLM(str(small_folder), device="cpu", max_model_len=64) as llm:
        assert "device" in [row[0] for row in llm.report.rows]
        assert llm.fingerprint_parts["device"].startswith("cpu ")
        assert "cuda" not in llm.fingerprint_parts


def test_no_cuda_state_is_looked_at_unless_cuda_is_in_use() -> None:
    if torch.cuda.is_initialized():
        pytest.skip("CUDA is in use in this process")
    assert len(rng_states()) == 3
