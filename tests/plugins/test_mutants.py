"""The conformance suite passes the right backend and fails every mutant of it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from isobit.backends.matrix import load_factory
from isobit.plugins.conformance.check import Check, Context
from isobit.plugins.conformance.judge import Judge
from isobit.plugins.conformance.mutants.catalogue import (
    MUTANTS,
    RIGHT,
    RIGHT_WRITTEN,
    Mutant,
    candidates,
)
from isobit.plugins.conformance.registry import CHECKS
from isobit.plugins.conformance.scenario import Geometry, Piece, Run, Sequence, Trial
from isobit.plugins.conformance.subject import find_subject
from isobit.plugins.conformance.suite import make_context, run_check, run_suite
from isobit.plugins.conformance.waivers import known_check
from isobit.plugins.manager import PluginHost

MakeContext = Callable[[str], Context]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HERE = [mutant for mutant in MUTANTS if DEVICE in mutant.spec.capabilities.devices]


@pytest.fixture(scope="module")
def context_of() -> MakeContext:
    """What the quick checks of a backend of the catalogue run on."""
    found = candidates()
    host = PluginHost(candidates=found, strict_plugins=True)

    def make(name: str) -> Context:
        return make_context(find_subject(name, host), DEVICE, quick=True)

    return make


@pytest.fixture(scope="module", params=[RIGHT, RIGHT_WRITTEN], ids=["writes", "is written for"])
def right(context_of: MakeContext, request: pytest.FixtureRequest) -> Context:
    """The right backend: in float32, and with ``--long`` in every dtype."""
    subject = context_of(request.param.name).subject
    if not request.config.getoption("--long"):
        capabilities = replace(request.param.capabilities, dtypes={"float32"})
        subject = replace(subject, spec=replace(subject.spec, capabilities=capabilities))
    return make_context(subject, DEVICE, quick=True)


@pytest.mark.parametrize("check", CHECKS, ids=[check.name for check in CHECKS])
def test_the_right_backend_passes(right: Context, check: Check) -> None:
    outcome = run_check(check, right, {})
    elsewhere = check.elsewhere(right.corners)
    expected = ("passed", "") if elsewhere is None else ("not here", elsewhere)
    assert (outcome.status, outcome.reason) == expected


@pytest.mark.parametrize("mutant", HERE, ids=[mutant.name for mutant in HERE])
def test_a_mutant_is_caught_and_its_failure_can_be_repeated(
    context_of: MakeContext, mutant: Mutant
) -> None:
    outcome = run_check(known_check(mutant.caught_by[0]), context_of(mutant.name), {})
    assert outcome.status == "failed"
    assert not re.search("it raised (?!BackendError|NotImplementedError)", outcome.reason)
    assert mutant.spec.factory in outcome.snippet
    with pytest.raises(SystemExit) as ended:
        exec(outcome.snippet, {})
    assert ended.value.code, "a message, so status 1"


def test_no_check_fails_before_the_one_that_is_named(
    context_of: MakeContext, request: pytest.FixtureRequest
) -> None:
    """A check that fails for another's fault would explain nothing."""
    if not request.config.getoption("--long"):
        pytest.skip("takes minutes; pass --long")
    found = {
        mutant.name: next(
            outcome.check.name
            for outcome in run_suite(context_of(mutant.name))
            if outcome.status == "failed"
        )
        for mutant in HERE
    }
    assert found == {mutant.name: mutant.caught_by[0] for mutant in HERE}


@pytest.mark.parametrize(
    "name", ["mutant-causal-off-by-one", "mutant-completion-order", "mutant-captured-grid"]
)
def test_a_snippet_is_a_program_that_exits_with_status_1(
    context_of: MakeContext, name: str
) -> None:
    mutant = next(m for m in MUTANTS if m.name == name)
    outcome = run_check(known_check(mutant.caught_by[0]), context_of(name), {})
    done = subprocess.run(
        [sys.executable, "-c", outcome.snippet], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert re.match(r"position \d+ of sequence \d+: query head", done.stderr)


def test_the_snippet_of_another_backend_holds(context_of: MakeContext) -> None:
    """The trial is at fault with the mutant alone: on the right backend it ends well."""
    outcome = run_check(known_check("reference"), context_of("mutant-causal-off-by-one"), {})
    mutant = "mutants.masks:CausalOffByOne"
    exec(outcome.snippet.replace(mutant, "mutants.right:RightAttention"), {})


def test_what_only_a_gpu_shows_is_no_fault_elsewhere() -> None:
    """On a CPU a step is over before the next is planned."""
    (mutant,) = [m for m in MUTANTS if m.spec.capabilities.devices == {"cuda"}]
    cuts = [0, 1, 15, 40]
    trial = Trial(
        label="in chunks",
        cells=("deterministic",),
        geometry=Geometry(),
        sequences=(Sequence(length=40),),
        run=Run(steps=tuple((Piece(0, start, stop),) for start, stop in pairwise(cuts))),
        against=Run(steps=((Piece(0, 0, 40),),)),
    )
    assert Judge(load_factory(mutant.spec)).judge(trial) is None


def test_every_mutant_says_what_is_wrong_and_is_another_class() -> None:
    assert len({mutant.spec.factory for mutant in MUTANTS}) == len(MUTANTS) >= 18
    for mutant in MUTANTS:
        assert mutant.fault.endswith("."), mutant.name
        assert mutant.seen.startswith("where "), mutant.name
