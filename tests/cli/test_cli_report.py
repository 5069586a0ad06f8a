from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

RANDOM = ["--model", "tiny-llama", "--load-format", "random"]
SHORT = ["--n-trials", "2", "--max-new-tokens", "2"]


def verify(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "isobit.cli.main", "verify", *args, *RANDOM],
        capture_output=True,
        text=True,
        check=False,
    )


def test_every_row_is_on_the_page(tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    done = verify("--quick", "--report", str(target))
    assert done.returncode == 0, done.stderr
    assert f"report: {target}" in done.stderr
    page = target.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert page.count("</span> holds</span>") == done.stdout.count("holds") == 8
    assert f"isobit verify --quick --report {target}" in page


def test_a_modes_results_are_on_the_page(tmp_path: Path) -> None:
    target = tmp_path / "page.html"
    done = verify("--test-mode", "radix_cache", *SHORT, "--report", str(target))
    assert done.returncode == 0, done.stderr
    assert "Trial 1, prompt cached by decoding" in target.read_text(encoding="utf-8")


def test_a_page_that_could_not_be_written_is_refused_before_the_proofs(tmp_path: Path) -> None:
    missing = tmp_path / "missing" / "page.html"
    done = verify("--report", str(missing))
    assert done.returncode == 2
    assert f"Make {missing.parent} first" in done.stderr
    assert "attention backend" not in done.stderr  # the engine did not start
    assert verify("--report", str(tmp_path)).returncode == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to every folder")
def test_a_folder_without_write_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    done = verify("--report", str(tmp_path / "page.html"))
    assert done.returncode == 2
    assert "may write" in done.stderr
