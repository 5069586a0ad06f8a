"""Selecting a backend: by name, by ``auto``, and what is said when it cannot be."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isobit.backends.capabilities import FEATURES, Conditional, Refusal, Supported, Unsupported
from isobit.backends.matrix import (
    AUTO_ORDER,
    BackendRefusedError,
    Resolved,
    select_backend,
)
from isobit.backends.rules import refusals
from isobit.errors import ConfigError
from isobit.plugins.manager import PluginHost


def veto(config, spec):
    if spec.name != "able":
        return []
    return [Refusal("licence", "no licence key", "kernels that ask for one", "Pass a key.")]


def test_auto_order_is_the_documented_one():
    assert AUTO_ORDER == ("triton", "fa3", "flashinfer", "torch")


def test_what_is_unproved_is_taken_by_name_only(make_host, make_spec, make_requirements):
    host = make_host(replace(make_spec("triton"), unproved="never run"), make_spec("torch"))
    assert select_backend("triton", make_requirements(), host).spec.name == "triton"
    selection = select_backend("auto", make_requirements(), host)
    assert selection.spec.name == "torch"
    assert selection.rejected == {"triton": "never run: it is taken by name only."}


def test_a_backend_is_taken_by_name(make_host, make_spec, make_requirements):
    host = make_host(make_spec("zebra"), make_spec("able"))
    selection = select_backend("zebra", make_requirements(), host)
    assert selection.spec.name == "zebra"
    assert (selection.distribution, selection.version) == ("dist0", "1.0")
    assert selection.rejected == {}


def test_a_named_backend_is_refused_with_all_reasons(make_host, make_spec, make_requirements):
    weak = make_spec("weak", dtypes={"float16"}, page_sizes={64}, deterministic=False)
    host = make_host(weak, make_spec("able"), make_spec("other", devices={"cuda"}))
    with pytest.raises(BackendRefusedError) as caught:
        select_backend("weak", make_requirements(), host)
    assert [r.rule for r in caught.value.refusals] == ["dtype", "page_size", "deterministic"]
    assert isinstance(caught.value, ConfigError)
    for refusal in caught.value.refusals:
        assert str(refusal) in str(caught.value)
    assert str(caught.value).endswith("Backends that could: able.")


def test_an_unknown_backend_is_refused_with_the_list(make_host, make_spec, make_requirements):
    host = make_host(make_spec("able"), make_spec("zebra"), {"isobit_attention_backends": None})
    with pytest.raises(ConfigError, match=r"there are able, zebra\. Did you mean 'able'\?") as e:
        select_backend("abel", make_requirements(), host)
    assert "plugin 'plugin2' of dist2 1.0: failed" in str(e.value)


def test_a_backend_of_a_broken_plugin_is_refused_with_its_reason(make_host, make_requirements):
    host = make_host({"isobit_attention_backends": lambda: 1 / 0})
    with pytest.raises(ConfigError, match=r"'plugin0' cannot be used: .*ZeroDivisionError"):
        select_backend("plugin0", make_requirements(), host)


def test_a_disabled_backend_is_refused_with_the_reason(make_host, make_spec, make_requirements):
    host = make_host(make_spec("plugin0"), disabled={"plugin0"})
    with pytest.raises(ConfigError, match=r"'plugin0' cannot be used: .*: disabled: by config"):
        select_backend("plugin0", make_requirements(), host)


def test_a_contested_backend_is_refused_by_name_and_skipped_by_auto(
    make_host, make_spec, make_requirements
):
    host = make_host(make_spec("triton"), make_spec("triton"), make_spec("torch"))
    with pytest.raises(ConfigError, match=r"plugin 'plugin0' of dist0 1\.0 and plugin 'plugin1'"):
        select_backend("triton", make_requirements(), host)
    selection = select_backend("auto", make_requirements(), host)
    assert selection.spec.name == "torch"
    assert list(selection.rejected) == ["triton"]
    assert "is offered by plugin 'plugin0'" in selection.rejected["triton"]


def test_auto_walks_the_order_then_the_alphabet(make_host, make_spec, make_requirements):
    names = ["zebra", "torch", "alpha", "flashinfer", "fa3", "triton"]
    for expected in [*AUTO_ORDER, "alpha", "zebra"]:
        host = make_host(*(make_spec(name) for name in names))
        assert select_backend("auto", make_requirements(), host).spec.name == expected
        names.remove(expected)


def test_auto_says_why_the_others_were_not_taken(make_host, make_spec, make_requirements):
    host = make_host(
        make_spec("triton", devices={"cuda"}, dtypes={"bfloat16"}),
        make_spec("torch"),
        make_spec("alpha", devices={"cuda"}),
        make_spec("zebra"),
    )
    selection = select_backend("auto", make_requirements(), host)
    assert list(selection.rejected) == ["triton", "alpha", "zebra"]
    assert selection.rejected["alpha"].startswith("device: wanted cpu, offered cuda.")
    assert selection.rejected["zebra"] == "could serve, but comes after torch in the order."
    assert "device: wanted cpu, offered cuda." in selection.rejected["triton"]
    assert "dtype: wanted float32, offered bfloat16." in selection.rejected["triton"]


def test_auto_without_any_able_backend_says_everything(make_host, make_spec, make_requirements):
    host = make_host(
        make_spec("triton", devices={"cuda"}),
        make_spec("alpha", dtypes={"float16"}),
        {"isobit_attention_backends": lambda: 1 / 0},
    )
    with pytest.raises(ConfigError) as caught:
        select_backend("auto", make_requirements(), host)
    for part in ("- triton: device:", "- alpha: dtype:", "plugin 'plugin2' of dist2 1.0: failed"):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match="None is installed"):
        select_backend("auto", make_requirements(), PluginHost(candidates=[]))


def test_any_plugin_may_veto(make_host, make_spec, make_requirements):
    host = make_host(make_spec("able"), make_spec("torch"), {"isobit_check": veto})
    with pytest.raises(BackendRefusedError, match="Pass a key") as caught:
        select_backend("able", make_requirements(), host)
    assert [r.rule for r in caught.value.refusals] == ["licence"]
    assert select_backend("torch", make_requirements(), host).spec.name == "torch"


@pytest.mark.parametrize(
    ("check", "said"),
    [
        (lambda config, spec: 1 / 0, "isobit_check raised ZeroDivisionError"),
        (lambda config, spec: None, "isobit_check returned None"),
        (lambda config, spec: ["no"], "isobit_check answered with 'no'"),
    ],
)
def test_a_check_that_cannot_answer_refuses_in_its_name(
    make_host, make_spec, make_requirements, check, said
):
    host = make_host(make_spec("able"), {"isobit_check": check}, {"isobit_check": veto})
    with pytest.raises(BackendRefusedError) as caught:
        select_backend("able", make_requirements(), host)
    first, second = caught.value.refusals
    assert first.rule == "plugin plugin1"
    assert said in first.offered
    assert "ISOBIT_DISABLE_PLUGINS=plugin1" in first.remedy
    assert second.rule == "licence"


def test_checks_see_resolved_features(make_host, make_spec, make_requirements):
    seen = []

    def check(config, spec):
        seen.append(dict(config.features))
        return ()

    host = make_host(
        make_spec("able", features={"radix_cache": Supported()}), {"isobit_check": check}
    )
    asked = make_requirements(features={"radix_cache": None, "chunked_prefill": None})
    select_backend("able", asked, host)
    assert seen.pop() == {"chunked_prefill": False, "radix_cache": True}
    # What was asked for stays asked for, even where the rules refuse it.
    asked = make_requirements(features={"chunked_prefill": True})
    with pytest.raises(BackendRefusedError):
        select_backend("able", asked, host)
    assert seen.pop() == {"chunked_prefill": True}


def test_a_check_may_take_fewer_arguments(make_host, make_spec, make_requirements):
    host = make_host(make_spec("able"), {"isobit_check": lambda spec: []})
    assert select_backend("able", make_requirements(), host).spec.name == "able"


def test_open_features_are_resolved_with_a_reason(make_host, make_spec, make_requirements):
    spec = make_spec(
        "able",
        features={
            "chunked_prefill": Supported(),
            "radix_cache": Conditional("up to 8k tokens"),
            "sliding_window": Unsupported("not written"),
            "non_greedy_sampling": Supported(),
        },
    )
    asked = dict.fromkeys(FEATURES) | {"non_greedy_sampling": True, "logit_soft_cap": False}
    selection = select_backend("able", make_requirements(features=asked), make_host(spec))
    assert selection.features == {
        "cuda_graph": Resolved(False, "auto: not declared"),
        "chunked_prefill": Resolved(True, "auto: supported"),
        "radix_cache": Resolved(True, "auto: up to 8k tokens"),
        "non_greedy_sampling": Resolved(True, "asked for: supported"),
        "sliding_window": Resolved(False, "auto: not written"),
        "logit_soft_cap": Resolved(False, "not asked for"),
    }


@pytest.mark.parametrize("feature", ["radix_cache", "chunked_prefill"])
def test_determinism_turns_open_features_off_with_the_reason(
    make_host, make_spec, make_requirements, feature
):
    host = make_host(make_spec("weak", chunk_invariant=False))
    selection = select_backend("weak", make_requirements(features={feature: None}), host)
    assert selection.features[feature].value is False
    assert "the bits of weak depend on where a prompt is cut" in selection.features[feature].why
    with pytest.raises(BackendRefusedError):
        select_backend("weak", make_requirements(features={feature: True}), host)


def test_a_radix_cache_without_equal_decoding_keeps_prefill_tokens(
    make_host, make_spec, make_requirements
):
    spec = make_spec("weak", decode_equals_prefill=False, alignment=64)
    asked = make_requirements(features={"radix_cache": None})
    resolved = select_backend("weak", asked, make_host(spec)).features["radix_cache"]
    assert resolved == Resolved(True, "auto: only prefill-written tokens (rounded to 64)")


CELLS = st.sampled_from([Supported(), Conditional("sometimes"), Unsupported("never")])
SETS = st.sampled_from([None, {64}, {64, 128}, {16}])
SPECS = {
    "api": st.sampled_from([1, 1, 1, 2]),
    "requires": st.sampled_from([(), ("pluggy",), ("surely-not-installed",)]),
    "dtypes": st.sets(st.sampled_from(["float32", "bfloat16"])),
    "devices": st.sets(st.sampled_from(["cpu", "cuda"])),
    "head_dims": SETS,
    "page_sizes": SETS,
    "compute_capability": st.sampled_from([None, (8, 0), (9, 0)]),
    "features": st.dictionaries(st.sampled_from(sorted(FEATURES)), CELLS),
    "deterministic": st.booleans(),
    "chunk_invariant": st.booleans(),
    "alignment": st.sampled_from([1, 64]),
    "decode_equals_prefill": st.booleans(),
}
REQUIREMENTS = {
    "dtype": st.sampled_from(["float32", "bfloat16"]),
    "head_dim": st.sampled_from([64, 128]),
    "page_size": st.sampled_from([16, 64]),
    "device": st.sampled_from(["cpu", "cuda"]),
    "compute_capability": st.sampled_from([None, (8, 0), (9, 0)]),
    "deterministic": st.booleans(),
    "features": st.dictionaries(
        st.sampled_from(sorted(FEATURES)), st.sampled_from([True, False, None])
    ),
}


@given(declared=st.fixed_dictionaries(SPECS), asked=st.fixed_dictionaries(REQUIREMENTS))
def test_no_refusals_if_and_only_if_the_selection_succeeds(
    make_host, make_spec, make_requirements, declared, asked
):
    api = declared.pop("api")
    spec = make_spec("drawn", **declared)
    requirements = make_requirements(**asked)
    # Another API version never passes the host: it is the rules' to refuse.
    other_api = make_spec("drawn", **declared, api=api)
    found = refusals(requirements, spec)
    extra = ["api"] if api != 1 else []
    assert [r.rule for r in refusals(requirements, other_api)] == extra + [r.rule for r in found]
    host = make_host(spec)
    if found:
        with pytest.raises(BackendRefusedError) as caught:
            select_backend("drawn", requirements, host)
        assert list(caught.value.refusals) == found
        with pytest.raises(ConfigError):
            select_backend("auto", requirements, host)
        return
    selection = select_backend("drawn", requirements, host)
    assert select_backend("auto", requirements, host).spec == spec
    for feature, wanted in requirements.features.items():
        assert wanted is None or selection.features[feature].value is wanted
        assert selection.features[feature].why
