from __future__ import annotations

import importlib.util

import pytest
import torch

from isobit.errors import ConfigError
from isobit.kernels.dispatch import load_kernels, unavailable_reason
from isobit.kernels.library_defaults import LibraryLinear
from isobit.kernels.native import library
from isobit.kernels.triton import launch


def test_auto_prefers_native():
    expected = "native" if unavailable_reason("native") is None else "torch"
    assert load_kernels().name == expected
    assert load_kernels("torch").name == "torch"


def test_auto_on_another_device_is_torch():
    assert load_kernels("auto", torch.device("meta")).name == "torch"
    with pytest.raises(ConfigError, match="CPU only"):
        load_kernels("native", torch.device("meta"))


def test_unknown_provider_names_the_known_ones():
    with pytest.raises(
        ConfigError, match=r"'mkl'.*'native', 'torch', 'library', 'triton' and 'auto'"
    ):
        load_kernels("mkl")


def test_missing_library_is_explained(monkeypatch):
    library.library.cache_clear()
    library.unavailable_reason.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: None)
    try:
        assert "C compiler" in (unavailable_reason("native") or "")
        assert load_kernels("auto").name == "torch"
        with pytest.raises(ConfigError, match="kernels='native' cannot be used"):
            load_kernels("native")
    finally:
        library.library.cache_clear()
        library.unavailable_reason.cache_clear()


def test_unknown_instruction_set():
    if unavailable_reason("native") is not None:
        pytest.skip(str(unavailable_reason("native")))
    before = library.active_isa()
    assert not library.set_isa("sse9")
    assert library.active_isa() == before


def test_triton_says_why_it_cannot_run(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match="runs on CUDA devices"):
        load_kernels("triton")
    assert unavailable_reason("triton", torch.device("cuda")) is None
    assert "meta" in unavailable_reason("triton", torch.device("meta"))
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in unavailable_reason("triton", torch.device("cuda"))
    assert load_kernels("auto", torch.device("cuda")).name == "torch"


def test_native_is_refused_off_the_cpu():
    assert "CPU only" in unavailable_reason("native", torch.device("cuda"))


def test_lifted_constraints_on_cuda_keep_the_fast_kernels() -> None:
    """Only the products are the library's there, so that a comparison shows what the promise costs
    and not what slower kernels do."""
    pytest.importorskip("triton", reason="needs the package triton")
    cuda = torch.device("cuda")
    lifted, held = load_kernels("library", cuda), load_kernels("triton", cuda)
    assert lifted.name == "library"
    assert lifted.linear is LibraryLinear
    assert lifted.linear is not held.linear
    assert (lifted.rope_qkv_write, lifted.choose) == (held.rope_qkv_write, held.choose)
    assert lifted.demoted(cuda) == ()
    assert load_kernels("library").rope_qkv_write is not held.rope_qkv_write
