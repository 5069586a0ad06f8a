"""Prefills on Hopper: where they run, that the kernel compiles, and there its bits.

Triton's interpreter cannot run what is written in Gluon, but any machine can compile it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import triton

from isobit.kernels.triton import tiling
from isobit.kernels.triton.tiling import HOPPER_PREFILL, default_tiling, hopper_fits, in_gluon

COMPILE = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from isobit.kernels.triton.prefill_hopper import _prefill_kernel as kernel

sizes = json.loads(sys.argv[1])
places = "q k_cache v_cache out work cu_seqlens_q seq_lens block_table".split()
types = dict.fromkeys(places[:4], "*bf16") | dict.fromkeys(places[4:], "*i32")
types |= {"table_stride": "i32", "page_stride": "i32", "factor": "fp32", "cap_factor": "fp32"}
types |= dict.fromkeys(sizes, "constexpr")
names = kernel.arg_names
aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in [*places, "page_stride"]}
constants = {(names.index(n),): value for n, value in sizes.items()}
source = GluonASTSource(kernel, {n: types[n] for n in names}, constants, aligned)
options = {"num_warps": 4, "enable_fp_fusion": False}
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
fused = [line for line in compiled.asm["ptx"].splitlines() if "mad.f32" in line]
print(json.dumps([compiled.metadata.shared, compiled.asm["ptx"].count("wgmma.mma_async"), fused]))
"""


@pytest.mark.skipif(not in_gluon(), reason="this Triton has no such Gluon: wanted 3.6 to 3.9")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_kernel_compiles_for_hopper(head_dim, tmp_path):
    sizes = {
        "BLOCK_N": 64,
        "BLOCK_D": head_dim,
        "HEAD_DIM": head_dim,
        "NUM_KV_HEADS": 8,
        "GROUP": 3,
        "PAGE": 16,
        "NEAR_SPLIT": 256,
        "NEAR_END": 4096,
        "SPLIT": 1024,
        "WINDOW": 1000 if head_dim == 64 else 0,
        "SOFT_CAP": head_dim == 64,
        "STAGES": HOPPER_PREFILL[head_dim].stages,
    }
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(sizes)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    shared, products, fused = json.loads(done.stdout.splitlines()[0])
    assert shared <= 232448
    assert products > 0
    assert fused == []


def test_where_it_runs(monkeypatch):
    here = torch.device("cuda", 0)
    monkeypatch.setattr(tiling, "hopper", lambda device: device == here)
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    assert hopper_fits(here, 2, 128, 16)
    assert hopper_fits(here, 2, 64, 24)
    assert not hopper_fits(torch.device("cpu"), 2, 128, 16)
    assert not hopper_fits(here, 4, 128, 16)
    assert not hopper_fits(here, 2, 80, 16)
    assert not hopper_fits(here, 2, 128, 20)
    for version, known in (("3.5.1", False), ("3.9.0+git1", True), ("3.10.0", False)):
        monkeypatch.setattr(triton, "__version__", version)
        assert hopper_fits(here, 2, 128, 16) == known
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    assert not hopper_fits(torch.device("cuda", 1), 2, 128, 16)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_only_the_prefill_differs(head_dim):
    general = default_tiling(head_dim, 2, 232448)
    chosen = default_tiling(head_dim, 2, 232448, hopper=True)
    assert chosen == replace(general, hopper=True, prefill=HOPPER_PREFILL[head_dim])


@pytest.mark.gpu
@pytest.mark.parametrize("variant", [{}, {"window": 40}, {"window": 100, "cap": 3.0}])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_it_has_the_bits_of_the_general_kernel(head_dim, variant, served, small, assert_same_bits):
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    hopper = replace(small, hopper=True, prefill=HOPPER_PREFILL[head_dim])
    other = replace(hopper, near_end=0)
    parts = [(0, 0, 250), (1, 60, 150), (2, 0, 1)]
    shape = {"heads": (6, 2), "dim": head_dim, "dtype": torch.bfloat16, **variant}
    general, same, different = (
        served([250, 150, 1], tiling=tiling, **shape).attend(parts)
        for tiling in (small, hopper, other)
    )
    for a, b in zip(same, general, strict=True):
        assert_same_bits(a, b)
    # Negative control: other splits give other bits.
    assert any(not torch.equal(a, b) for a, b in zip(different, general, strict=True))
