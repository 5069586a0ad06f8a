"""Reports to look at: one of an engine that is broken on purpose, one of a made-up matrix."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from isobit import LLM
from isobit.backends.table import matrix_rows
from isobit.plugins.manager import PluginHost
from isobit.verify.judge import Verdict, judge_all
from isobit.verify.page import CELLS, verify_page
from isobit.verify.workload import make_cases

Failing = tuple[str, dict[str, Verdict]]


class BatchVariant:
    """A linear whose result depends on how many rows it is given."""

    def __init__(self, linear: Any) -> None:
        self.linear = linear

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x)
        return out * (1 + 2**-10) if len(x) > 8 else out


@pytest.fixture(scope="session")
def failing() -> Failing:
    """The page of an engine with a broken linear in layer 2, and the verdicts in it."""
    with LLM("tiny-qwen3", load_format="random") as llm:
        layer = llm.engine.runner.decoder.layers[2]
        layer.down_proj = BatchVariant(layer.down_proj)  # type: ignore[assignment]
        cases = make_cases(
            None,
            llm.engine.vocab_size,
            (1, 16, 17, 40),
            max_new_tokens=4,
            temperature=0,
            sampling_seed=None,
        )
        verdicts = list(judge_all(llm.engine, cases, None))
        page = verify_page(llm.report, command="isobit verify", verdicts=verdicts)
    return page, {verdict.invariance: verdict for verdict in verdicts}


@pytest.fixture
def matrix_sample() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and proofs of two backends; the second one's has every verdict and status."""
    row = matrix_rows(PluginHost())[0]
    other = row | {"backend": "other", "distribution": "isobit-other", "devices": ["cuda"]}
    good = dict.fromkeys(CELLS, _cell("proved"))
    mixed = good | {
        "chunk_invariant": _cell("failed", "other bits in chunks of 17"),
        "page_sizes": _cell("waived", "too slow here"),
        "alignment": _cell("unproved", "no check"),
        "cuda_graph": _cell("not declared", ""),
    }
    statuses = ("passed", "failed", "waived", "not declared", "not here")
    checks = [_check(f"check_{i}", status) for i, status in enumerate(statuses)]
    return [row, other], [_proof(row["backend"], good, checks[:1]), _proof("other", mixed, checks)]


def _cell(verdict: str, why: str = "") -> dict[str, Any]:
    return {"declared": "yes", "verdict": verdict, "trials": 1200, "why": why}


def _check(name: str, status: str) -> dict[str, Any]:
    return {
        "check": name,
        "what": "The same bits in any batch.",
        "status": status,
        "trials": 1200,
        "seconds": 1.5,
        "reason": "row 20 differs in 3 of 64 values" if status == "failed" else "",
        "snippet": f"replay('other', check={name!r}, seed=17) # <b>",
    }


def _proof(backend: str, cells: dict[str, Any], checks: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "backend": backend,
        "distribution": "isobit",
        "version": "0.1.0",
        "device": "a processor",
        "device_type": "cpu",
        "versions": {"isobit": "0.1.0", "torch": "2.13.0"},
        "date": "2026-11-22 04:00 UTC",
        "command": f"isobit backends --prove --attention-backend {backend}",
        "seconds": 48.2,
        "cells": cells,
        "checks": checks,
    }
