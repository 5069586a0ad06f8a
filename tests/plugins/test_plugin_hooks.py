"""What authors import, and that every hook says what it is for."""

from __future__ import annotations

import inspect
import tomllib
from pathlib import Path

import pytest

import isobit.plugins
from isobit.plugins import hookspecs
from isobit.plugins.admission import known_hooks
from isobit.plugins.discovery import BUILT_IN, GROUP

ROOT = Path(isobit.plugins.__file__).parents[1]


def test_the_hooks_are_the_documented_two():
    assert known_hooks() == ["isobit_attention_backends", "isobit_check"]


@pytest.mark.parametrize("name", known_hooks())
def test_every_hook_documents_its_arguments_and_its_answer(name: str):
    hook = getattr(hookspecs, name)
    doc = inspect.getdoc(hook)
    assert doc
    for argument in inspect.signature(hook).parameters:
        assert f":param {argument}:" in doc
    assert ":returns:" in doc


@pytest.mark.parametrize("name", known_hooks())
def test_every_hook_is_typed_and_does_nothing_by_itself(name: str):
    hook = getattr(hookspecs, name)
    signature = inspect.signature(hook)
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(p.annotation is not p.empty for p in signature.parameters.values())
    assert hook(*[None for _ in signature.parameters]) == ()


def test_everything_that_authors_need_can_be_imported():
    for name in isobit.plugins.__all__:
        assert getattr(isobit.plugins, name) is not None
        assert name in dir(isobit.plugins)
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = isobit.plugins.Nonsense


def test_only_the_contract_classes_import_torch(site):
    program = (
        "import sys, isobit.plugins, isobit.plugins.manager, isobit.backends.torch\n"
        "import isobit.backends.matrix, isobit.backends.table\n"
        "isobit.plugins.manager.PluginHost()\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "from isobit.plugins import AttentionBackend\n"
        "assert 'torch' in sys.modules\n"
    )
    done = site.python(program)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not (ROOT / "pyproject.toml").exists(), reason="needs the source tree")
def test_the_built_in_plugins_are_the_declared_entry_points():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"][GROUP] == BUILT_IN
