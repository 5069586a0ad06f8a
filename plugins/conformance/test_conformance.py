"""The suite as pytest runs it: ``pytest --pyargs isobit.plugins.conformance``; a test a check."""

from __future__ import annotations

import pytest

# Absolute, as pytest may import this file under another name.
from isobit.plugins.conformance.pytest_plugin import CHOSEN, OUTCOMES
from isobit.plugins.conformance.registry import CHECKS
from isobit.plugins.conformance.suite import run_check
from isobit.plugins.conformance.text import failures


@pytest.mark.parametrize("name", [check.name for check in CHECKS])
def test_conformance(name: str, pytestconfig: pytest.Config) -> None:
    context, waivers = pytestconfig.stash[CHOSEN]
    check = next(check for check in CHECKS if check.name == name)
    outcome = run_check(check, context, waivers)
    pytestconfig.stash[OUTCOMES].append(outcome)
    if outcome.status == "failed":
        pytest.fail(failures([outcome]), pytrace=False)
    if outcome.status != "passed":
        pytest.skip(f"{outcome.status}: {outcome.reason}")
