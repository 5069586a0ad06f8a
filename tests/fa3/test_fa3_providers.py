"""Which library is found, how it is loaded and called, and what is said where there is none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import isobit
from isobit.backends import fa3
from isobit.backends.capabilities import Requirements
from isobit.backends.fa3_providers import (
    _NEUTRAL,
    PROVIDERS,
    find_library,
    install_line,
    load_kernel,
)
from isobit.backends.rules import refusals
from isobit.errors import ConfigError

VERSIONS = {"flash-attn-3": "3.0.0b1", "vllm": "0.33.0", "sglang-kernel": "0.4.10"}

Put = Callable[..., Path]


@pytest.mark.parametrize("provider", PROVIDERS, ids=lambda p: p.package)
def test_each_provider_is_found_without_being_imported(put: Put, provider: Any) -> None:
    file = put(provider.package)
    found = find_library(VERSIONS.get)
    assert found is not None
    assert (found.provider, found.file) == (provider, file)
    assert provider.package not in sys.modules
    distribution = provider.distributions[0]
    assert str(found) == f"{distribution} {VERSIONS[distribution]} ({file.name})"


def test_the_first_of_several_is_taken(put: Put) -> None:
    for package in ("sgl_kernel", "vllm"):
        put(package)
    found = find_library({"sgl-kernel": "0.3"}.get)
    assert found is not None
    assert str(found) == "vllm of unknown version (_vllm_fa3_C.abi3.so)"


def test_a_package_without_the_extension_is_passed_over(put: Put) -> None:
    put("flash_attn_3", "flash_api.py")
    put("vllm", "vllm_flash_attn/_vllm_fa2_C.abi3.so")
    assert find_library() is None
    put("sgl_kernel")
    found = find_library({"sgl-kernel": "0.3.21"}.get)
    assert found is not None
    assert str(found) == "sgl-kernel 0.3.21 (flash_ops.abi3.so)"


def test_nothing_installed_is_a_refusal_with_the_line_to_type(put: Put) -> None:
    (spec,) = fa3.isobit_attention_backends()
    (refusal,) = fa3.isobit_check(hopper(), spec)
    assert refusal.rule == "requires"
    assert "pip install sglang-kernel 'torch==" in refusal.remedy
    with pytest.raises(ConfigError, match=r"none of flash_attn_3, vllm, sgl_kernel .* pip install"):
        load_kernel()
    put("sgl_kernel")
    assert fa3.isobit_check(hopper(), spec) == []


def test_a_library_that_does_not_load_is_a_line_and_not_a_traceback(put: Put) -> None:
    put("sgl_kernel")
    message = r"sgl_kernel of unknown .* cannot be loaded: OSError: .*torch .* pip install sglang"
    with pytest.raises(ConfigError, match=message):
        load_kernel()


def test_the_line_names_the_torch_that_is_installed() -> None:
    assert install_line({"torch": "2.11.0+cu130"}.get) == (
        "pip install sglang-kernel 'torch==2.11.0'"
    )
    assert install_line({}.get) == "pip install sglang-kernel"


@pytest.mark.parametrize("build", ["upstream", "vllm", "sgl"])
def test_each_build_gets_its_arguments_by_name(make_kernel: Any, build: str) -> None:
    import torch

    calls: list[dict[str, Any]] = []
    kernel = make_kernel(build, lambda **given: calls.append(given))
    x = torch.zeros(1)
    values = {
        **dict.fromkeys(("q", "k", "v", "out", "cu_seqlens_q", "seqused_k", "page_table"), x),
        "max_seqlen_q": 3,
        "max_seqlen_k": 5,
        "softmax_scale": 0.5,
        "is_causal": True,
        "window_size_left": 7,
        "window_size_right": 0,
        "softcap": 2.0,
        "num_splits": 1,
    }
    kernel(**values)
    (got,) = calls
    left = {name: got.pop(name) for name in list(got) if name not in values}
    assert got == values
    assert {n: v for n, v in left.items() if v is not None}.items() <= _NEUTRAL.items()
    with pytest.raises(KeyError):
        kernel(**values, sinks=None)
    with pytest.raises(KeyError):
        kernel(**{name: values[name] for name in values if name != "num_splits"})


def test_an_unknown_build_is_refused_with_what_is_strange(make_kernel: Any) -> None:
    schema = "(Tensor q, Tensor? out, int num_splits, bool spin, float f = 1.0) -> ()"
    with pytest.raises(ConfigError, match=r"it has no k, v, .*; it wants spin\. Install another"):
        make_kernel("other", lambda **given: None, schema)


def hopper(**changes: Any) -> Requirements:
    asked: dict[str, Any] = {
        "dtype": "bfloat16",
        "head_dim": 128,
        "page_size": 16,
        "device": "cuda",
        "compute_capability": (9, 0),
        "deterministic": True,
        "features": {},
    }
    return Requirements(**(asked | changes))


@pytest.mark.parametrize(
    ("changes", "rule", "offered"),
    [
        ({"compute_capability": (8, 9)}, "compute_capability", "9.0"),
        ({"compute_capability": (10, 0)}, "compute_capability", "9.0"),
        ({"compute_capability": None}, "compute_capability", "9.0"),
        ({"dtype": "float32"}, "dtype", "bfloat16, float16"),
        ({"head_dim": 80}, "head_dim", "64, 96, 128, 192"),
        ({"page_size": 128}, "page_size", "1, 2, 4, 8, 16, 32, 64"),
    ],
)
def test_what_is_not_offered_is_refused(changes: dict[str, Any], rule: str, offered: str) -> None:
    (spec,) = fa3.isobit_attention_backends()
    assert refusals(hopper(), spec) == []
    (refusal,) = refusals(hopper(**changes), spec)
    assert (refusal.rule, refusal.offered) == (rule, offered)


def test_the_declaration_loads_no_torch() -> None:
    program = (
        "import sys, isobit.backends.fa3 as f; (spec,) = f.isobit_attention_backends()\n"
        "f.find_library(); sys.exit('torch' in sys.modules)"
    )
    folder = str(Path(isobit.__file__).parent.parent)
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True)
    assert done.returncode == 0, done.stderr
