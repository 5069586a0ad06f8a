"""Loading the class that a spec names, and what is said when it cannot be."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import pytest

from isobit.backends.base import AttentionBackend
from isobit.backends.capabilities import Capabilities, Conditional, Supported, Unsupported
from isobit.backends.matrix import load_factory
from isobit.errors import ConfigError


class Complete(AttentionBackend):
    def plan(self, batch):
        return batch

    def run(self, q, k, v, layer, plan, out):
        out.copy_(q)


class Captured(Complete):
    def capture(self, max_num_seqs):
        pass

    def replay(self, plan, batch):
        pass


class Written(Complete):
    def run_written(self, q, layer, plan, out):
        out.copy_(q)


class Reshaped(Written):
    def kv_cache_shape(self, num_pages):
        return (num_pages, 1)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> str:
    made = ModuleType("toy_factories")
    made.Complete, made.Written, made.Reshaped = Complete, Written, Reshaped
    made.Captured = Captured
    made.Incomplete = type("Incomplete", (AttentionBackend,), {"plan": Complete.plan})
    made.Stranger = dict
    made.function = Complete.plan
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made.__name__


def test_a_factory_is_loaded(make_spec, module):
    assert load_factory(make_spec(factory=f"{module}:Captured")) is Captured


@pytest.mark.parametrize(
    ("cell", "missing"),
    [
        (Supported(), "does not implement capture, replay. Mend"),
        (Conditional("short ones"), "does not implement capture, replay. Mend"),
        (Unsupported("no"), None),
        (None, None),
    ],
)
def test_a_graph_that_is_declared_can_be_captured(make_spec, module, cell, missing):
    features = {"cuda_graph": cell} if cell else {}
    spec = make_spec(factory=f"{module}:Complete", features=features)
    if missing is None:
        assert load_factory(spec) is Complete
        return
    with pytest.raises(ConfigError, match=missing):
        load_factory(spec)


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("toy_factories", "not of the form 'package.module:Class'"),
        ("toy_factories:", "not of the form"),
        ("surely_missing:Toy", "cannot be imported: ModuleNotFoundError.*pip install toy"),
        ("toy_factories:Missing", "toy_factories has no Missing"),
        ("toy_factories:Stranger", "no subclass of AttentionBackend"),
        ("toy_factories:function", "no subclass of AttentionBackend"),
        ("toy_factories:Incomplete", "does not implement run"),
    ],
)
def test_a_factory_that_cannot_be_used_says_so(make_spec, module, factory, said):
    with pytest.raises(ConfigError, match=said):
        load_factory(make_spec(factory=factory, install="pip install toy", features={}))


def test_what_must_be_there_follows_from_who_writes_the_cache(make_spec, module):
    written = Capabilities(dtypes={"float32"}, devices={"cpu"}, engine_writes_kv=True)

    def load(name, **declared):
        return load_factory(replace(make_spec(factory=f"{module}:{name}", features={}), **declared))

    assert load("Written", capabilities=written) is Written
    assert load("Reshaped") is Reshaped
    with pytest.raises(ConfigError, match="does not implement run_written"):
        load("Complete", capabilities=written)
    with pytest.raises(ConfigError, match="a kv_cache_shape of its own, and declares engine_wri"):
        load("Reshaped", capabilities=written)


def test_a_factory_module_that_exits_is_a_config_error(make_spec, tmp_path, monkeypatch):
    (tmp_path / "exiting_factory.py").write_text("raise SystemExit('no GPU')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="SystemExit: no GPU"):
        load_factory(make_spec(factory="exiting_factory:Toy"))
