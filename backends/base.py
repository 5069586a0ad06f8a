"""The contract of an attention backend: what the engine hands it, and what it must give back.

The engine knows backends only through this file. A backend is one object per engine. It owns
the *shape* of its KV cache (``kv_cache_shape``), turns each step's ``Batch`` into a plan of its
own once (``plan``), and then runs every layer against that plan (``run``, or ``run_written`` where
it declares ``engine_writes_kv``). ``docs/plugins.md`` explains the contract with examples;
``API_VERSION`` is its version.

All calls come from one thread, on a CUDA device on one stream, in this order::

    plan, run (layer 0), run (layer 1), …                      an ordinary step
    capture, then per batch size: plan, run, run, …            while graphs are captured
    replay, then the captured kernels of every run             a step from a graph
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

    num_layers: of the model; each has a ``LayerCache`` and one ``run`` a step
    num_q_heads: query heads, a multiple of ``num_kv_heads``
    num_kv_heads: KV heads; query head ``h`` reads KV head ``h // (num_q_heads // num_kv_heads)``
    head_dim:   channels of one head, of q, k and v alike
    scale:      multiplies the scores; ``head_dim ** -0.5`` unless the model says otherwise
    page_size:  tokens a page
    dtype:      of q, k, v, ``out`` and the cache
    device:     where all tensors are
    max_model_len: the longest a sequence becomes, in tokens
    sliding_windows: an entry a layer, or empty where no layer has a window: under window ``w`` the
        row at position ``p`` sees positions ``max(0, p - w + 1) … p``; ``None`` sees all earlier
        ones. Asked only of a backend that declares ``sliding_window``
    logit_soft_cap: ``c`` turns each scaled score ``s`` into ``c * tanh(s / c)`` before it is
        masked. Asked only of a backend that declares ``logit_soft_cap``
    deterministic: ``False`` where the user lifted the constraints: a backend may then choose any
        order of reduction
    kernels:    the provider that the engine runs its own ops with
        (``kernels.dispatch.load_kernels``), for backends that use Isobit's attention kernels
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
    sliding_windows: tuple[int | None, ...] = ()
    logit_soft_cap: float | None = None
    deterministic: bool = True
    kernels: str = "auto"

    def sliding_window(self, layer: int) -> int | None:
        """The window of one layer, in tokens; ``None`` where it sees every earlier token."""
        return self.sliding_windows[layer] if self.sliding_windows else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One model step: ``B`` sequences that bring ``T`` new tokens, packed end to end.

    Sequence ``b`` owns the rows ``cu_seqlens_q[b] : cu_seqlens_q[b + 1]`` of every packed tensor;
    those rows are its positions ``seq_lens[b] - query_lens[b] … seq_lens[b] - 1``. Sequences in
    their decode phase (one row each) come first. A prefill may bring one row too; only its place
    tells it from a decode.

    Page 0 is the *null page*: no sequence owns it, and what it holds means nothing. A captured
    graph's batch is filled up with *padding*: sequences in their decode phase of length 1 whose
    only page and slot lie in the null page; their rows of ``out`` are never read.

    token_ids:    int64 ``[T]``
    positions:    int64 ``[T]``, absolute
    slot_mapping: int64 ``[T]``, ``page * page_size + offset`` where the row's K and V go
    cu_seqlens_q: int32 ``[B + 1]``, where each sequence's rows begin; the last entry is ``T``
    seq_lens:     int32 ``[B]``, KV length including this step's rows
    block_table:  int32 ``[B, max_pages]``, each sequence's pages in order; entries past its last
        page are 0, the null page
    query_lens:   rows of each sequence as Python ints, for planning without a device copy
    kv_lens:      ``seq_lens`` as Python ints
    num_decodes:  how many sequences, the first ones, are in their decode phase
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


def first_decodes(batch: Batch, count: int) -> Batch:
    """The first ``count`` sequences of a batch, all of which decode, over the same tensors."""
    return Batch(
        token_ids=batch.token_ids[:count],
        positions=batch.positions[:count],
        slot_mapping=batch.slot_mapping[:count],
        cu_seqlens_q=batch.cu_seqlens_q[: count + 1],
        seq_lens=batch.seq_lens[:count],
        block_table=batch.block_table[:count],
        query_lens=batch.query_lens[:count],
        kv_lens=batch.kv_lens[:count],
        num_decodes=count,
    )


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's part of the KV cache.

    index: the layer, from 0
    k, v:  in the config's dtype, each of the shape that ``kv_cache_shape`` asked for, contiguous;
        the same tensors in every step
    """

    index: int
    k: Tensor
    v: Tensor


class AttentionBackend(ABC):
    """Causal grouped-query attention over a paged KV cache.

    :param config: what to serve; only what the backend's ``Capabilities`` declare is ever asked.
    """

    def __init__(self, config: AttentionConfig) -> None:
        self.config = config

    @classmethod  # noqa: B027 - most classes have nothing to load
    def load(cls) -> None:
        """Load the libraries that the class needs; called when it is chosen, before it is made.

        ``isobit doctor`` and ``"auto"`` call it to learn whether they load; so it may come again.

        :raises ConfigError: one is missing or cannot be loaded here; with the remedy.
        """

    @classmethod
    def library(cls) -> str:
        """The library that ``load`` loaded, with its version, where it is one of several.

        It stands in the start-up report, in the fingerprint and in proofs; empty where ``requires``
        names all there is to know.
        """
        return ""

    def kv_cache_shape(self, num_pages: int) -> tuple[int, ...]:
        """Shape of one layer's K (and of its V): ``[num_pages, page_size, kv_heads, head_dim]``.

        The first axis must be the page. The engine allocates both, uninitialised: a slot that no
        sequence has written may hold anything, NaN too, and must not reach ``out``.

        A backend that declares ``engine_writes_kv`` keeps this shape.
        """
        c = self.config
        return (num_pages, c.page_size, c.num_kv_heads, c.head_dim)

    @abstractmethod
    def plan(self, batch: Batch) -> Any:
        """Prepare one step; called once per step, before any layer runs.

        The returned plan is passed to every ``run`` of that step and dropped afterwards. It may
        keep the batch's tensors, which stay as they are until the step's last kernel has run. It
        may copy to the device; a host buffer that such a copy reads must not be written again, nor
        freed with the backend, before the copy is done: the next step is planned while this one
        still runs.
        """

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, layer: LayerCache, plan: Any, out: Tensor
    ) -> None:
        """Write this step's ``k`` and ``v`` into ``layer``, then attend.

        Every backend has this method, unless it declares ``engine_writes_kv``.

        q, out: ``[T, q_heads, head_dim]``; k, v: ``[T, kv_heads, head_dim]``, all contiguous and
        in the config's dtype. ``out`` is uninitialised and filled in place; row ``t`` sees KV
        positions ``0 … positions[t]`` of its own sequence (less under a sliding window). Query
        head ``h`` reads KV head ``h // (q_heads // kv_heads)``.

        Row ``t`` of ``k`` and ``v`` goes to slot ``slot_mapping[t]``, and no other slot is written.
        Nothing is kept of ``q``, ``k``, ``v`` and ``out``: their memory is reused at once.
        """
        raise NotImplementedError(
            f"{type(self).__name__} writes no K and V: it must declare engine_writes_kv"
        )

    def run_written(self, q: Tensor, layer: LayerCache, plan: Any, out: Tensor) -> None:
        """``run`` of a backend that declares ``engine_writes_kv``: attend, and write only ``out``.

        Row ``t`` of this step's K and V lies in slot ``slot_mapping[t]`` of ``layer`` already.
        """
        raise NotImplementedError(f"{type(self).__name__} does not declare engine_writes_kv")

    def capture(self, max_num_seqs: int) -> None:
        """Make ready for captured graphs; called once, only where ``cuda_graph`` is declared.

        Afterwards the engine plans decode batches of several sizes up to ``max_num_seqs``
        sequences, each of up to ``max_model_len`` tokens, and records the ``run`` of every layer
        against each plan. Such a plan lives as long as the engine. A recorded ``run`` may touch
        only what stays at its address: its arguments, the batch's tensors, and what the plan or
        the backend owns. It may not wait for the device, nor let a length decide on the host.
        """
        raise NotImplementedError(f"{type(self).__name__} does not declare cuda_graph")

    def replay(self, plan: Any, batch: Batch) -> None:
        """Refresh ``plan`` in place; called before a graph recorded against it is replayed.

        ``batch`` has the tensors that ``plan`` was made from, now with the new step's values, and
        the new step's ``query_lens`` and ``kv_lens``, padding included.
        """
        raise NotImplementedError(f"{type(self).__name__} does not declare cuda_graph")
