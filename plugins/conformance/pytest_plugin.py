"""The suite's options for pytest, its verdict at the end of a run. Importing this is cheap."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .suite import Outcome

MODULE = "test_conformance.py"
OUTCOMES: pytest.StashKey[list[Outcome]] = pytest.StashKey()
CHOSEN: pytest.StashKey[Any] = pytest.StashKey()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("isobit", "Isobit: the conformance suite of attention backends")
    group.addoption("--attention-backend", metavar="NAME", help="The backend to judge.")
    group.addoption("--attention-device", metavar="DEVICE", help="cpu or cuda; default: chosen.")
    group.addoption("--attention-quick", action="store_true", help="Shorter sequences.")
    group.addoption(
        "--waive",
        action="append",
        default=[],
        metavar="CHECK=REASON",
        help="Do not run a check; the report shows the reason. Repeatable.",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[OUTCOMES] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The suite without a backend, or with one that cannot be had, is a usage error."""
    if any(item.path.name == MODULE and "conformance" in item.path.parts for item in items):
        _choose(config)
    elif config.getoption("--attention-backend"):
        raise pytest.UsageError(
            "--attention-backend was given, but the suite is not among the tests. Add: --pyargs "
            "isobit.plugins.conformance"
        )


def _choose(config: pytest.Config) -> None:
    """Find what is to be judged before any test runs."""
    name = config.getoption("--attention-backend")
    if not name:
        raise pytest.UsageError(
            "the conformance suite judges one backend, and none was named. Pass "
            "--attention-backend=NAME; isobit backends lists the names."
        )
    from ...errors import ConfigError
    from ..manager import PluginHost
    from .subject import choose_device, find_subject
    from .suite import make_context
    from .waivers import parse_waivers

    try:
        waivers = parse_waivers(config.getoption("--waive"))
        subject = find_subject(name, PluginHost())
        device = choose_device(subject.spec, config.getoption("--attention-device"))
    except ConfigError as error:
        raise pytest.UsageError(str(error)) from error
    context = make_context(subject, device, quick=config.getoption("--attention-quick"))
    config.stash[CHOSEN] = (context, waivers)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    outcomes = config.stash[OUTCOMES]
    if not outcomes:
        return
    from .proof import make_proof
    from .text import proof_table, verdict

    context, _ = config.stash[CHOSEN]
    seconds = sum(outcome.seconds for outcome in outcomes)
    proof = make_proof(context, outcomes, command="pytest", seconds=seconds)
    terminalreporter.section(f"conformance of {proof.backend}")
    terminalreporter.write_line(proof_table(proof))
    terminalreporter.write_line("")
    terminalreporter.write_line(verdict(proof))
