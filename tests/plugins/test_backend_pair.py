"""A pair of backends: how it is named, what it declares, when it is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from isobit.backends.capabilities import (
    BackendSpec,
    Capabilities,
    Conditional,
    Refusal,
    Supported,
    Unsupported,
)
from isobit.backends.matrix import BackendRefusedError, load_factory, select_backend
from isobit.backends.pair import PairSpec, join, parse_pair
from isobit.backends.rules import refusals
from isobit.cli.main import main
from isobit.cli.prove import prove_all
from isobit.errors import ConfigError
from isobit.plugins.conformance.check import Finding
from isobit.plugins.conformance.mutants.catalogue import MUTANTS, RIGHT_WRITTEN
from isobit.plugins.conformance.subject import Subject
from isobit.plugins.conformance.suite import make_context, run_suite

PAIR = "prefill=one,decode=two"
FEATURES = {"chunked_prefill": Supported(), "radix_cache": Supported()}


def spec(name: str, **changes: object) -> BackendSpec:
    """A backend of a pair; ``changes`` are of its capabilities or, where it has them, its own."""
    own = {k: changes.pop(k) for k in list(changes) if k in BackendSpec.__dataclass_fields__}
    offers = {
        "dtypes": {"float32", "bfloat16"},
        "devices": {"cpu", "cuda"},
        "features": FEATURES,
        "deterministic": True,
        "chunk_invariant": True,
        "decode_equals_prefill": True,
        "engine_writes_kv": True,
    } | changes
    return BackendSpec(
        **({"name": name, "api": 1, "factory": f"nowhere:{name}"} | own),
        capabilities=Capabilities(**offers),
    )


def joined(one: dict[str, object], two: dict[str, object]) -> PairSpec:
    return join(spec("one", **one), spec("two", **two))


@pytest.mark.parametrize("text", [PAIR, "decode=two,prefill=one", " prefill = one , decode = two "])
def test_a_pair_is_named_in_any_order(make_host, text):
    assert parse_pair(text) == ("one", "two")
    assert make_host(spec("one"), spec("two")).require(text).spec.name == PAIR


def test_a_single_name_is_no_pair():
    assert parse_pair("one") is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prefill=one", "names no backend for decode. Pass a backend's name, or prefill=NAME,dec"),
        ("prefill=one,decode=", "names no backend for decode"),
        ("=", "'' is no phase"),
        ("prefil=one,decode=two", "'prefil' is no phase. Did you mean 'prefill'"),
        ("prefill=one,decode=two,", "'' is no phase"),
        ("prefill=one,prefill=two", "names two backends for prefill"),
        ("prefill=one,decode=one", "both phases name 'one'. Pass 'one' alone"),
        ("prefill=oen,decode=two", "no attention backend 'oen'; there are one, two. Did you mean"),
        ("prefill=auto,decode=two", "no attention backend 'auto'"),
    ],
)
def test_what_names_no_pair_is_refused(make_host, make_requirements, text, said):
    with pytest.raises(ConfigError, match=said):
        select_backend(text, make_requirements(), make_host(spec("one"), spec("two")))


def test_a_pair_comes_from_where_the_two_come(make_host):
    pair = make_host(spec("one"), spec("two")).require(PAIR)
    assert (pair.plugin, pair.distribution) == ("plugin0 and plugin1", "dist0 and dist1")
    assert pair.version == "1.0"
    both = make_host([spec("one"), spec("two")]).require(PAIR)
    assert (both.plugin, both.distribution, both.version) == ("plugin0", "dist0", "1.0")


def test_auto_takes_no_pair(make_host, make_requirements):
    host = make_host(spec("one"), spec("two"))
    assert select_backend("auto", make_requirements(), host).spec.name == "one"
    assert host.backends().keys() == {"one", "two"}
    assert "taken by name only" in joined({}, {}).unproved


@pytest.mark.parametrize(
    ("one", "two", "both"),
    [
        ({"dtypes": {"float32", "float16"}}, {}, {"dtypes": {"float32"}}),
        ({"devices": {"cpu"}}, {}, {"devices": {"cpu"}}),
        ({"head_dims": {64, 128}}, {"head_dims": {128}}, {"head_dims": {128}}),
        ({"head_dims": {64}}, {"page_sizes": {16}}, {"head_dims": {64}, "page_sizes": {16}}),
        ({}, {}, {"head_dims": None, "page_sizes": None, "compute_capability": None}),
        ({"compute_capability": (8, 0)}, {"compute_capability": (9, 0)},
         {"compute_capability": (9, 0), "highest_compute_capability": None}),
        ({"compute_capability": (8, 0), "highest_compute_capability": (10, 0)},
         {"highest_compute_capability": (9, 0)},
         {"compute_capability": (8, 0), "highest_compute_capability": (9, 0)}),
        ({"compute_capability": (9, 0)}, {"devices": {"cpu"}, "highest_compute_capability": (8, 0)},
         {"devices": {"cpu"}, "compute_capability": None, "highest_compute_capability": None}),
        ({"compute_capability": (10, 0)}, {"highest_compute_capability": (9, 0)},
         {"devices": {"cpu"}, "compute_capability": None, "highest_compute_capability": None}),
        ({}, {}, {"deterministic": True, "decode_equals_prefill": False, "engine_writes_kv": True}),
        ({}, {"deterministic": False}, {"deterministic": False}),
        ({"chunk_invariant": False, "alignment": 64}, {"alignment": 32},
         {"chunk_invariant": False, "alignment": 64}),
        ({"alignment": 2}, {"chunk_invariant": False, "alignment": 32},
         {"chunk_invariant": True, "alignment": 2}),
    ],
)  # fmt: skip
def test_what_holds_of_both(one, two, both):
    offers = joined(one, two).capabilities
    assert {name: getattr(offers, name) for name in both} == both


HELD = (Supported(), Conditional("short"), Unsupported("slow"))


@pytest.mark.parametrize("one", HELD)
@pytest.mark.parametrize("two", HELD)
def test_the_features_that_hold_of_both(one, two):
    features = ("cuda_graph", "chunked_prefill", "radix_cache", "sliding_window")
    pair = joined(
        {"features": dict.fromkeys(features, one)}, {"features": dict.fromkeys(features, two)}
    )
    cells = pair.capabilities.features
    assert type(cells["cuda_graph"]) is type(two)
    assert type(cells["chunked_prefill"]) is type(one)
    for feature in features[2:]:
        assert type(cells[feature]) is max((type(one), type(two)), key=list(map(type, HELD)).index)
    text = str(cells["sliding_window"])
    assert ("one: slow" in text, "two: slow" in text) == (one is HELD[2], two is HELD[2])
    assert cells["logit_soft_cap"] == Unsupported("one: not declared; two: not declared")


def test_what_both_need_is_needed():
    pair = joined(
        {"requires": ("a>=1", "b"), "also_requires": "a flash library", "unproved": "no run yet"},
        {"requires": ("b", "c"), "install": "pip install 'b' 'c'", "self_check": True},
    )
    assert pair.requires == ("a>=1", "b", "c")
    assert pair.also_requires == "a flash library"
    assert pair.install == "pip install 'a>=1' 'b' && pip install 'b' 'c'"
    assert pair.self_check
    assert pair.unproved.endswith("one: no run yet")


@pytest.mark.parametrize(
    ("one", "two", "said"),
    [
        ({"dtypes": {"float32"}}, {"dtypes": {"float16"}},
         "dtypes: one offers float32, two float16"),
        ({"devices": {"cpu"}}, {"devices": {"cuda"}}, "devices: one offers cpu, two cuda"),
        ({"head_dims": {8}}, {"head_dims": {16, 32}}, "head_dims: one offers 8, two 16, 32"),
        ({"page_sizes": {8}}, {"page_sizes": {16}}, "page_sizes: one offers 8, two 16"),
        ({"devices": {"cuda"}, "compute_capability": (10, 0)},
         {"highest_compute_capability": (9, 0)},
         "compute_capability: one offers 10.0 and up, two up to 9.0"),
        ({}, {"engine_writes_kv": False}, "two writes its KV cache itself"),
    ],
)  # fmt: skip
def test_two_that_share_nothing_are_refused(one, two, said):
    with pytest.raises(ConfigError, match=rf"(?s)'one' and 'two' cannot be a pair:.*{said}.*Pass"):
        joined(one, two)


def test_every_reason_is_listed():
    with pytest.raises(ConfigError) as caught:
        joined({"dtypes": {"float32"}, "engine_writes_kv": False}, {"dtypes": {"float16"}})
    assert str(caught.value).count("\n- ") == 2


capabilities = st.fixed_dictionaries(
    {
        "dtypes": st.sets(st.sampled_from(("float32", "bfloat16", "float16")), min_size=1),
        "devices": st.sets(st.sampled_from(("cpu", "cuda")), min_size=1),
        "head_dims": st.none() | st.sets(st.sampled_from((16, 64, 128)), min_size=1),
        "page_sizes": st.none() | st.sets(st.sampled_from((8, 16, 32)), min_size=1),
        "compute_capability": st.sampled_from((None, (8, 0), (9, 0), (10, 0))),
        "highest_compute_capability": st.sampled_from((None, (9, 0), (10, 0))),
        "deterministic": st.booleans(),
        "engine_writes_kv": st.sampled_from((True, True, True, False)),
    }
)
asked = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(("float32", "bfloat16", "float16")),
        "device": st.sampled_from(("cpu", "cuda")),
        "head_dim": st.sampled_from((16, 64, 128)),
        "page_size": st.sampled_from((8, 16, 32)),
        "compute_capability": st.sampled_from(((8, 0), (9, 0), (10, 0))),
        "deterministic": st.booleans(),
    }
)


@given(one=capabilities, two=capabilities, wanted=asked)
def test_a_pair_serves_what_both_serve_and_no_more(make_requirements, one, two, wanted):
    requirements = make_requirements(**wanted)
    both = [spec("one", **one), spec("two", **two)]
    each = not any(refusals(requirements, part) for part in both)
    written = all(part.capabilities.engine_writes_kv for part in both)
    try:
        pair = join(*both)
    except ConfigError:
        assert not (each and written)
    else:
        assert (not refusals(requirements, pair)) == each


def test_the_matrix_refuses_a_pair_as_any_backend(make_host, make_requirements):
    host = make_host(spec("one", dtypes={"float32"}), spec("two"))
    with pytest.raises(BackendRefusedError, match=r"(?s)dtype: wanted bfloat16.*could: two") as no:
        select_backend(PAIR, make_requirements(dtype="bfloat16"), host)
    assert [refusal.rule for refusal in no.value.refusals] == ["dtype"]


@pytest.mark.parametrize("vetoed", ["one", "two", PAIR])
def test_a_plugin_may_object_to_either_and_to_the_pair(make_host, make_requirements, vetoed):
    def isobit_check(config, spec):
        return [Refusal("moon", "none", "full", "Wait.")] if spec.name == vetoed else []

    host = make_host([spec("one"), spec("two")], {"isobit_check": isobit_check})
    with pytest.raises(BackendRefusedError) as caught:
        select_backend(PAIR, make_requirements(), host)
    assert [refusal.rule for refusal in caught.value.refusals] == ["moon"]


def test_a_plugin_that_cannot_answer_objects_once(make_host, make_requirements):
    host = make_host([spec("one"), spec("two")], {"isobit_check": lambda config, spec: None})
    with pytest.raises(BackendRefusedError) as caught:
        select_backend(PAIR, make_requirements(), host)
    assert len(caught.value.refusals) == 1


def test_what_is_wrong_with_one_is_said_with_its_name(make_host):
    right = replace(RIGHT_WRITTEN, name="one")
    pair = make_host(right, spec("two")).require(PAIR).spec
    with pytest.raises(ConfigError, match="attention backend 'two': its factory 'nowhere:two' can"):
        load_factory(pair)


def test_the_class_of_a_pair_is_found_by_its_name():
    written = [replace(RIGHT_WRITTEN, name=name) for name in ("one", "two")]
    factory = load_factory(join(*written))
    assert load_factory(join(*written)) is factory
    assert factory.PREFILL is factory.DECODE is load_factory(written[0])
    module = sys.modules[factory.__module__]
    assert getattr(module, factory.__qualname__) is factory
    for nothing in ("Nothing", "a,b"):
        with pytest.raises(AttributeError, match=f"has no attribute '{nothing}'"):
            getattr(module, nothing)


def test_the_suite_judges_a_pair_and_repeats_what_it_found(make_host, tmp_path):
    """The negative control: a pair that is wrong in its decodes alone."""
    (mutant,) = [m.spec for m in MUTANTS if m.name == "mutant-splits-by-batch"]
    written = replace(mutant.capabilities, engine_writes_kv=True)
    host = make_host(
        replace(RIGHT_WRITTEN, name="one"), replace(mutant, name="two", capabilities=written)
    )

    def outcome(name):
        found = host.require(name)
        factory = load_factory(found.spec)
        subject = Subject(found.spec, factory, found.distribution, found.version, host)
        (judged,) = run_suite(make_context(subject, "cpu", quick=True), only=("batch",))
        return judged

    assert outcome("one").status == "passed"
    failed = outcome(PAIR)
    assert failed.status == "failed"
    program = tmp_path / "again.py"
    program.write_text(failed.snippet)
    done = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "one way and" in done.stderr


def holds(checks, context):
    """Stands for the suite: one trial of each check, which holds."""
    for check in checks:
        yield (Finding("a trial", check.cells),), 0.0


def test_a_pair_that_is_named_is_proved_beside_the_backends(make_host):
    host = make_host(*(replace(RIGHT_WRITTEN, name=name) for name in ("one", "two")))
    proofs, _ = prove_all(host, quick=True, judge=holds, pair=host.require(PAIR))
    assert list(dict.fromkeys(proof.backend for proof in proofs)) == ["one", "two", PAIR]
    assert f"plugins test {PAIR} --device" in proofs[-1].command
    plain, _ = prove_all(host, quick=True, judge=holds)
    assert {proof.backend for proof in plain} == {"one", "two"}


def test_backends_proves_the_pair(monkeypatch):
    monkeypatch.setattr("isobit.cli.backends.judge_in", lambda jobs, make_host: holds)
    name = "prefill=triton,decode=torch"
    shown = CliRunner().invoke(main, ["backends", "--prove", "--attention-backend", name])
    assert shown.exit_code == 0, shown.output
    assert f"{name} on cuda" in shown.stderr or f"{name} is not judged on cuda" in shown.stdout


def test_backends_shows_the_pair_as_a_column():
    name = "prefill=triton,decode=torch"
    shown = CliRunner().invoke(main, ["backends", "--attention-backend", name])
    assert shown.exit_code == 0, shown.output
    assert shown.stdout.splitlines()[0].split()[-1] == name
    assert f"{name}, sliding_window: torch: the kernels attend to every earlier" in shown.stdout
    plain = CliRunner().invoke(main, ["backends"])
    assert name not in plain.stdout
