"""The package as it is installed: its folders, its laziness, its typing."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import isobit

ROOT = Path(isobit.__file__).parent
PYPROJECT = ROOT / "pyproject.toml"


def test_every_folder_with_code_is_packaged() -> None:
    declared = set(tomllib.loads(PYPROJECT.read_text())["tool"]["setuptools"]["packages"])
    found = {
        ".".join(("isobit", *init.parent.relative_to(ROOT).parts))
        for init in ROOT.rglob("__init__.py")
        if not any(part.startswith(".") or part in ("tests", "build") for part in init.parts)
    }
    assert declared == found


def test_every_folder_of_modules_is_a_package() -> None:
    outside = {"tests", "docs", "examples", "benchmarks", "build"}
    for module in ROOT.rglob("*.py"):
        parts = module.relative_to(ROOT).parts
        if not parts[0].startswith(".") and parts[0] not in outside:
            assert (module.parent / "__init__.py").exists(), module


def test_importing_the_package_imports_no_torch() -> None:
    program = (
        "import sys, isobit, isobit.plugins, isobit.backends.torch\n"
        "import isobit.backends.triton, isobit.backends.fa3\n"
        "assert isobit.__version__\n"
        "assert set(isobit.__all__) <= set(dir(isobit))\n"
        "assert isobit.SamplingParams(temperature=0).greedy\n"
        "heavy = ('torch', 'triton', 'transformers', 'numpy')\n"
        "bad = [name for name in heavy if name in sys.modules]\n"
        "sys.exit(' '.join(bad) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_types_are_shipped() -> None:
    assert (ROOT / "py.typed").exists()


def test_data_flows_down() -> None:
    """No module imports one of a floor above its own."""
    floors = [
        {"errors"},
        {"kernels"},
        {"backends", "sampling", "models", "plugins"},
        {"cache"},
        {"core"},
        {"verify", "bench"},
        {"conformance"},
        {"cli"},
    ]
    level = {name: index for index, floor in enumerate(floors) for name in floor}
    for module in ROOT.rglob("*.py"):
        parts = module.relative_to(ROOT).parts
        if len(parts) < 2 or parts[0] not in level:
            continue
        folder = "conformance" if parts[:2] == ("plugins", "conformance") else parts[0]
        depth = len(parts) - 1
        for line in module.read_text().splitlines():
            text = line.strip()
            if text.startswith("from " + "." * (depth + 1)):
                target = text.split()[1].lstrip(".").split(".")[0]
                assert level.get(target, 0) <= level[folder], f"{module}: {text}"
