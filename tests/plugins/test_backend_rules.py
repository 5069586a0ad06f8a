"""The rules one by one, and that none hides another."""

from __future__ import annotations

import pytest

from isobit.backends.capabilities import (
    FEATURES,
    Capabilities,
    Conditional,
    Refusal,
    Supported,
    Unsupported,
)
from isobit.backends.rules import cell_for, describe_set, installed_version, refusals
from isobit.errors import ConfigError

NOTHING = {}.get


def rules(found: list[Refusal]) -> list[str]:
    return [refusal.rule for refusal in found]


def test_an_able_backend_is_not_refused(make_requirements, make_spec):
    assert refusals(make_requirements(), make_spec()) == []


def test_everything_wrong_gives_every_refusal_in_the_documented_order(make_requirements, make_spec):
    spec = make_spec(
        api=9,
        requires=("fast-kernels>=2",),
        install="pip install fast-kernels --index-url example",
        devices={"cuda"},
        dtypes={"float16"},
        head_dims={128},
        page_sizes={64},
        deterministic=False,
        chunk_invariant=False,
        features={},
    )
    asked = make_requirements(features=dict.fromkeys(FEATURES, True))
    found = refusals(asked, spec, installed=NOTHING)
    assert rules(found) == [
        "api",
        "requires",
        "device",
        "dtype",
        "head_dim",
        "page_size",
        "deterministic",
        *FEATURES,
    ]
    for refusal in found:
        assert refusal.wanted
        assert refusal.offered
        assert refusal.remedy.endswith(".") or refusal.rule == "requires"
        assert str(refusal).startswith(f"{refusal.rule}: wanted ")
    assert "plugin API 1" in found[0].wanted
    assert "plugin API 9" in found[0].offered
    assert found[1].remedy == "Install it: pip install fast-kernels --index-url example"


@pytest.mark.parametrize(
    ("requirement", "version", "offered"),
    [
        ("kernels", None, "kernels is not installed"),
        ("kernels", "1.0", None),
        ("kernels>=2", "1.9", "kernels 1.9 is installed"),
        ("kernels>=2", "2.1.0+cu130", None),
        ("kernels>=2", "2.1rc1", None),
        ("kernels>=2", "homemade", "kernels homemade is installed"),
        ("kernels", "homemade", None),
        ("kernels; python_version < '3'", None, None),
        ("not a requirement", None, "a requirement string that cannot be read"),
    ],
)
def test_required_distributions(make_requirements, make_spec, requirement, version, offered):
    spec = make_spec(requires=(requirement,))
    found = refusals(make_requirements(), spec, installed=lambda name: version)
    assert [refusal.offered for refusal in found] == ([] if offered is None else [offered])
    if found:
        assert f"pip install '{requirement}'" in found[0].remedy


def test_the_environment_is_asked_by_default(make_requirements, make_spec):
    assert installed_version("pluggy")
    assert installed_version("surely-not-installed") is None
    spec = make_spec(requires=("pluggy>=1", "surely-not-installed"))
    assert [r.wanted for r in refusals(make_requirements(), spec)] == ["surely-not-installed"]


@pytest.mark.parametrize(
    ("device", "have", "refused"),
    [
        ("cuda", (8, 9), True),
        ("cuda", (9, 0), False),
        ("cuda", (10, 0), False),
        ("cuda", None, True),
        ("cpu", None, False),
    ],
)
def test_compute_capability(make_requirements, make_spec, device, have, refused):
    spec = make_spec(compute_capability=(9, 0))
    found = refusals(make_requirements(device=device, compute_capability=have), spec)
    assert rules(found) == (["compute_capability"] if refused else [])


@pytest.mark.parametrize(
    ("lowest", "highest", "words", "served"),
    [
        (None, None, "", [None, (7, 5), (12, 0)]),
        ((9, 0), None, "9.0 and up", [(9, 0), (12, 0)]),
        ((9, 0), (9, 0), "9.0", [(9, 0)]),
        ((8, 0), (9, 0), "8.0 to 9.0", [(8, 0), (8, 9), (9, 0)]),
        (None, (9, 0), "up to 9.0", [(7, 5), (8, 0), (8, 9), (9, 0)]),
    ],
)
def test_a_range_of_compute_capabilities(
    make_requirements, make_spec, lowest, highest, words, served
):
    spec = make_spec(compute_capability=lowest, highest_compute_capability=highest)
    assert spec.capabilities.gpus == words
    for have in (None, (7, 5), (8, 0), (8, 9), (9, 0), (12, 0)):
        found = refusals(make_requirements(device="cuda", compute_capability=have), spec)
        assert bool(found) == (words != "" and have not in served)
        assert all(refusal.offered == words for refusal in found)


def test_undeclared_sizes_mean_any_but_undeclared_features_mean_none(make_requirements, make_spec):
    spec = make_spec(features={})
    assert refusals(make_requirements(head_dim=7, page_size=1000), spec) == []
    for feature in FEATURES:
        (refusal,) = refusals(make_requirements(device="cuda", features={feature: True}), spec)
        assert refusal.rule == feature
        assert refusal.offered == "unsupported: not declared"
        for left_open in (False, None):
            assert refusals(make_requirements(features={feature: left_open}), spec) == []


def test_a_graph_needs_a_cuda_device(make_requirements, make_spec):
    on_cpu = make_requirements(features={"cuda_graph": True})
    on_cuda = make_requirements(device="cuda", features={"cuda_graph": True})
    assert rules(refusals(on_cpu, make_spec())) == ["cuda_graph"]
    assert refusals(on_cuda, make_spec()) == []


@pytest.mark.parametrize("feature", ["chunked_prefill", "radix_cache"])
def test_determinism_without_chunk_invariance_refuses_cuts(make_requirements, make_spec, feature):
    spec = make_spec(chunk_invariant=False)
    asked = make_requirements(features={feature: True})
    assert rules(refusals(asked, spec)) == [feature]
    free = make_requirements(deterministic=False, features={feature: True})
    assert refusals(free, spec) == []


@pytest.mark.parametrize(
    ("feature", "facts", "cell"),
    [
        ("radix_cache", {}, Supported()),
        (
            "radix_cache",
            {"decode_equals_prefill": False},
            Conditional("only prefill-written tokens (rounded to 1)"),
        ),
        (
            "radix_cache",
            {"decode_equals_prefill": False, "alignment": 128},
            Conditional("only prefill-written tokens (rounded to 128)"),
        ),
        (
            "radix_cache",
            {"alignment": 128},
            Conditional("matches rounded down to a multiple of 128 tokens"),
        ),
        ("chunked_prefill", {"decode_equals_prefill": False}, Supported()),
        (
            "chunked_prefill",
            {"alignment": 64},
            Conditional("every cut at a multiple of 64 tokens"),
        ),
        ("chunked_prefill", {"features": {}}, Unsupported("not declared")),
        (
            "chunked_prefill",
            {"alignment": 64, "features": {"chunked_prefill": Conditional("up to 8k")}},
            Conditional("up to 8k; every cut at a multiple of 64 tokens"),
        ),
    ],
)
def test_what_determinism_leaves_of_a_cell(make_requirements, make_spec, feature, facts, cell):
    spec = make_spec(**facts)
    assert cell_for(feature, make_requirements(), spec) == cell
    free = make_requirements(deterministic=False)
    assert cell_for(feature, free, spec) == spec.capabilities.cell(feature)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (None, "any"),
        (set(), "none"),
        ({64}, "64"),
        ({128, 64, 256}, "64, 128, 256"),
        (set(range(8, 257, 8)), "8 to 256 in steps of 8"),
        (set(range(1, 257)), "1 to 256"),
        ({"float32", "bfloat16"}, "bfloat16, float32"),
    ],
)
def test_sets_in_words(values, words):
    assert describe_set(values) == words


def test_declarations_check_themselves(make_requirements, make_spec):
    plain = {"dtypes": {"float32"}, "devices": {"cpu"}}
    with pytest.raises(ConfigError, match="Did you mean 'radix_cache'"):
        Capabilities(**plain, features={"radix_cach": Supported()})
    with pytest.raises(ConfigError, match="the cell of cuda_graph must be Supported or"):
        Capabilities(**plain, features={"cuda_graph": True})
    with pytest.raises(ConfigError, match="head_dims must be Set"):
        Capabilities(**plain, head_dims=[64])
    with pytest.raises(ConfigError, match="alignment"):
        Capabilities(**plain, alignment=0)
    with pytest.raises(ConfigError, match="Did you mean 'cuda_graph'"):
        make_requirements(features={"cuda_graphs": True})
    with pytest.raises(ConfigError, match="cannot be named 'auto'"):
        make_spec("auto")
    with pytest.raises(ConfigError, match="requires must be tuple"):
        make_spec(requires="torch")


def test_declarations_do_not_share_what_they_were_made_from():
    dtypes, features = {"float32"}, {"cuda_graph": Supported()}
    capabilities = Capabilities(dtypes=dtypes, devices={"cpu"}, features=features)
    dtypes.add("float8")
    features.clear()
    assert capabilities.dtypes == {"float32"}
    assert capabilities.cell("cuda_graph") == Supported()
