"""From a name to a model: its folder, config, tokenizer, and the class that computes it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..generators import kept_generators
from ..kernels.kernel_set import KernelSet
from .config import ModelConfig, load_config
from .decoder import Decoder
from .shapes import SHAPES
from .smollm2 import smollm2_folder

with kept_generators():
    from transformers import AutoConfig, AutoTokenizer

BUILDERS: Mapping[str, Callable[..., Decoder]] = {
    "LlamaForCausalLM": Decoder,
    "Qwen3ForCausalLM": Decoder,
}
"""What computes each architecture; called like ``Decoder``. A new family joins here and in
``config.ARCHITECTURES``."""

PACKAGED: Mapping[str, Callable[[], Path]] = {"smollm2": smollm2_folder}
"""Models that come as Python packages, by name."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def resolve_model(name: str | os.PathLike[str]) -> Path:
    """The local folder of a model: a packaged model's name, or a folder's path. Names come first.

    Raises :class:`ConfigError` for anything else; nothing is ever downloaded.
    """
    given = os.fspath(name)
    if given in PACKAGED:
        return PACKAGED[given]()
    if given in SHAPES:
        raise ConfigError(
            f"model {given!r} is a shape without weights: it wants load_format='random' "
            f"(for a folder of that name say ./{given})"
        )
    folder = Path(given).expanduser()
    if given and folder.is_dir():
        return folder
    raise ConfigError(
        f"unknown model {given!r}: wanted {', '.join(sorted(PACKAGED))}, or a folder on this "
        "machine (nothing is downloaded; fetch it first, for example with `hf download`), or, "
        f"with load_format='random', one of the shapes {', '.join(sorted(SHAPES))}. No "
        "mixture of experts is among them, such as Qwen3-30B-A3B: no model class computes one"
    )


def load_model_config(
    name: str | os.PathLike[str], *, random: bool = False
) -> tuple[Path | None, ModelConfig]:
    """A model's folder and config; ``random`` says that its weights will be random.

    With ``random`` a folder needs only its ``config.json``, and ``name`` may be one of
    ``shapes.SHAPES``, for which there is no folder. Raises :class:`ConfigError` as
    ``resolve_model`` and ``load_config`` do.
    """
    shape = SHAPES.get(os.fspath(name))
    if shape is not None and random:
        return None, ModelConfig.from_hf(AutoConfig.for_model(**shape))
    folder = resolve_model(name)
    return folder, load_config(folder)


def build_model(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    kernels: KernelSet,
    dtype: torch.dtype,
    max_model_len: int,
) -> Decoder:
    """The model of ``config.architecture``; parameters as in :class:`Decoder`."""
    return BUILDERS[config.architecture](config, weights, kernels, dtype, max_model_len)


def load_tokenizer(folder: Path) -> Any | None:
    """The folder's ``transformers`` tokenizer, or ``None`` where it has none (token ids only).

    Raises :class:`ConfigError` for a tokenizer that is there but cannot be read.
    """
    if not any((folder / name).exists() for name in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise ConfigError(f"cannot read the tokenizer in {folder}: {error}") from error
