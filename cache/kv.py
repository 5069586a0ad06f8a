"""The tensors behind the pages: one K and one V per layer, in the backend's own shape."""

from __future__ import annotations

import math

import torch

from ..backends.base import AttentionBackend, LayerCache
from ..errors import ConfigError


def bytes_per_page(backend: AttentionBackend) -> int:
    """Bytes that one page takes over all layers, K and V together."""
    config = backend.config
    values = math.prod(backend.kv_cache_shape(1))
    return 2 * config.num_layers * values * config.dtype.itemsize


def allocate_layers(backend: AttentionBackend, num_pages: int) -> list[LayerCache]:
    """One uninitialised cache a layer, of the null page and ``num_pages`` that the pool hands out.

    :raises ConfigError: the machine has not that much memory.
    """
    config = backend.config
    shape = backend.kv_cache_shape(1 + num_pages)

    def tensor() -> torch.Tensor:
        return torch.empty(shape, dtype=config.dtype, device=config.device)

    try:
        return [LayerCache(index, tensor(), tensor()) for index in range(config.num_layers)]
    except RuntimeError as error:  # what torch raises when an allocation fails
        raise ConfigError(
            f"a KV cache of {num_pages * bytes_per_page(backend)} bytes was asked for, but the "
            f"memory cannot be had: {error}. Lower kv_cache_memory, or on a GPU "
            "gpu_memory_utilization."
        ) from error
