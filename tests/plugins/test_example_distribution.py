"""A third party's backend, built and installed by pip from its own pyproject, then used."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import isobit

EXAMPLE = Path(isobit.__file__).parent / "examples" / "minimal_backend"

PROGRAM = """
import importlib.util, sys
import torch
from isobit.backends.base import AttentionConfig, Batch, LayerCache
from isobit.backends.capabilities import Requirements
from isobit.backends.matrix import load_factory, select_backend
from isobit.plugins.manager import PluginHost

asked = Requirements(dtype="float32", head_dim=8, page_size=4, device="cpu",
    compute_capability=None, deterministic=True, features={"radix_cache": None})
assert importlib.util.find_spec("isobit_minimal").origin.startswith(sys.argv[1])
selection = select_backend("minimal", asked, PluginHost())
assert (selection.distribution, selection.version) == ("isobit-minimal", "0.1.0")
backend = load_factory(selection.spec)(AttentionConfig(num_layers=1, num_q_heads=4,
    num_kv_heads=2, head_dim=8, scale=8 ** -0.5, page_size=4, dtype=torch.float32,
    device=torch.device("cpu"), max_model_len=16))
generator = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(6, heads, 8, generator=generator) for heads in (4, 2, 2))
k_cache, v_cache = (torch.full(backend.kv_cache_shape(3), float("nan")) for _ in "kv")
batch = Batch(token_ids=torch.zeros(6, dtype=torch.int64), positions=torch.arange(6),
    slot_mapping=torch.tensor([8, 9, 10, 11, 4, 5]),
    cu_seqlens_q=torch.tensor([0, 6], dtype=torch.int32),
    seq_lens=torch.tensor([6], dtype=torch.int32),
    block_table=torch.tensor([[2, 1, 0]], dtype=torch.int32),
    query_lens=[6], kv_lens=[6], num_decodes=0)
out = torch.empty_like(q)
backend.run(q, k, v, LayerCache(0, k_cache, v_cache), backend.plan(batch), out)
heads = [tensor.transpose(0, 1).double() for tensor in (q, k.repeat_interleave(2, 1),
    v.repeat_interleave(2, 1))]
wanted = torch.nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
torch.testing.assert_close(out.double(), wanted.transpose(0, 1), atol=1e-6, rtol=1e-6)
print("served")
"""


@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="needs pip")
@pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="needs setuptools")
def test_a_backend_installed_by_pip_serves(site):
    source, target = site.root / "source", site.root / "target"
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--quiet", "--target"]
    install = [sys.executable, "-m", "pip", "install", *options, str(target), str(source)]
    done = subprocess.run(install, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    done = site.python(PROGRAM, str(target), folders=[target])
    assert done.stdout.strip() == "served", done.stderr
