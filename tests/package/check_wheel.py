"""Builds the source distribution and, from it, the wheel; runs the wheel far from the repository.

    python tests/package/check_wheel.py

The wheel's virtual environment borrows the dependencies of the Python that runs this, not its
Isobit.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import tomllib
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIBRARY = "isobit/kernels/native/_isobit.abi3.so"

PROGRAM = """
import sys
from pathlib import Path

import isobit
from isobit import LLM, SamplingParams

assert Path(isobit.__file__).is_relative_to(sys.prefix), isobit.__file__
with LLM("tiny-qwen3", load_format="random", kernels="native", attention_backend="torch") as llm:
    params = SamplingParams(temperature=1.0, max_tokens=8, logprobs=0)
    alone = llm.generate([1, 2, 3], params)[0]
    among = llm.generate([[4] * 40, [1, 2, 3]], params)[1]
    other = llm.generate([1, 2, 4], params)[0]
assert alone.outputs == among.outputs, "other bits in a batch"
assert alone.outputs != other.outputs, "another prompt gave the same output"
print(alone.outputs[0].token_ids)
"""


def build(folder: Path) -> tuple[Path, Path]:
    """The source distribution, and the wheel that was built from it."""
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder, ROOT], check=True)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def check_sdist(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "kernels" / "native").glob("*.[ch]")}
    wanted = modules() | data() | sources | {"pyproject.toml", "setup.py", "README.md"}
    wanted |= {"LICENSE", "CHANGELOG.md"}
    expect(f"{sdist.name} lacks", wanted - found)


def check_wheel(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {f"isobit/{name}" for name in modules() | data()} | {LIBRARY}
    expect(f"{wheel.name} lacks", wanted - found)
    expect(f"{wheel.name} should not have", found - wanted)


def modules() -> set[str]:
    """Every module of the packages that ``pyproject.toml`` declares, by its path."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages: list[str] = declared["tool"]["setuptools"]["packages"]
    folders = [ROOT.joinpath(*package.split(".")[1:]) for package in packages]
    # setup.py lies in the package's folder, as the root is the package; it is not installed.
    paths = {path for folder in folders for path in folder.glob("*.py")} - {ROOT / "setup.py"}
    return {str(path.relative_to(ROOT)) for path in paths}


def data() -> set[str]:
    """Every file that the package reads besides its modules, by its path."""
    templates = (ROOT / "verify" / "templates").iterdir()
    return {"py.typed"} | {str(path.relative_to(ROOT)) for path in templates}


def expect(what: str, wrong: set[str]) -> None:
    """Stop with the list of what is wrong, if anything is."""
    if wrong:
        sys.exit(f"{what}: {', '.join(sorted(wrong))}")


def run_installed(wheel: Path, folder: Path) -> None:
    """Install the wheel into a new environment and use it from another directory."""
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = folder / "venv" / "lib" / version / "site-packages"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", wheel], check=True)
    # A folder named here is only put behind our own; its .pth files, and so its editable installs,
    # are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    script = folder / "venv" / "bin" / "isobit"
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "ISOBIT"))}
    commands = ([script, "--version"], [script, "backends"], [python, "-c", PROGRAM])
    for command in commands:
        subprocess.run(command, cwd=elsewhere, env=clean, check=True)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sdist, wheel = build(folder)
        check_sdist(sdist)
        check_wheel(wheel)
        run_installed(wheel, folder)
        print(f"{sdist.name} and {wheel.name} are complete and work.")


if __name__ == "__main__":
    main()
