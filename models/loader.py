"""Strict loading of Hugging Face folders: every tensor accounted for, or one error that says why.

Only safetensors files are read (https://huggingface.co/docs/safetensors), never pickles.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import ConfigError
from .config import ModelConfig
from .weights import EMBEDDING, LM_HEAD, expected_tensors

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
IGNORED_SUFFIXES = ("rotary_emb.inv_freq",)
"""Buffers that old exporters saved and that the config determines anyway."""

_DTYPES = ("F32", "BF16", "F16")
_MOST_LISTED = 8


def load_weights(folder: Path, config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Read exactly the tensors of ``expected_tensors(config)``, cast to ``dtype``.

    The returned tensors own their memory: the files may be changed afterwards. In a tied model a
    stored ``lm_head.weight`` must equal the embedding and is then dropped.

    Raises :class:`ConfigError` for missing, damaged or foreign files, and one that lists every
    tensor that is missing, extra, misshapen or of an unsupported dtype.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(_opened(path)) for path in _shards(folder)]
        owners, twice = _owners(files)
        faults = _faults(config, owners)
        if twice:
            faults.append(_listing("stored in two files", twice))
        if faults:
            raise ConfigError(f"the weights in {folder} do not fit its config: {'; '.join(faults)}")
        _check_tied_head(config, owners, folder)
        return {
            name: owners[name].get_tensor(name).to(dtype, copy=True)
            for name in expected_tensors(config)
        }


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing; download the model's folder again") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    except SafetensorError as error:
        with path.open("rb") as raw:
            is_pointer = raw.read(24) == b"version https://git-lfs."
        remedy = "it is a Git LFS pointer: run git lfs pull" if is_pointer else "download it again"
        raise ConfigError(
            f"{path} is not a whole safetensors file ({error}); it holds "
            f"{path.stat().st_size} bytes; {remedy}"
        ) from error


def _shards(folder: Path) -> list[Path]:
    """The files to read: the single one, or those that the index names."""
    if not folder.is_dir():
        raise ConfigError(f"wanted a model folder, but there is none at {folder}")
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        found = sorted(path.name for path in folder.iterdir())[:_MOST_LISTED]
        raise ConfigError(
            f"wanted {SINGLE_FILE} or {INDEX_FILE} in {folder}, which holds "
            f"{', '.join(found) or 'nothing'}; only safetensors weights are read"
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"cannot read the weight_map of {index}: {error!r}") from error
    outside = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if outside:
        raise ConfigError(f"{index} names files outside its folder: {outside[:_MOST_LISTED]}")
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise ConfigError(f"{index} names {_listing('missing files', absent)}")
    return [folder / name for name in names]


def _owners(files: Sequence[Any]) -> tuple[dict[str, Any], list[str]]:
    """The file that holds each tensor, and the names that two files hold."""
    owners: dict[str, Any] = {}
    twice = []
    for file in files:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            if name in owners:
                twice.append(name)
            owners[name] = file
    return owners, twice


def _faults(config: ModelConfig, owners: Mapping[str, Any]) -> list[str]:
    """Every way in which the stored tensors differ from the expected ones."""
    expected = expected_tensors(config)
    allowed = {LM_HEAD} if config.tie_word_embeddings else set()
    missing = [name for name in expected if name not in owners]
    extra = [
        name
        for name in owners
        if name not in expected and name not in allowed and not name.endswith(IGNORED_SUFFIXES)
    ]
    misshapen, mistyped = [], []
    for name, shape in expected.items():
        if name not in owners:
            continue
        stored = owners[name].get_slice(name)
        if tuple(stored.get_shape()) != shape:
            misshapen.append(f"{name} {list(stored.get_shape())} (wanted {list(shape)})")
        if stored.get_dtype() not in _DTYPES:
            mistyped.append(f"{name} {stored.get_dtype()}")
    kinds = {
        "missing": missing,
        "extra": sorted(extra),
        "misshapen": misshapen,
        f"of a dtype other than {', '.join(_DTYPES)}": mistyped,
    }
    return [_listing(kind, names) for kind, names in kinds.items() if names]


def _listing(kind: str, names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return f"{len(names)} {kind}: {', '.join(names[:_MOST_LISTED])}{more}"


def _check_tied_head(config: ModelConfig, owners: Mapping[str, Any], folder: Path) -> None:
    if not config.tie_word_embeddings or LM_HEAD not in owners:
        return
    head, embedding = owners[LM_HEAD].get_tensor(LM_HEAD), owners[EMBEDDING].get_tensor(EMBEDDING)
    if head.dtype != embedding.dtype or not torch.equal(head, embedding):
        raise ConfigError(
            f"config.json in {folder} says tie_word_embeddings, but the stored {LM_HEAD} differs "
            f"from {EMBEDDING}; set tie_word_embeddings to false to use it"
        )
