"""``y = x @ W^T`` for a weight that is prepared once.

Contract (native): K is cut into blocks of 64. In each, one fp32 accumulator per output starts at
zero and takes ``fma(x[t, k], w[n, k], acc)`` for k ascending; the blocks' sums are added to a
total, ascending, from zero. Nothing else: the bits are the same for any number of rows, any thread
count and any instruction set. The blocks are there for accuracy: the error of
one accumulator grows with K. bf16 is widened exactly.

Contract (torch): rows are taken in tiles of exactly 16, the last one padded with zeros, and every
tile is one library product of the same shape, ``[16, K] @ [K, N]`` in fp32, at the same memory
alignment, on one thread. The library picks its reduction order from the shape, and the shape never
changes; where N is small it shares K out over threads, so there is only one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .native.library import library
from .threads import one_thread

PANEL = 32
"""Columns packed side by side; ``common.h`` says the same."""

ROW_TILE = 16


class TorchLinear:
    """Tiles of 16 rows, each one library product in fp32."""

    def __init__(self, weight: Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        self._weight = weight.detach().float().clone(memory_format=torch.contiguous_format)

    def __call__(self, x: Tensor) -> Tensor:
        return self.accumulators(x).to(x.dtype)

    def accumulators(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        tiles = -(-rows // ROW_TILE)
        # Always a copy: the library may choose its order from the operand's alignment.
        padded = self._weight.new_zeros(tiles * ROW_TILE, self.in_features)
        padded[:rows] = x
        out = self._weight.new_empty(tiles * ROW_TILE, self.out_features)
        with one_thread():
            for start in range(0, tiles * ROW_TILE, ROW_TILE):
                tile = slice(start, start + ROW_TILE)
                out[tile] = functional.linear(padded[tile], self._weight)
        return out[:rows]


class NativeLinear:
    """The C kernel over a weight packed as ``[ceil(N / 32), K, 32]``, in fp32 or bf16."""

    def __init__(self, weight: Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        self._packed = _pack(weight.detach())
        self._is_bf16 = int(weight.dtype == torch.bfloat16)

    def __call__(self, x: Tensor) -> Tensor:
        return self.accumulators(x).to(x.dtype)

    def accumulators(self, x: Tensor) -> Tensor:
        x = x.float().contiguous()
        out = torch.empty(x.shape[0], self.out_features)
        library().isobit_linear(
            x.data_ptr(),
            self._packed.data_ptr(),
            self._is_bf16,
            out.data_ptr(),
            x.shape[0],
            self.out_features,
            self.in_features,
            torch.get_num_threads(),
        )
        return out

    def canonical(self, x: Tensor, columns: slice) -> Tensor:
        """``accumulators(x)[:, columns]`` by the contract's own loop, one scalar fma at a time."""
        start, stop, _ = columns.indices(self.out_features)
        x = x.float().contiguous()
        out = torch.empty(x.shape[0], stop - start)
        library().isobit_linear_canonical(
            x.data_ptr(),
            self._packed.data_ptr(),
            self._is_bf16,
            out.data_ptr(),
            x.shape[0],
            start,
            stop,
            self.in_features,
        )
        return out


def _pack(weight: Tensor) -> Tensor:
    """``[N, K]`` -> ``[ceil(N / 32), K, 32]``, missing columns zero."""
    n, k = weight.shape
    panels = -(-n // PANEL)
    padded = functional.pad(weight, (0, 0, 0, panels * PANEL - n))
    return padded.view(panels, PANEL, k).transpose(1, 2).contiguous()
