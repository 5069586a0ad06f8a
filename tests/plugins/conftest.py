"""Real distributions made on the spot, and hosts that see them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from isobit.backends.capabilities import (
    BackendSpec,
    Capabilities,
    Requirements,
    Supported,
)
from isobit.plugins import hookimpl
from isobit.plugins.discovery import Candidate
from isobit.plugins.manager import PluginHost

REPORT = """
import dataclasses, json, sys
from isobit.plugins.manager import PluginHost
host = PluginHost(**json.loads(sys.argv[1]))
json.dump({
    "records": [dataclasses.asdict(record) for record in host.records()],
    "backends": {n: [b.plugin, b.distribution, b.version] for n, b in host.backends().items()},
    "problems": host.problems(),
    "torch": "torch" in sys.modules,
}, sys.stdout)
"""

BACKEND = """
from isobit import plugins

@plugins.hookimpl
def isobit_attention_backends():
    return [plugins.BackendSpec(
        name={name!r}, api={api}, factory="{factory}",
        capabilities=plugins.Capabilities(dtypes={{"float32"}}, devices={{"cpu"}}),
    )]
"""


class Site:
    """A folder of installed distributions, and Python processes that see it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folders: list[Path] = []

    def add(
        self, distribution: str, version: str, entries: Mapping[str, str], **modules: str
    ) -> Path:
        """Install a distribution into a folder of its own on ``sys.path``."""
        folder = self.root / f"{len(self.folders)}-{distribution}"
        info = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        )
        lines = [f"{name} = {target}" for name, target in entries.items()]
        (info / "entry_points.txt").write_text("\n".join(["[isobit.plugins]", *lines, ""]))
        for name, source in modules.items():
            (folder / f"{name}.py").write_text(source)
        self.folders.append(folder)
        return folder

    def plugin(self, name: str, source: str, version: str = "1.0") -> None:
        """One distribution ``NAME-dist`` with one plugin ``NAME`` in a module ``NAME_plugin``."""
        self.add(f"{name}-dist", version, {name: f"{name}_plugin"}, **{f"{name}_plugin": source})

    def python(
        self,
        program: str,
        *arguments: str,
        options: Sequence[str] = (),
        folders: Sequence[Path] | None = None,
        **variables: str,
    ) -> subprocess.CompletedProcess[str]:
        path = [str(folder) for folder in (self.folders if folders is None else folders)]
        inherited = os.environ.get("PYTHONPATH")
        environment = os.environ | variables
        environment["PYTHONPATH"] = os.pathsep.join(path + ([inherited] if inherited else []))
        return subprocess.run(
            [sys.executable, *options, "-c", program, *arguments],
            env=environment,
            cwd=self.root,
            text=True,
            capture_output=True,
            check=False,
        )

    def report(
        self,
        arguments: Mapping[str, object] | None = None,
        folders: Sequence[Path] | None = None,
        **variables: str,
    ) -> dict[str, Any]:
        """What a host in a fresh process says of itself."""
        done = self.python(REPORT, json.dumps(arguments or {}), folders=folders, **variables)
        assert done.returncode == 0, done.stderr
        report: dict[str, Any] = json.loads(done.stdout)
        report["by_name"] = {record["name"]: record for record in report["records"]}
        return report


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.fixture(scope="session")
def backend_source() -> Callable[..., str]:
    """The source of a plugin with one backend."""

    def source(name: str, api: int = 1, factory: str = "nowhere:Nothing") -> str:
        return BACKEND.format(name=name, api=api, factory=factory)

    return source


@pytest.fixture(scope="session")
def make_spec() -> Callable[..., BackendSpec]:
    """A spec that holds everything, but for what is passed."""

    def make(name: str = "able", **changes: Any) -> BackendSpec:
        own = {
            key: changes.pop(key)
            for key in ("api", "factory", "requires", "install")
            if key in changes
        }
        capabilities = {
            "dtypes": {"float32"},
            "devices": {"cpu", "cuda"},
            "features": {
                "cuda_graph": Supported(),
                "chunked_prefill": Supported(),
                "radix_cache": Supported(),
                "non_greedy_sampling": Supported(),
            },
            "deterministic": True,
            "chunk_invariant": True,
            "decode_equals_prefill": True,
        } | changes
        return BackendSpec(
            **({"name": name, "api": 1, "factory": "nowhere:Nothing"} | own),
            capabilities=Capabilities(**capabilities),
        )

    return make


@pytest.fixture(scope="session")
def make_requirements() -> Callable[..., Requirements]:
    """What a plain start-up on the CPU asks, but for what is passed."""

    def make(**changes: Any) -> Requirements:
        plain = {
            "dtype": "float32",
            "head_dim": 64,
            "page_size": 16,
            "device": "cpu",
            "compute_capability": None,
            "deterministic": True,
            "features": {},
        }
        return Requirements(**(plain | changes))

    return make


@pytest.fixture(scope="session")
def make_host() -> Callable[..., PluginHost]:
    """A host of plugins made in this process: a spec, a list of specs, or a dict of hooks each."""

    def make(*plugins: Any, **options: Any) -> PluginHost:
        candidates = []
        for number, plugin in enumerate(plugins):
            if isinstance(plugin, BackendSpec):
                plugin = [plugin]
            if isinstance(plugin, list):
                plugin = {"isobit_attention_backends": lambda specs=plugin: specs}
            name = f"plugin{number}"
            hooks = SimpleNamespace(**{key: hookimpl(hook) for key, hook in plugin.items()})
            candidates.append(
                Candidate(name, f"dist{number}", "1.0", name, lambda hooks=hooks: hooks)
            )
        return PluginHost(candidates=candidates, **options)

    return make
