"""Every Triton kernel compiles for each kind of GPU that is served, on a machine without one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("triton is there on Linux only", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from isobit.kernels.triton import tiling

PROGRAM = Path(__file__).parent / "compile_all.py"
KERNELS = Path(tiling.__file__).parent
HOPPER = "prefill_hopper._prefill_kernel"


def compiled(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def launched() -> set[str]:
    """The kernels that our code launches: ``module.name``."""
    return {
        f"{file.stem}.{name}"
        for file in KERNELS.glob("*.py")
        for name in re.findall(r"^ +(_\w+)\[.+\]\(", file.read_text(), re.MULTILINE)
    }


@pytest.mark.parametrize("capability", ["80", "90"])
def test_every_kernel_compiles_and_fits(tmp_path: Path, capability: str) -> None:
    done = compiled(tmp_path, capability)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    elsewhere = set() if capability == "90" and tiling.in_gluon() else {HOPPER}
    assert {each["kernel"] for each in found} == launched() - elsewhere
    assert all(each["fits"] for each in found)
    # Every launch says whether products are fused into sums: the default is Triton's to change.
    assert all("enable_fp_fusion" in each["options"] for each in found)


def test_a_mistake_is_seen(tmp_path: Path) -> None:
    done = compiled(tmp_path, "90", "--broken")
    assert done.returncode != 0
    assert "CompilationError" in done.stderr
    assert not done.stdout


def test_launches_are_found() -> None:
    assert {HOPPER, "decode._split_kernel", "filters._last_tie", "matmul._matmul"} < launched()
