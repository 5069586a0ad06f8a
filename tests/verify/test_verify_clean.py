"""The proofs hold on real and random models, at one and two threads."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from isobit import LLM
from isobit.verify.judge import INVARIANCES, judge_all
from isobit.verify.restart import RestartSpec
from isobit.verify.workload import make_cases

LENGTHS = (1, 15, 16, 17, 63, 130, 300)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize(
    ("shape", "dtype"), [("tiny-qwen3", "bfloat16"), ("tiny-llama", "float32")]
)
def test_random_models(shape: str, dtype: str, kernels: str, threads: int) -> None:
    torch.set_num_threads(threads)
    options = {"model": shape, "load_format": "random", "dtype": dtype, "kernels": kernels}
    lengths = LENGTHS if kernels == "native" else LENGTHS[:5]
    with LLM(**options) as llm:  # type: ignore[arg-type]
        cases = make_cases(
            None,
            llm.engine.vocab_size,
            lengths,
            max_new_tokens=6,
            temperature=0.0,
            sampling_seed=None,
        )
        verdicts = list(judge_all(llm.engine, cases, RestartSpec(options, threads)))
    assert [verdict.invariance for verdict in verdicts] == list(INVARIANCES)
    assert [v.failure for v in verdicts if not v.holds] == []
    assert all(v.runs > 0 and v.distinct == 1 for v in verdicts)


@pytest.mark.parametrize("threads", [1, 2])
def test_smollm2_command(threads: int, request: pytest.FixtureRequest) -> None:
    """The command that the README shows, on the real model; with one thread only if asked."""
    if threads == 1 and not request.config.getoption("--long"):
        pytest.skip("takes a minute; pass --long")
    command = ["verify", "--quick", "--json", "--threads", str(threads)]
    done = subprocess.run(
        [sys.executable, "-m", "isobit.cli.main", *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr + done.stdout
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["invariance"] for row in rows] == list(INVARIANCES)
    assert all(row["holds"] and row["distinct"] == 1 for row in rows)
