"""The host against real distributions, good and broken, each host in a process of its own."""

from __future__ import annotations

import os
from itertools import permutations
from pathlib import Path

import packaging
import pluggy
import pytest

import isobit
from isobit.plugins.discovery import BUILT_IN, discover
from isobit.plugins.manager import PluginHost

ROOT = Path(isobit.__file__).parent
PLUGINS = [candidate.name for candidate in discover()]
"""The built-in ones and those of whatever else is installed here, such as the examples."""
BACKENDS = sorted(PluginHost().backends())


def test_a_good_backend_is_found(site, backend_source):
    site.plugin("good", backend_source("good"), version="2.1")
    report = site.report()
    assert report["by_name"]["good"] == {
        "name": "good",
        "distribution": "good-dist",
        "version": "2.1",
        "hooks": ["isobit_attention_backends"],
        "status": "loaded",
        "reason": "",
    }
    assert report["backends"]["good"] == ["good", "good-dist", "2.1"]
    assert report["backends"]["torch"][1] == "isobit"
    assert report["problems"] == []
    assert not report["torch"]


def test_one_entry_point_name_in_two_distributions_refuses_both(site, backend_source):
    site.add("first", "1.0", {"same": "first_plugin"}, first_plugin=backend_source("first"))
    site.add("second", "2.0", {"same": "second_plugin"}, second_plugin=backend_source("second"))
    report = site.report()
    assert sorted(report["backends"]) == BACKENDS
    rivals = [r for r in report["records"] if r["name"] == "same"]
    assert [r["distribution"] for r in rivals] == ["first", "second"]
    for record in rivals:
        assert record["status"] == "failed"
        assert "'same' is used by first 1.0 and second 2.0" in record["reason"]


def test_one_backend_name_in_two_plugins_serves_neither(site, backend_source):
    site.plugin("one", backend_source("fast"))
    site.plugin("two", backend_source("fast"), version="2.0")
    report = site.report()
    assert sorted(report["backends"]) == BACKENDS
    assert {report["by_name"][name]["status"] for name in ("one", "two")} == {"loaded"}
    (problem,) = report["problems"]
    assert "plugin 'one' of one-dist 1.0 and plugin 'two' of two-dist 2.0" in problem


def test_the_built_in_name_is_contested_like_any_other(site, backend_source):
    site.plugin("impostor", backend_source("torch"))
    report = site.report()
    assert "torch" not in report["backends"]
    assert "plugin 'impostor' of impostor-dist 1.0" in report["problems"][0]
    assert "plugin 'torch' of isobit" in report["problems"][0]


def test_another_api_version_is_refused_with_both_numbers(site, backend_source):
    site.plugin("future", backend_source("future", api=7))
    record = site.report()["by_name"]["future"]
    assert record["status"] == "failed"
    assert "plugin API 7" in record["reason"]
    assert "plugin API 1" in record["reason"]


@pytest.mark.parametrize("way", ["argument", "environment"])
def test_a_disabled_plugin_is_not_even_imported(site, way):
    site.plugin("noisy", "raise KeyboardInterrupt")
    site.plugin("loud", "raise KeyboardInterrupt")
    if way == "argument":
        report = site.report({"disabled": ["noisy", "loud"]})
    else:
        report = site.report(ISOBIT_DISABLE_PLUGINS=" noisy,loud, ")
    assert {report["by_name"][name]["status"] for name in ("noisy", "loud")} == {"disabled"}
    assert report["problems"] == []
    assert sorted(report["backends"]) == BACKENDS


def test_the_built_in_plugin_can_be_disabled_like_any_other(site):
    report = site.report({"disabled": ["torch"]})
    assert "torch" not in report["backends"]
    assert report["by_name"]["torch"]["reason"] == "by configuration"


def test_disabling_a_plugin_that_is_not_there_is_a_problem(site):
    (problem,) = site.report({"disabled": ["torhc"]})["problems"]
    assert problem == "plugin 'torhc' is disabled but not installed. Did you mean 'torch'?"


def test_load_order_is_sorted_whatever_the_path_order(site, backend_source):
    for name in ("charlie", "alpha", "bravo"):
        site.plugin(name, backend_source(name))
    site.add("a-dist", "1.0", {"zulu": "zulu_plugin"}, zulu_plugin=backend_source("zulu"))
    orders = [list(order) for order in permutations(site.folders)][::5]
    reports = [site.report(folders=order) for order in orders]
    names = [record["name"] for record in reports[0]["records"]]
    assert names == sorted([*PLUGINS, "alpha", "bravo", "charlie", "zulu"])
    assert all(report == reports[0] for report in reports)


def test_damaged_metadata_does_not_break_the_host(site, backend_source):
    site.plugin("good", backend_source("good"))
    (metadata,) = site.folders[0].glob("*.dist-info/METADATA")
    metadata.write_text("")
    report = site.report()
    assert report["backends"]["good"] == ["good", "unknown distribution", "unknown version"]


def test_from_a_source_tree_the_built_ins_register_once(site):
    """Without site-packages there is no entry point; the package itself is found by path."""
    bare = site.root / "bare"
    bare.mkdir()
    for package in (pluggy, packaging):
        folder = Path(package.__file__).parent
        os.symlink(folder, bare / folder.name)
    os.symlink(ROOT, bare / "isobit")
    program = (
        "from isobit.plugins.manager import PluginHost\n"
        "host = PluginHost()\n"
        "print([(r.name, r.distribution, r.status) for r in host.records()], host.problems())\n"
    )
    done = site.python(program, options=["-S"], folders=[bare])
    expected = [(name, "isobit", "loaded") for name in sorted(BUILT_IN)]
    assert done.stdout.strip() == f"{expected} []", done.stderr


def test_an_installed_package_registers_its_built_ins_once(site):
    own = [r["name"] for r in site.report()["records"] if r["distribution"] == "isobit"]
    assert own == sorted(BUILT_IN)
