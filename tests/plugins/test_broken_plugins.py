"""Broken plugins, each a real distribution: recorded with their reason, and they break nobody."""

from __future__ import annotations

import pytest

from isobit.plugins.discovery import BUILT_IN

UNMARKED = """
from isobit import plugins

@plugins.hookimpl
def isobit_check(config, spec):
    return []

def {name}():
    return []
"""

HOOK = """
from isobit import plugins

@plugins.hookimpl{options}
def {definition}
    {body}
"""


def hook(definition: str, body: str = "return []", options: str = "") -> str:
    return HOOK.format(definition=definition, body=body, options=options)


BROKEN = {
    "import error": ("import surely_missing_module", "ModuleNotFoundError: No module named"),
    "exit at import": ("raise SystemExit('no GPU here')", "SystemExit: no GPU here"),
    "syntax error": ("def broken(:", "SyntaxError"),
    "no hook": ("x = 1", "implements no hook"),
    "bad signature": (
        hook("isobit_check(config, spec, surprise):"),
        "a hook has the wrong arguments",
    ),
    "unknown hook": (hook("isobit_commands(cli):"), "'isobit_commands' is no hook"),
    "misspelt hook": (
        hook("isobit_attention_backend():"),
        "Did you mean 'isobit_attention_backends'?",
    ),
    "misspelt name of a marked function": (
        hook("backends():", options="(specname='isobit_attention_backend')"),
        "Did you mean 'isobit_attention_backends'?",
    ),
    "mark forgotten": (
        UNMARKED.format(name="isobit_attention_backends"),
        "not marked with @isobit.plugins.hookimpl",
    ),
    "mark forgotten and misspelt": (
        UNMARKED.format(name="isobit_attention_backendz"),
        "Did you mean 'isobit_attention_backends'?",
    ),
    "meaningless option": (
        hook("isobit_check(config, spec):", options="(tryfirst=True)"),
        "tryfirst=True, which has no meaning here",
    ),
    "wrapper": (
        hook("isobit_check(config, spec):", "return (yield)", "(wrapper=True)"),
        "wrapper=True, which has no meaning here",
    ),
    "wrong return type": (
        hook("isobit_attention_backends():", "return ['toy']"),
        "answered with 'toy'; wanted an iterable of BackendSpec",
    ),
    "return forgotten": (
        hook("isobit_attention_backends():", "pass"),
        "returned None; wanted an iterable of BackendSpec",
    ),
    "hook raises": (
        hook("isobit_attention_backends():", "return 1 / 0"),
        "isobit_attention_backends raised ZeroDivisionError",
    ),
    "generator raises": (
        hook("isobit_attention_backends():", "yield 1 / 0"),
        "isobit_attention_backends raised ZeroDivisionError",
    ),
    "backend declared twice": (
        hook(
            "isobit_attention_backends():",
            "return 2 * [plugins.BackendSpec(name='fast', api=1, factory='a:B', "
            "capabilities=plugins.Capabilities(dtypes={'float32'}, devices={'cpu'}))]",
        ),
        "declares the backend 'fast' twice",
    ),
    "unknown feature": (
        hook(
            "isobit_attention_backends():",
            "return [plugins.Capabilities(dtypes={'float32'}, devices={'cpu'}, "
            "features={'radix': plugins.Supported()})]",
        ),
        "'radix' is no feature",
    ),
    "dtypes as a string": (
        hook(
            "isobit_attention_backends():",
            "return [plugins.Capabilities(dtypes='float32', devices={'cpu'})]",
        ),
        "dtypes must be Set, not 'float32'",
    ),
}


def test_broken_plugins_are_recorded_and_break_nobody(site, backend_source):
    names = {f"broken{i}": key for i, key in enumerate(BROKEN)}
    for name, key in names.items():
        site.plugin(name, BROKEN[key][0])
    site.plugin("good", backend_source("good"))
    site.plugin("zebra", backend_source("zebra"))
    report = site.report()
    assert {*BUILT_IN, "good", "zebra"} <= set(report["backends"])
    assert not report["backends"].keys() & names.keys()
    assert len(report["problems"]) == len(BROKEN)
    for name, key in names.items():
        record = report["by_name"][name]
        assert (record["status"], record["hooks"]) == ("failed", []), key
        assert BROKEN[key][1] in record["reason"], key
        assert any(f"plugin '{name}' of {name}-dist 1.0" in p for p in report["problems"])


def test_strict_mode_lists_all_failures(site):
    site.plugin("one", BROKEN["import error"][0])
    site.plugin("two", BROKEN["hook raises"][0])
    program = (
        "from isobit.errors import ConfigError\n"
        "from isobit.plugins.manager import PluginHost\n"
        "try: PluginHost(strict_plugins=True)\n"
        "except ConfigError as error: print(error)\n"
    )
    text = site.python(program).stdout
    assert "plugin 'one' of one-dist 1.0: failed: importing one_plugin raised" in text
    assert "plugin 'two' of two-dist 1.0: failed: isobit_attention_backends raised" in text


def test_strict_mode_accepts_good_plugins(site, backend_source):
    site.plugin("good", backend_source("good"))
    assert "good" in site.report({"strict_plugins": True})["backends"]


def test_a_keyboard_interrupt_is_not_swallowed(site):
    site.plugin("broken", "raise KeyboardInterrupt")
    done = site.python("from isobit.plugins.manager import PluginHost; PluginHost()")
    assert done.returncode != 0
    assert "KeyboardInterrupt" in done.stderr


def test_a_failed_plugin_leaves_no_hook_behind(site):
    """Its valid isobit_check must not be asked once its isobit_attention_backends failed."""
    veto = hook("isobit_check(config, spec):", "raise RuntimeError('still here')")
    site.plugin("half", veto + hook("isobit_attention_backends():", "return 1 / 0"))
    site.plugin("half2", veto + hook("isobit_attention_backends(surprise):"))
    program = (
        "from isobit.backends.capabilities import Requirements\n"
        "from isobit.plugins.manager import PluginHost\n"
        "host = PluginHost()\n"
        "asked = Requirements(dtype='float32', head_dim=64, page_size=16, device='cpu',\n"
        "    compute_capability=None, deterministic=True, features={})\n"
        "print(host.check(asked, host.require('torch').spec))\n"
    )
    done = site.python(program)
    assert done.stdout.strip() == "[]", done.stderr


def test_two_entry_points_of_one_broken_module_fail_for_its_own_reason(site):
    """The first failure must unregister the module, or the second would be a clash instead."""
    source = hook("isobit_attention_backends():", "return 1 / 0")
    site.add(
        "double", "1.0", {"one": "double_plugin", "two": "double_plugin"}, double_plugin=source
    )
    records = site.report()["by_name"]
    assert "ZeroDivisionError" in records["one"]["reason"]
    assert "ZeroDivisionError" in records["two"]["reason"]


def test_two_entry_points_of_one_good_module_count_once(site, backend_source):
    source = backend_source("fast")
    site.add(
        "double", "1.0", {"one": "double_plugin", "two": "double_plugin"}, double_plugin=source
    )
    report = site.report()
    assert report["backends"]["fast"][0] == "one"
    assert "already registered" in report["by_name"]["two"]["reason"]


def test_a_hook_of_a_later_release_may_be_marked_optional(site):
    optional = hook("isobit_later(x):", options="(optionalhook=True)")
    site.plugin("modern", optional)
    record = site.report()["by_name"]["modern"]
    assert (record["status"], record["hooks"]) == ("loaded", ["isobit_later"])


ABLE = """
from isobit import plugins

@plugins.hookimpl
def isobit_attention_backends():
    names = ("chunked_prefill", "radix_cache", "non_greedy_sampling")
    offers = plugins.Capabilities(
        dtypes={"float32", "float16"}, devices={"cpu"}, deterministic=True,
        features=dict.fromkeys(names, plugins.Supported()),
        chunk_invariant=True, decode_equals_prefill=True,
    )
    return [plugins.BackendSpec(
        name=NAME, api=1, factory=f"{NAME}_attention:Attention", capabilities=offers,
        install=f"pip install {NAME}-dist",
    )]
"""

RAISES_WHEN_MADE = """
from isobit.plugins import AttentionBackend

class Attention(AttentionBackend):
    def __init__(self, config):
        raise OSError("no such driver")
    def plan(self, batch): ...
    def run(self, *args): ...
"""

RUN = """
import sys
from isobit import LLM, SamplingParams
from isobit.errors import ConfigError
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
try:
    with LLM("tiny-llama", load_format="random", kv_cache_memory="8MiB", **options) as llm:
        output = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=3, temperature=0))[0]
        print(llm.report)
        print(len(output.outputs[0].token_ids), "tokens")
except ConfigError as error:
    print("refused:", error)
"""


@pytest.fixture
def crowd(site):
    """Every kind of broken plugin, and two backends whose class cannot be had."""
    for index, (source, _) in enumerate(BROKEN.values()):
        site.plugin(f"broken{index}", source)
    for name, attention in (
        ("unloadable", "raise ImportError('libfast.so.3: cannot open')"),
        ("unmakeable", RAISES_WHEN_MADE),
    ):
        site.plugin(name, ABLE.replace("NAME", repr(name)))
        (site.folders[-1] / f"{name}_attention.py").write_text(attention)
    return site


def test_who_asks_for_none_is_served(crowd):
    said = crowd.python(RUN).stdout
    assert "3 tokens" in said
    assert "torch" in said


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("unloadable", "cannot be imported: ImportError: libfast.so.3: cannot open"),
        ("unmakeable", "of unmakeable-dist 1.0 raised OSError when it was made: no such driver"),
    ],
)
def test_who_asks_for_one_is_told_why(crowd, name, reason):
    said = crowd.python(RUN, "attention_backend", name).stdout
    assert said.startswith(f"refused: attention backend '{name}'")
    assert reason in said


def test_auto_passes_over_a_backend_that_cannot_be_imported(crowd):
    """The built-in does not offer float16, so ``auto`` comes to the others."""
    said = crowd.python(RUN, "dtype", "float16").stdout
    assert "raised OSError when it was made" in said  # the next one that could serve
    assert "unmakeable" in said
