"""The contract of an attention backend: what the engine hands it, and what it must give back.

The engine knows backends only through this file. A backend is one object per engine. It owns
the *shape* of its KV cache (``kv_cache_shape``), turns each step's ``Batch`` into a plan of its
own once (``plan``), and then runs every layer against that plan (``run``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .capabilities import API_VERSION as API_VERSION


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionConfig:
    """The facts of a model and a cache that a backend is built for.

    ``scale`` multiplies the scores (``head_dim ** -0.5`` unless the model says otherwise).
    ``deterministic`` is False when the user lifted the constraints: a backend may then choose
    any reduction order. ``kernels`` is the provider that the engine runs its own ops with
    (``kernels.dispatch.load_kernels``), for backends that use Isobit's attention kernels.
    """

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    page_size: int
    dtype: torch.dtype
    device: torch.device
    max_model_len: int
    deterministic: bool = True
    kernels: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One model step: ``B`` sequences that bring ``T`` new tokens, packed end to end.

    Sequence ``b`` owns the rows ``cu_seqlens_q[b] : cu_seqlens_q[b + 1]`` of every packed tensor;
    those rows are its positions ``seq_lens[b] - query_lens[b] … seq_lens[b] - 1``. Sequences in
    their decode phase (one row each) come first: there are ``num_decodes`` of them.

    token_ids:     int64 ``[T]``
    positions:     int64 ``[T]``, absolute
    slot_mapping:  int64 ``[T]``, ``page * page_size + offset`` where the row's K and V go
    cu_seqlens_q:  int32 ``[B + 1]``
    seq_lens:      int32 ``[B]``, KV length including this step's rows
    block_table:   int32 ``[B, max_pages]``; entries past a sequence's last page are 0 and must
                   not be read
    query_lens, kv_lens: the same lengths as Python ints, for planning without a device copy
    """

    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    cu_seqlens_q: Tensor
    seq_lens: Tensor
    block_table: Tensor
    query_lens: Sequence[int]
    kv_lens: Sequence[int]
    num_decodes: int

    @property
    def num_seqs(self) -> int:
        return len(self.query_lens)

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids.shape[0])


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's K and V, each of the shape that ``kv_cache_shape`` asked for."""

    index: int
    k: Tensor
    v: Tensor


class AttentionBackend(ABC):
    """Causal grouped-query attention over a paged KV cache.

    :param config: what to serve; only what the backend's ``Capabilities`` declare is ever asked.
    """

    def __init__(self, config: AttentionConfig) -> None:
        self.config = config

    def kv_cache_shape(self, num_pages: int) -> tuple[int, ...]:
        """Shape of one layer's K (and of its V): ``[num_pages, page_size, kv_heads, head_dim]``.

        The first axis must be the page. The engine allocates both, uninitialised.
        """
        c = self.config
        return (num_pages, c.page_size, c.num_kv_heads, c.head_dim)

    @abstractmethod
    def plan(self, batch: Batch) -> Any:
        """Prepare one step; called once per step, before any layer runs.

        The returned plan is passed to every ``run`` of that step and dropped afterwards.
        """

    @abstractmethod
    def run(
        self, q: Tensor, k: Tensor, v: Tensor, layer: LayerCache, plan: Any, out: Tensor
    ) -> None:
        """Write this step's ``k`` and ``v`` into ``layer``, then attend.

        q, out: ``[T, q_heads, head_dim]``; k, v: ``[T, kv_heads, head_dim]``, all contiguous and
        in the config's dtype. ``out`` is filled in place; row ``t`` sees KV positions
        ``0 … positions[t]`` of its own sequence. Query head ``h`` reads KV head
        ``h // (q_heads // kv_heads)``.
        """

    def capture(self, max_num_seqs: int) -> None:
        """Allocate what a captured graph may touch; called where ``cuda_graph`` is declared."""
        raise NotImplementedError(f"{type(self).__name__} does not declare cuda_graph")

    def replay(self, plan: Any, batch: Batch) -> None:
        """Refresh ``plan`` in place before a captured graph is replayed for ``batch``."""
        raise NotImplementedError(f"{type(self).__name__} does not declare cuda_graph")
