"""``y = x @ W^T`` on the GPU, each shape by the fastest way that keeps one order.

Contract: ``matmul.py``'s, whatever computes it: K ascending into one fp32 accumulator, never split.
Which candidate runs is chosen a weight shape and a row-count bucket at a time (``choices.py``).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .candidates import bucket_of, canonical, pieces, prepared
from .choices import Chooser, choice_file, median_ms
from .launch import aligned
from .trials import Problem


@functools.cache
def chooser(device: torch.device) -> Chooser:
    """The one that serves every linear on a CUDA device."""
    return Chooser(choice_file(device), median_ms)


def demoted(device: torch.device) -> list[str]:
    """The ways to compute a linear that gave other bits on ``device``, a line each."""
    return chooser(device).report() if device.type == "cuda" else []


class TritonLinear:
    """A weight ``[N, K]`` in bf16, fp16 or fp32, kept where it is: it must not change afterwards.

    In Triton's interpreter the canonical tile computes every product.
    """

    def __init__(self, weight: Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        self._weight = aligned(weight.detach())

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x, self._weight.dtype).to(x.dtype)

    def accumulators(self, x: Tensor) -> Tensor:
        return self._product(x, torch.float32)

    def tune(self, rows: int) -> None:
        """Choose now how ``rows`` rows are computed, with either result, before graphs need it."""
        x = self._weight.new_zeros(rows, self.in_features)
        self(x)
        self.accumulators(x)

    def _product(self, x: Tensor, out_dtype: torch.dtype) -> Tensor:
        sizes = pieces(x.shape[0])
        if len(sizes) < 2:
            return self._bucket(prepared(x, self._weight.dtype), out_dtype, None)
        out = torch.empty(x.shape[0], self.out_features, dtype=out_dtype, device=x.device)
        for piece, result in zip(x.split(sizes), out.split(sizes), strict=True):
            self._bucket(prepared(piece, self._weight.dtype), out_dtype, result)
        return out

    def _bucket(self, x: Tensor, out_dtype: torch.dtype, out: Tensor | None) -> Tensor:
        weight = self._weight
        if not weight.is_cuda or x.shape[0] == 0:
            return canonical(x, weight, out_dtype, out)
        bucket = bucket_of(x.shape[0])
        problem = Problem(self.out_features, self.in_features, weight.dtype, out_dtype, bucket)
        way = chooser(weight.device).choose(problem, weight)
        return way(x, weight, out_dtype, bucket, out)
