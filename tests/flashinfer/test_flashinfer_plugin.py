"""What is declared of the flashinfer backend, and what is said where it cannot be had."""

from __future__ import annotations

import sys
import time
from types import ModuleType

import pytest
import torch

from isobit.backends.base import AttentionConfig
from isobit.backends.capabilities import Conditional, Requirements
from isobit.backends.flashinfer import INSTALL, isobit_check
from isobit.backends.matrix import load_factory, select_backend
from isobit.backends.rules import cell_for, refusals
from isobit.cache.reuse import Provenance, reuse_policy
from isobit.errors import ConfigError
from isobit.plugins.discovery import Candidate
from isobit.plugins.manager import PluginHost

ASKED = Requirements(
    dtype="bfloat16",
    head_dim=128,
    page_size=16,
    device="cuda",
    compute_capability=(9, 0),
    deterministic=True,
    features={"cuda_graph": True, "chunked_prefill": True, "radix_cache": None},
)


def installed(name: str) -> str:
    return {"flashinfer-python": "0.6.14", "triton": "3.6.0"}[name]


def asked(**changes) -> Requirements:
    return Requirements(**{f: getattr(ASKED, f) for f in ASKED.__slots__} | changes)


@pytest.fixture
def host() -> PluginHost:
    import isobit.backends.flashinfer as plugin

    return PluginHost(candidates=[Candidate("flashinfer", "isobit", "0", "", lambda: plugin)])


@pytest.mark.parametrize("name", ["flashinfer", "auto"])
def test_it_serves_an_h200(host, name: str) -> None:
    selection = select_backend(name, ASKED, host, installed=installed)
    assert (selection.spec.name, selection.spec.unproved) == ("flashinfer", "")


def test_determinism_is_refused_where_there_is_no_fa3(host, spec) -> None:
    for capability, deterministic, refused in (
        ((9, 0), True, False),
        ((8, 0), True, True),
        ((10, 0), True, True),
        ((10, 0), False, False),
    ):
        config = asked(compute_capability=capability, deterministic=deterministic)
        assert bool(isobit_check(config, spec)) is refused
    with pytest.raises(ConfigError, match=r"deterministic prefill on 10\.0"):
        select_backend("flashinfer", asked(compute_capability=(10, 0)), host, installed=installed)


def test_only_prefilled_pages_are_reused(spec) -> None:
    offers = spec.capabilities
    policy = reuse_policy(
        deterministic=True,
        chunk_invariant=offers.chunk_invariant,
        alignment=offers.alignment,
        decode_equals_prefill=offers.decode_equals_prefill,
    )
    assert policy.allows(Provenance.PREFILL)
    assert not policy.allows(Provenance.DECODE)
    cell = cell_for("radix_cache", ASKED, spec)
    assert cell == Conditional("only prefill-written tokens (rounded to 1)")


@pytest.mark.parametrize("version", [None, "0.6.13", "0.7.0"])
def test_another_version_is_refused_with_the_install_line(spec, version) -> None:
    (refusal,) = refusals(ASKED, spec, installed=lambda name: version)
    assert INSTALL in refusal.remedy


def test_a_library_that_does_not_load_gives_the_install_line(ours, spec, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)
    for name in [name for name in sys.modules if "flashinfer_" in name]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match=r"cannot be imported.*isobit\[flashinfer\]"):
        load_factory(spec)


CONFIG = AttentionConfig(
    num_layers=1,
    num_q_heads=2,
    num_kv_heads=1,
    head_dim=64,
    scale=0.125,
    page_size=16,
    dtype=torch.float16,
    device=torch.device("cpu"),
    max_model_len=64,
)


def test_kernels_that_cannot_be_built_give_the_install_line(ours, monkeypatch) -> None:
    def broken(*arguments, **options):
        raise RuntimeError("Could not find nvcc")

    monkeypatch.setattr(ours.wrappers.Wrapper, "plan", broken)
    with pytest.raises(ConfigError, match=r"Could not find nvcc.*isobit\[flashinfer\]") as caught:
        ours.backend(CONFIG)
    assert "https://flashinfer.ai/whl/cu" in str(caught.value)


def test_a_line_says_that_kernels_are_being_built(ours, monkeypatch, capsys) -> None:
    ours.backend(CONFIG)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(ours.wrappers, "_SILENT_SECONDS", 0.01)
    with ours.wrappers.building():
        time.sleep(0.2)
    assert "building its attention kernels" in capsys.readouterr().err


def test_the_plugin_imports_no_library() -> None:
    import isobit.backends.flashinfer as plugin

    assert isinstance(plugin, ModuleType)
    assert not hasattr(plugin, "flashinfer")
