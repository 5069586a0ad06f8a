"""Where the distribution is not installed, its tests find it as pip would have left it."""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GROUP = "isobit.plugins"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def is_installed() -> bool:
    try:
        metadata.distribution(PROJECT["name"])
    except metadata.PackageNotFoundError:
        return False
    return True


INSTALLED = is_installed()
if not INSTALLED:
    sys.path.append(str(ROOT))


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The entry point can be found, here and in new processes."""
    if INSTALLED:
        yield
        return
    site = tmp_path_factory.mktemp("site")
    info = site / f"{PROJECT['name'].replace('-', '_')}-{PROJECT['version']}.dist-info"
    info.mkdir()
    name, version = PROJECT["name"], PROJECT["version"]
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"{key} = {target}" for key, target in PROJECT["entry-points"][GROUP].items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines, ""]))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        patch.setenv("PYTHONPATH", f"{site}:{ROOT}", prepend=os.pathsep)
        yield
