"""Chooses the attention backend, and with it the dtype that the model is computed in."""

from __future__ import annotations

import torch

from ..backends.capabilities import Requirements
from ..backends.matrix import BackendRefusedError, Selection, load_factory, select_backend
from ..errors import ConfigError
from ..models.config import ModelConfig
from ..plugins.manager import PluginHost
from .config import EngineConfig
from .devices import compute_capability

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_backend(
    config: EngineConfig, model: ModelConfig, host: PluginHost, device: torch.device
) -> tuple[Selection, torch.dtype]:
    """The backend, and the dtype: with ``auto``, float32 where the checkpoint's is not offered.

    :raises ConfigError: none can hold what is asked; the message has every reason, of the
        checkpoint's dtype where float32 is refused too.
    """

    def select(dtype: torch.dtype) -> tuple[Selection, torch.dtype]:
        asked = requirements(config, model, dtype, device)
        return select_backend(config.attention_backend, asked, host, probe=load_factory), dtype

    first = first_dtype(config, model)
    try:
        return select(first)
    except BackendRefusedError as error:
        other = config.dtype == "auto" and first != torch.float32
        if not (other and any(refusal.rule == "dtype" for refusal in error.refusals)):
            raise
        try:
            return select(torch.float32)
        except ConfigError:
            raise error from None


def first_dtype(config: EngineConfig, model: ModelConfig) -> torch.dtype:
    """The dtype that was asked for; with ``auto`` the checkpoint's."""
    return model.dtype if config.dtype == "auto" else _DTYPES[config.dtype]


def requirements(
    config: EngineConfig, model: ModelConfig, dtype: torch.dtype, device: torch.device
) -> Requirements:
    """What this configuration asks of an attention backend."""
    toggles: dict[str, bool | None] = {
        name: None if value == "auto" else bool(value)
        for name, value in (
            ("cuda_graph", config.cuda_graph),
            ("chunked_prefill", config.chunked_prefill),
            ("radix_cache", config.radix_cache),
        )
    }
    return Requirements(
        dtype=str(dtype).removeprefix("torch."),
        head_dim=model.head_dim,
        page_size=config.page_size,
        device=device.type,
        compute_capability=compute_capability(device),
        deterministic=config.deterministic,
        features=toggles
        | {
            "non_greedy_sampling": True,
            "sliding_window": model.sliding_window is not None,
            "logit_soft_cap": model.logit_soft_cap is not None,
        },
    )
