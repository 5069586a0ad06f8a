"""The matrix as rows, text and Markdown."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from isobit.backends.capabilities import FEATURES, Conditional, Supported, Unsupported
from isobit.backends.table import markdown_table, matrix_rows, text_table
from isobit.plugins.manager import PluginHost


@pytest.fixture
def host(make_host, make_spec) -> PluginHost:
    weak = make_spec(
        "weak",
        devices={"cuda"},
        compute_capability=(9, 0),
        head_dims={64, 128},
        requires=("fast-kernels>=2",),
        features={
            "cuda_graph": Conditional("batches up to 512"),
            "radix_cache": Unsupported("a|b"),
            "non_greedy_sampling": Supported(),
        },
    )
    return make_host(weak, make_spec("able"))


def test_rows_are_json_and_sorted(host):
    rows = matrix_rows(host)
    assert json.loads(json.dumps(rows)) == rows
    assert [row["backend"] for row in rows] == ["able", "weak"]
    assert list(rows[0]["features"]) == list(FEATURES)
    weak = rows[1]
    assert weak["features"]["cuda_graph"] == {"state": "conditional", "why": "batches up to 512"}
    assert weak["features"]["sliding_window"] == {"state": "unsupported", "why": "not declared"}
    assert weak["compute_capability"] == [9, 0]
    assert weak["refusals"] is None


def test_rows_for_requirements_say_what_is_refused(host, make_requirements):
    able, weak = matrix_rows(host, make_requirements(features={"radix_cache": True}))
    assert able["refusals"] == []
    assert [r["rule"] for r in weak["refusals"]] == ["requires", "device", "radix_cache"]
    assert set(weak["refusals"][0]) == {"rule", "wanted", "offered", "remedy"}
    assert able["features"]["cuda_graph"]["state"] == "unsupported"


def test_what_no_requirement_string_can_say_is_in_the_table(make_host, make_spec):
    plain, wordy, both = make_spec("a"), make_spec("b"), make_spec("c", requires=("x>=1",))
    wordy, both = (replace(spec, also_requires="an x or a y") for spec in (wordy, both))
    lines = text_table(matrix_rows(make_host(plain, wordy, both))).splitlines()
    (line,) = [line for line in lines if line.startswith("requires")]
    assert re.split(r"\s{2,}", line)[1:] == ["nothing", "an x or a y", "x>=1, an x or a y"]


def test_text_table(host, make_requirements):
    lines = text_table(matrix_rows(host)).splitlines()
    assert lines[0].split() == ["able", "weak"]
    assert "head_dims              any        64, 128" in lines
    assert any(line.startswith("devices") and "compute capability 9.0" in line for line in lines)
    assert any(line.endswith("] weak, cuda_graph: batches up to 512") for line in lines)
    asked = text_table(matrix_rows(host, make_requirements()))
    assert "serves what is asked" in asked
    assert "weak: device: wanted cpu, offered cuda." in asked


def test_markdown_table_is_well_formed(host, make_requirements):
    text = markdown_table(matrix_rows(host, make_requirements()))
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace(r"\|", "").count("|") for line in table} == {4}
    assert table[1] == "| --- | --- | --- |"
    marks = [f"- [{i}] " for i in range(1, text.count("\n- [") + 1)]
    assert marks
    assert all(mark in text for mark in marks)


def test_a_table_of_no_backends_is_still_a_table():
    rows = matrix_rows(PluginHost(candidates=[]))
    assert rows == []
    assert "cuda_graph" in text_table(rows)
    assert markdown_table(rows).startswith("|  |")


def test_the_built_in_backend_holds_everything_on_the_cpu(make_requirements):
    rows = matrix_rows(PluginHost(), make_requirements(dtype="bfloat16"))
    (torch,) = [row for row in rows if row["backend"] == "torch"]
    assert torch["refusals"] == []
    assert torch["distribution"] == "isobit"
    states = {name: cell["state"] for name, cell in torch["features"].items()}
    assert states == {
        "cuda_graph": "unsupported",
        "chunked_prefill": "supported",
        "radix_cache": "supported",
        "non_greedy_sampling": "supported",
        "sliding_window": "unsupported",
        "logit_soft_cap": "unsupported",
    }


def test_the_built_in_backend_holds_everything_on_a_gpu(make_requirements):
    asked = make_requirements(
        dtype="bfloat16",
        device="cuda",
        compute_capability=(9, 0),
        features=dict.fromkeys(FEATURES, True),
    )
    rows = matrix_rows(PluginHost(), asked, installed=lambda name: "3.6.0")
    (triton,) = [row for row in rows if row["backend"] == "triton"]
    assert triton["refusals"] == []
    assert {cell["state"] for cell in triton["features"].values()} == {"supported"}
