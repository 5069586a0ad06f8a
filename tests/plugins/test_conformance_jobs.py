"""The suite in several processes: the outcomes of one process, also where a process dies."""

from __future__ import annotations

import importlib
import multiprocessing
import time
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
import time
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


FAULTS = []


class Faults(RightAttention):
    """Six query heads over three KV heads break the device: all that the process runs is wrong."""

    def run(self, q, k, v, cache, plan, out):
        super().run(q, k, v, cache, plan, out)
        if (self.config.num_q_heads, self.config.num_kv_heads) == (6, 3):
            FAULTS.append(self)
        if FAULTS:
            out.zero_()


def probe():
    if FAULTS:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


class LeavesAChild(RightAttention):
    """Forks a process that holds the pipes open, and dies."""

    def run(self, q, k, v, cache, plan, out):
        if os.fork() == 0:
            time.sleep(40)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)


def mutants():
    return PluginHost(candidates=candidates(), strict_plugins=True)


def dying():
    named = {"dies": "Dies", "faults": "Faults", "leaves-a-child": "LeavesAChild"}
    specs = [replace(RIGHT, name=n, factory=f"conformance_hosts:{c}") for n, c in named.items()]
    plugin = SimpleNamespace(isobit_attention_backends=hookimpl(lambda: specs))
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
    name: str,
    make_host: Callable[[], PluginHost],
    judge: JudgeChecks,
    only: Sequence[str],
    probe: Callable[[], None] | None = None,
) -> tuple[list[Outcome], Proof]:
    """The outcomes and their proof, without the seconds."""
    context = make_context(find_subject(name, make_host()), "cpu", quick=True, probe=probe)
    found = run_suite(context, waivers={"long": "slow"}, only=only, judge=judge)
    outcomes = [replace(outcome, seconds=0.0) for outcome in found]
    return outcomes, make_proof(context, outcomes, command="the command", seconds=0.0)


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


FAULT = "float32, 6 query over 3 KV heads"


def told_of_the_fault(groups: Outcome) -> None:
    """The trial that broke the device is printed as it was, not made small."""
    assert (groups.status, groups.findings[-1].label) == ("failed", FAULT)
    assert groups.reason.endswith("(the device was left unusable)")
    assert groups.snippet.count("Sequence(length=") == 3


def test_a_fault_of_the_device_fails_what_follows_it_unjudged(hosts: ModuleType) -> None:
    only = ["generators", "groups", "layers", "rerun"]
    found, proof = judged("faults", hosts.dying, judge_here, only, hosts.probe)
    told_of_the_fault(found[1])
    assert len(set(hosts.FAULTS)) == 1  # nothing smaller was run
    assert [o.status for o in found] == ["passed", "failed", "failed", "failed"]
    for after in found[2:]:
        lost = f"not judged: the device was left unusable by groups: {FAULT}"
        assert (after.reason, after.snippet) == (f"every trial: {lost}", "")
    assert proof.cells["deterministic"].verdict == "failed"


def test_what_was_lost_before_the_suite_is_not_blamed_on_it(hosts: ModuleType) -> None:
    hosts.FAULTS.append("of another backend")
    (layers,), _ = judged("mutant-none", hosts.mutants, judge_here, ["layers"], hosts.probe)
    assert layers.reason.endswith("the device was left unusable by what this process ran before")


def test_without_the_probe_the_fault_is_told_of_innocent_trials(hosts: ModuleType) -> None:
    (groups, layers), _ = judged("faults", hosts.dying, judge_here, ["groups", "layers"])
    assert groups.snippet.count("Sequence(length=") == 1  # made small, on a broken device
    assert "not judged" not in layers.reason
    assert layers.snippet


def test_a_fault_of_the_device_ends_its_process_alone(hosts: ModuleType) -> None:
    only = ["groups", "layers", "rerun"]
    (groups, *others), _ = judged(
        "faults", hosts.dying, Processes(1, hosts.dying), only, hosts.probe
    )
    told_of_the_fault(groups)
    assert [(o.status, o.reason) for o in others] == [("passed", "")] * 2
    assert not multiprocessing.active_children()


def test_a_process_that_dies_is_missed_though_its_child_lives(hosts: ModuleType) -> None:
    began = time.monotonic()
    (layers,), _ = judged("leaves-a-child", hosts.dying, Processes(1, hosts.dying), ["layers"])
    assert layers.reason.endswith("the process that judged it was killed by SIGKILL")
    assert time.monotonic() - began < 30


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
