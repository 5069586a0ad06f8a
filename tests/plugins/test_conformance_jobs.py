"""The suite in several processes: the outcomes of one process, also where a process dies."""

from __future__ import annotations

import importlib
import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType

import pytest
from click.testing import CliRunner

from isobit.cli.main import main
from isobit.errors import ConfigError
from isobit.plugins.conformance.proof import Proof, make_proof
from isobit.plugins.conformance.subject import find_subject
from isobit.plugins.conformance.suite import (
    JudgeChecks,
    Outcome,
    judge_here,
    make_context,
    run_suite,
)
from isobit.plugins.conformance.workers import Processes
from isobit.plugins.manager import PluginHost

# The processes import it by name, so it is a file on the path and not this test.
HOSTS = '''
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

from isobit.plugins import hookimpl
from isobit.plugins.conformance.mutants.catalogue import RIGHT, candidates
from isobit.plugins.conformance.mutants.right import RightAttention
from isobit.plugins.discovery import Candidate
from isobit.plugins.manager import PluginHost


class Dies(RightAttention):
    """Dies with six query heads over three KV heads; with six over one it is only wrong."""

    def __init__(self, config):
        super().__init__(config)
        self.heads = (config.num_q_heads, config.num_kv_heads)

    def run(self, q, k, v, cache, plan, out):
        super().run(q, k, v, cache, plan, out)
        if self.heads == (6, 3):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.heads == (6, 1):
            out.zero_()


def mutants():
    return PluginHost(candidates=candidates(), strict_plugins=True)


def dying():
    spec = replace(RIGHT, name="dies", factory="conformance_hosts:Dies")
    plugin = SimpleNamespace(isobit_attention_backends=hookimpl(lambda: [spec]))
    return PluginHost(candidates=[Candidate("dies", "any", "1.0", "", lambda: plugin)])


def unready():
    os._exit(3)
'''


@pytest.fixture
def hosts(tmp_path, monkeypatch) -> ModuleType:
    (tmp_path / "conformance_hosts.py").write_text(HOSTS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(importlib.sys.modules, "conformance_hosts", raising=False)
    return importlib.import_module("conformance_hosts")


def judged(
    name: str, make_host: Callable[[], PluginHost], judge: JudgeChecks, only: Sequence[str]
) -> tuple[list[Outcome], Proof]:
    """The outcomes and their proof, without the seconds."""
    context = make_context(find_subject(name, make_host()), "cpu", quick=True)
    found = run_suite(context, waivers={"long": "slow"}, only=only, judge=judge)
    outcomes = [replace(outcome, seconds=0.0) for outcome in found]
    return outcomes, make_proof(context, outcomes, command="the command")


def test_two_processes_give_what_one_gives(hosts: ModuleType) -> None:
    """Of checks that pass, with trials and without, of one that fails and of one that is waived."""
    name, only = "mutant-groups-of-eight", ["refused", "groups", "long", "layers", "unwritten"]
    serial, proof = judged(name, hosts.mutants, judge_here, only)
    assert [o.status for o in serial] == ["passed", "failed", "waived", "passed", "passed"]
    assert (len(serial[1].findings) > 2, bool(serial[1].snippet)) == (True, True)
    assert judged(name, hosts.mutants, Processes(2, hosts.mutants), only) == (serial, proof)
    right, other = judged("mutant-none", hosts.mutants, judge_here, only[1:2])
    assert (right, other) != (serial[1:2], proof)  # the comparison tells backends apart


def test_a_process_that_dies_fails_its_check_with_the_trial(hosts: ModuleType) -> None:
    only = ["groups", "layers"]
    (groups, layers), _ = judged("dies", hosts.dying, Processes(2, hosts.dying), only)
    assert groups.status == "failed"
    assert groups.findings[-1].label == "float32, 6 query over 3 KV heads"
    assert groups.reason.endswith("the process that judged it was killed by SIGKILL")
    assert "num_q_heads=6, num_kv_heads=3" in " ".join(groups.snippet.split())
    assert layers.status == "passed"
    assert not multiprocessing.active_children()


def test_a_process_that_cannot_start_is_a_users_error(hosts: ModuleType) -> None:
    with pytest.raises(ConfigError, match=r"exit status 3 .* before its first trial"):
        judged("mutant-none", hosts.mutants, Processes(1, hosts.unready), ["layers"])


def test_a_run_that_is_left_ends_its_processes(hosts: ModuleType) -> None:
    context = make_context(find_subject("mutant-none", hosts.mutants()), "cpu", quick=True)
    outcomes = run_suite(
        context, only=["generators", "reference"], judge=Processes(1, hosts.mutants)
    )
    assert next(outcomes).status == "passed"
    assert multiprocessing.active_children()
    outcomes.close()
    assert not multiprocessing.active_children()


def test_jobs_of_the_command_line() -> None:
    judged = ("plugins", "test", "torch", "--device", "cpu", "--quick", "--check", "rerun")
    done = CliRunner().invoke(main, [*judged, "--jobs", "2"], prog_name="isobit")
    assert done.exit_code == 0, done.output
    assert "rerun        passed       8 trials" in done.output
    refused = CliRunner().invoke(main, ["backends", "--jobs", "2"], prog_name="isobit")
    assert refused.exit_code == 2
    assert "--jobs is for --prove" in refused.stderr
