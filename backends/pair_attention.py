"""Runs a pair of backends over one KV cache: prefills by the one, decodes by the other.

A step's decodes are its first rows; each backend gets its own sequences, as if the step had no
others. So what a pair gives for a row is, bit for bit, what that row's backend gives. The engine
writes K and V before either attends, hence both see the whole step.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .base import AttentionBackend, AttentionConfig, Batch, LayerCache, first_decodes


@dataclass(frozen=True, slots=True)
class PairPlan:
    """One step.

    num_decodes: rows of the decodes, the first ones
    decode, prefill: each backend's plan of its own sequences; ``None`` where it has none
    """

    num_decodes: int
    decode: Any
    prefill: Any


class PairAttention(AttentionBackend):
    """Two backends of one config; ``pair_class`` makes the subclass that knows which.

    Only decodes are captured, so ``capture`` and ``replay`` are the decode backend's. To it the
    decodes of a mixed step are a decode step like any other.
    """

    PREFILL: ClassVar[type[AttentionBackend]]
    DECODE: ClassVar[type[AttentionBackend]]

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__(config)
        self._prefill = self.PREFILL(config)
        self._decode = self.DECODE(config)

    @classmethod
    def load(cls) -> None:
        cls.PREFILL.load()
        cls.DECODE.load()

    @classmethod
    def library(cls) -> str:
        found = {"prefill": cls.PREFILL.library(), "decode": cls.DECODE.library()}
        return ", ".join(f"{phase}: {library}" for phase, library in found.items() if library)

    def plan(self, batch: Batch) -> PairPlan:
        n, mixed = batch.num_decodes, 0 < batch.num_decodes < batch.num_seqs
        decode = prefill = None
        if n:
            decode = self._decode.plan(first_decodes(batch, n) if mixed else batch)
        if n < batch.num_seqs:
            prefill = self._prefill.plan(_prefills(batch) if mixed else batch)
        return PairPlan(n, decode, prefill)

    def run_written(self, q: Tensor, layer: LayerCache, plan: PairPlan, out: Tensor) -> None:
        n = plan.num_decodes
        if n:
            self._decode.run_written(q[:n], layer, plan.decode, out[:n])
        if n < len(q):
            self._prefill.run_written(q[n:], layer, plan.prefill, out[n:])

    def capture(self, max_num_seqs: int) -> None:
        self._decode.capture(max_num_seqs)

    def replay(self, plan: PairPlan, batch: Batch) -> None:
        self._decode.replay(plan.decode, batch)


def _prefills(batch: Batch) -> Batch:
    """The prefills of a mixed step.

    Copies: a kernel may be compiled differently for a tensor that begins at an odd address.
    """
    n = batch.num_decodes
    return Batch(
        token_ids=batch.token_ids[n:].clone(),
        positions=batch.positions[n:].clone(),
        slot_mapping=batch.slot_mapping[n:].clone(),
        cu_seqlens_q=batch.cu_seqlens_q[n:] - n,
        seq_lens=batch.seq_lens[n:].clone(),
        block_table=batch.block_table[n:].clone(),
        query_lens=batch.query_lens[n:],
        kv_lens=batch.kv_lens[n:],
        num_decodes=0,
    )


@functools.cache
def pair_class(
    prefill: type[AttentionBackend], decode: type[AttentionBackend]
) -> type[PairAttention]:
    """The class of a pair, always the same one; its name is what finds it in this module."""
    name = ",".join(f"{part.__module__}:{part.__qualname__}" for part in (prefill, decode))
    return type(
        name, (PairAttention,), {"PREFILL": prefill, "DECODE": decode, "__module__": __name__}
    )


def __getattr__(name: str) -> type[PairAttention]:
    """The pair ``"module:Class,module:Class"``, so that a ``factory`` can name it as any class."""
    parts = [part.partition(":") for part in name.split(",")]
    if len(parts) != 2 or not all(colon for _, colon, _ in parts):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    prefill, decode = (getattr(importlib.import_module(m), c) for m, _, c in parts)
    return pair_class(prefill, decode)
