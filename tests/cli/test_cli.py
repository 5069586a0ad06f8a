from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from isobit.cli.main import _VERBS

RANDOM = ["--model", "tiny-llama", "--load-format", "random"]


def run(*args: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "isobit.cli.main", *args],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("args", [["--help"], *([verb, "--help"] for verb in sorted(_VERBS))])
def test_help_does_not_import_torch(args: list[str]) -> None:
    program = (
        "import sys\n"
        "from isobit.cli.main import main\n"
        f"sys.argv = ['isobit', *{args!r}]\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    code = end.code\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    if len(args) == 1:
        assert all(verb in done.stdout for verb in _VERBS)
    else:
        assert "Example: isobit" in done.stdout


def test_version() -> None:
    assert run("--version").stdout.startswith("isobit, version 0.")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generat"], "No such command"),
        (["generate", "--tempreature", "1", "hi"], "No such option"),
        (["generate", "--temperature", "-1", "hi"], "temperature"),
        (["generate", "--model", "nowhere", "hi"], "unknown model"),
        (["generate", "--attention-backend", "tritn", *RANDOM, "hi"], "tritn"),
        (["generate", "--attention-backend", "torch", "--cuda-graph", *RANDOM, "hi"], "cuda_graph"),
        (["verify", "--threads", "0", *RANDOM], "--threads"),
        (["verify", "--test-mode", "triple"], "triple"),
        (["verify", "--test-mode", "single", "--n-trials", "0", *RANDOM], "n_trials"),
    ],
)
def test_usage_errors_exit_2(args: list[str], message: str) -> None:
    done = run(*args)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_generate_json_is_the_same_alone_and_together() -> None:
    questions = ["What is the capital of France?", "Name two colours."]
    args = ["--json", "--max-tokens", "8", "--temperature", "0.7", "--logprobs", "1"]
    together = run("generate", *args, *questions)
    assert together.returncode == 0, together.stderr
    rows = [json.loads(line) for line in together.stdout.splitlines()]
    assert [row["prompt"] for row in rows] == questions
    alone = run("generate", *args, stdin=questions[1] + "\n")
    (row,) = [json.loads(line) for line in alone.stdout.splitlines()]
    assert row["outputs"] == rows[1]["outputs"]
    assert row["fingerprint"] == rows[1]["fingerprint"]
    assert row["outputs"][0]["finish_reason"] in ("stop", "length")


def test_generate_streams_an_answer() -> None:
    done = run("generate", "What is the capital of France?", "--max-tokens", "12", "--report")
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "fingerprint" in done.stderr


def test_generate_without_a_prompt() -> None:
    done = run("generate", stdin="")
    assert done.returncode == 2
    assert "no prompt" in done.stderr


def test_backends_table_and_json() -> None:
    plain = run("backends")
    assert plain.returncode == 0, plain.stderr
    assert "torch" in plain.stdout
    assert "radix_cache" in plain.stdout
    rows = json.loads(run("backends", "--json").stdout)
    assert "torch" in [row["backend"] for row in rows["backends"]]


def test_backends_explain_judges_the_options() -> None:
    good = run("backends", "--explain", *RANDOM)
    assert "taken: torch" in good.stdout
    bad = json.loads(run("backends", "--explain", "--cuda-graph", "--json", *RANDOM).stdout)
    (row,) = [row for row in bad["backends"] if row["backend"] == "torch"]
    assert [refusal["rule"] for refusal in row["refusals"]] == ["cuda_graph"]
    assert bad["taken"].startswith("none is taken")


@pytest.mark.parametrize("mode", ["single", "prefix", "radix_cache"])
def test_verify_modes(mode: str) -> None:
    done = run(
        "verify",
        "--test-mode",
        mode,
        "--n-trials",
        "2",
        "--max-new-tokens",
        "2",
        "--temperature",
        "0.5",
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines
    assert all(line.endswith(("Unique samples: 1", "Unique samples: 0")) for line in lines)
    assert any("Total samples: " in line and "Unique samples: 1" in line for line in lines)


def test_verify_exits_1_when_something_differs() -> None:
    done = run("verify", "--quick", "--no-deterministic-inference", *RANDOM, "--json")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    if torch.backends.mkl.is_available():
        assert not all(row["holds"] for row in rows)
    assert done.returncode == (0 if all(row["holds"] for row in rows) else 1)
    table = run("verify", "--quick", *RANDOM)
    assert table.returncode == 0, table.stdout + table.stderr
    assert table.stdout.count("holds") == len(rows)
