"""Looks for writes where none is allowed: other slots, the arguments, rows past ``out``."""

from __future__ import annotations

from collections.abc import Sequence as AnySequence
from dataclasses import fields

import torch
from torch import Tensor

from ...backends.base import Batch, LayerCache
from ...errors import BackendError
from .scenario import Geometry
from .values import Rows


class Audit:
    """What one step may not change, as it was before the step."""

    def __init__(self, caches: AnySequence[LayerCache], batch: Batch, geometry: Geometry) -> None:
        self._batch, self._page_size = batch, geometry.page_size
        self._engine_writes = geometry.engine_writes_kv
        self._call = "run_written" if self._engine_writes else "run"
        self._slots = batch.slot_mapping.clone()
        self._own = self._slots[:0] if self._engine_writes else self._slots
        self._pages = [(cache.k.clone(), cache.v.clone()) for cache in caches]
        self._index = {
            f.name: getattr(batch, f.name).clone()
            for f in fields(batch)
            if isinstance(getattr(batch, f.name), Tensor)
        }

    def check_layer(self, cache: LayerCache, rows: Rows, before: AnySequence[Tensor]) -> None:
        """After one layer's call; every other layer must be as it was, too."""
        for name, was, now in zip("qkv", before, (rows.q, rows.k, rows.v), strict=True):
            if not same_bits(was, now):
                raise BackendError(f"{self._call}() changed its argument {name}")
        for name, tensor in self._index.items():
            if not torch.equal(tensor, getattr(self._batch, name)):
                raise BackendError(f"{self._call}() changed the batch's {name}")
        pages = zip(
            "kv", self._pages[cache.index], (cache.k, cache.v), (rows.k, rows.v), strict=True
        )
        for name, was, now, new in pages:
            if self._engine_writes:
                was.flatten(0, 1).index_copy_(0, self._slots, new)
            self._check_pages(name, was, now)

    def check_guard(self, guard: Tensor) -> None:
        """The rows behind ``out``, which held NaN."""
        if not guard.isnan().all():
            raise BackendError(f"{self._call}() wrote rows past the end of out")

    def _check_pages(self, name: str, was: Tensor, now: Tensor) -> None:
        changed = (bits(was) != bits(now)).flatten(1).any(1)
        changed[0] = False  # the null page is nobody's
        changed[torch.unique(self._own // self._page_size)] = False
        if changed.any():
            page = int(changed.nonzero()[0])
            raise BackendError(
                f"{self._call}() wrote to page {page} of {name}, where it has no slot"
            )
        if now.dim() == 4 and now.shape[1] == self._page_size:
            slots = (bits(was) != bits(now)).flatten(0, 1).flatten(1).any(1)
            slots[: self._page_size] = False
            slots[self._own] = False
            if slots.any():
                slot = int(slots.nonzero()[0])
                raise BackendError(
                    f"{self._call}() wrote to slot {slot} of {name}: none of its own"
                )


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same bits, NaN and the sign of zero included."""
    return torch.equal(bits(one), bits(other))


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bits as integers, so that they compare one by one."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(kinds[tensor.element_size()])
