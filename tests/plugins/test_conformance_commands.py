"""The suite as a user meets it: ``isobit plugins test``, ``isobit backends --prove``, pytest."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from isobit.cli.main import main

WRONG = """
from isobit.plugins.conformance.mutants.masks import CausalOffByOne as Attention
"""
PLUGIN = """
from isobit import plugins

@plugins.hookimpl
def isobit_attention_backends():
    return [plugins.BackendSpec(
        name="wrong", api=1, factory="wrong_attention:Attention",
        capabilities=plugins.Capabilities(
            dtypes={"float32"}, devices={"cpu"}, head_dims={16}, page_sizes={16}),
    )]
"""


def isobit(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), prog_name="isobit")


def test_one_check_of_a_backend_that_holds() -> None:
    done = isobit("plugins", "test", "torch", "--quick", "--check", "pages")
    assert done.exit_code == 0, done.output
    assert "pages        passed" in done.output
    assert "torch holds what was tried of its declaration" in done.output
    assert "deterministic          yes                     proved" in done.output


def test_the_proof_as_json_and_as_a_file(tmp_path: Path) -> None:
    saved = tmp_path / "proof.json"
    done = isobit(
        *("plugins", "test", "torch", "--quick", "--check", "rerun", "--json"),
        *("--save", str(saved), "--waive", "batch=slow here"),
    )
    proof = json.loads(done.stdout)
    assert proof == json.loads(saved.read_text())
    assert proof["cells"]["deterministic"]["verdict"] == "proved"
    assert shlex.split(proof["command"]) == [
        *("isobit", "plugins", "test", "torch", "--device", "cpu", "--quick"),
        *("--check", "rerun", "--waive", "batch=slow here"),
    ]
    assert proof["versions"].keys() >= {"isobit", "torch", "python"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere",), "there is no attention backend 'nowhere'"),
        (("torch", "--device", "tpu"), "device 'tpu' was asked for, and torch declares cpu"),
        (("torch", "--check", "bath"), "there is no check 'bath'"),
        (("torch", "--waive", "batch="), "waived without a reason"),
    ],
)
def test_a_users_mistake_is_a_usage_error(arguments: tuple[str, ...], said: str) -> None:
    done = isobit("plugins", "test", *arguments)
    assert done.exit_code == 2
    assert said in " ".join(done.stderr.split())


def test_a_wrong_backend_fails_with_a_program(site) -> None:
    site.plugin("wrong", PLUGIN)
    (site.folders[-1] / "wrong_attention.py").write_text(WRONG)
    program = "from isobit.cli.main import main; main()"
    done = site.python(program, "plugins", "test", "wrong", "--quick", "--check", "reference")
    assert done.returncode == 1, done.stderr
    assert "reference FAILS" in done.stdout
    assert "wrong FAILS 1 of 1 checks" in done.stdout
    snippet = done.stdout.partition("To repeat it:")[2].partition("\n\n  ")[2]
    lines = [line[4:] for line in ("  " + snippet).splitlines()]
    source = "\n".join(lines[: lines.index(")") + 1])
    again = site.python(source)
    assert again.returncode == 1
    assert "query head" in again.stderr


def test_the_engine_check_asks_the_host_that_found_the_backend(site, backend_source) -> None:
    """A rival of the same name is disabled, for the engine of the check too."""
    site.plugin("rival", backend_source("torch"))
    program = "from isobit.cli.main import main; main()"
    judged = ("test", "torch", "--quick", "--check", "engine", "--device", "cpu")
    contested = site.python(program, "plugins", *judged)
    assert contested.returncode == 2
    assert "rival-dist" in contested.stderr
    done = site.python(program, "plugins", "--no-plugin", "rival", *judged, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    command = json.loads(done.stdout)["command"]
    assert command == (
        "isobit plugins --no-plugin rival test torch --device cpu --quick --check engine"
    )


def test_every_backend_that_runs_here_is_proved(tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = isobit("backends", "--prove", "--quick", "--json", "--report", str(page))
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    proofs = {(p["backend"], p["device_type"]): p for p in found["proofs"]}
    cells = proofs["torch", "cpu"]["cells"]
    assert {cell["verdict"] for cell in cells.values()} <= {"proved", "not declared"}
    assert cells["radix_cache"]["verdict"] == cells["non_greedy_sampling"]["verdict"] == "proved"
    assert "proved" in page.read_text()


def test_quick_is_for_prove() -> None:
    done = isobit("backends", "--quick")
    assert done.exit_code == 2
    assert "--quick is for --prove" in done.stderr


def pytest_run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rs"]
    suite = ["--pyargs", "isobit.plugins.conformance"]
    return subprocess.run(
        [*command, *suite, *arguments], capture_output=True, text=True, check=False, cwd="/"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "none was named. Pass --attention-backend=NAME"),
        (("--attention-backend=nowhere",), "there is no attention backend 'nowhere'"),
        (("--attention-backend=torch", "--attention-device=tpu"), "device 'tpu' was asked for"),
        (("--attention-backend=torch", "--waive=batch"), "waived without a reason"),
    ],
)
def test_pytest_without_a_backend_is_a_usage_error(arguments: tuple[str, ...], said: str) -> None:
    done = pytest_run(*arguments)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert said in done.stderr


def test_pytest_judges_a_backend_and_shows_waivers() -> None:
    done = pytest_run(
        *("--attention-backend=torch", "--attention-quick", "--waive=order=known, see #7"),
        *("-k", "rerun or order or window"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed, 2 skipped" in done.stdout
    assert "waived: known, see #7" in done.stdout
    assert "not declared: sliding_window" in done.stdout
    assert "conformance of torch" in done.stdout
    assert "; 1 waived" in done.stdout
