"""Chooses the kernels and proves that they keep their contracts before anything is served.

A provider that fails its self-check on this machine is demoted, and the next one is tried; with
none left the engine refuses to start. So it does if an attention backend that declares
``self_check`` fails its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.base import AttentionBackend
from ..backends.matrix import Selection
from ..backends.selfcheck import check_backend
from ..errors import ConfigError, SelfCheckError
from ..kernels.dispatch import load_kernels, unavailable_reason
from ..kernels.kernel_set import KernelSet
from ..kernels.selfcheck import (
    Mismatch,
    check_attention,
    check_linear,
    check_rowwise,
    combined_digest,
)
from ..models.config import ModelConfig
from ..models.decoder import Decoder
from ..models.registry import build_model
from .config import EngineConfig

_PREFERENCE = {"cpu": ("native", "torch"), "cuda": ("triton", "torch")}
"""The order in which ``auto`` tries a device's providers: by measured speed."""

_ROWS = (*range(1, 18), 24, 31, 48, 64, 100, 129)
"""Batch sizes of the self-check: every remainder of the kernels' row tiles, and larger ones."""


@dataclass(frozen=True, slots=True)
class KernelChoice:
    """The kernels in use, the decoder packed for them, and how they proved themselves."""

    kernels: KernelSet
    decoder: Decoder
    digest: str
    why: str


def choose_kernels(
    config: EngineConfig,
    model: ModelConfig,
    weights: Mapping[str, Tensor],
    dtype: torch.dtype,
    max_model_len: int,
    device: torch.device,
) -> KernelChoice:
    """The first provider that is available and passes its self-check.

    :raises ConfigError: the provider asked for cannot run here.
    :raises SelfCheckError: none kept its contract; the message has every mismatch.
    """
    if not config.deterministic:
        name = "library" if config.kernels == "auto" else config.kernels
        kernels = load_kernels(name, device)
        decoder = build_model(model, weights, kernels, dtype, max_model_len)
        return KernelChoice(kernels, decoder, "unchecked", "deterministic=False: not checked")
    names = _PREFERENCE[device.type] if config.kernels == "auto" else (config.kernels,)
    demoted: list[str] = []
    for name in names:
        reason = unavailable_reason(name, device)
        if reason is not None:
            if config.kernels != "auto":
                raise ConfigError(f"kernels={name!r} cannot run here: {reason}")
            demoted.append(f"{name}: {reason}")
            continue
        kernels = load_kernels(name, device)
        decoder = build_model(model, weights, kernels, dtype, max_model_len)
        mismatches, digest = check_decoder(decoder, kernels, dtype, config.page_size)
        if not mismatches:
            demoted += kernels.demoted(device)  # what the self-check's products showed
            why = f"self-check {digest}" + "".join(f"; not {d}" for d in demoted)
            return KernelChoice(kernels, decoder, digest, why)
        demoted.append(f"{name}: " + "; ".join(str(m) for m in mismatches))
    raise SelfCheckError(
        "no kernels keep their contract on this machine, so the engine does not start:\n  "
        + "\n  ".join(demoted)
    )


def check_decoder(
    decoder: Decoder, kernels: KernelSet, dtype: torch.dtype, page_size: int
) -> tuple[list[Mismatch], str]:
    """Judge the very linears and kernels that will serve; the mismatches and a digest."""
    model = decoder.config
    device = decoder.embed_tokens.device
    results = (
        check_linear(decoder.linears(), _ROWS, dtype, device),
        check_attention(
            kernels, model.num_q_heads, model.num_kv_heads, model.head_dim, page_size, dtype, device
        ),
        check_rowwise(kernels, model.hidden_size, model.vocab_size, device),
    )
    mismatches = [mismatch for result in results for mismatch in result.mismatches]
    return mismatches, combined_digest(results)


def check_attention_backend(
    config: EngineConfig, selection: Selection, backend: AttentionBackend
) -> str:
    """The digest of the backend's self-check, where it declares one; empty where none was made.

    It is made on a backend and a cache of its own.

    :raises ConfigError: its kernels cannot run.
    :raises SelfCheckError: it does not keep what it declares; the message has every mismatch.
    """
    spec = selection.spec
    if not (spec.self_check and config.deterministic):
        return ""
    try:
        result = check_backend(type(backend), backend.config, spec.capabilities)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        other = f": {spec.install}" if spec.install else f" of {selection.distribution}."
        raise ConfigError(
            f"attention backend {spec.name!r} ({backend.library() or selection.version}) cannot "
            f"compute its self-check: {type(error).__name__}: {error}. Pass another "
            f"attention_backend, or install another version{other}"
        ) from error
    if result.mismatches:
        raise SelfCheckError(
            f"attention backend {spec.name!r} ({backend.library() or selection.version}) does not "
            "keep what it declares on this machine, so the engine does not start. Pass another "
            "attention_backend.\n  " + "\n  ".join(str(m) for m in result.mismatches)
        )
    return result.digest
