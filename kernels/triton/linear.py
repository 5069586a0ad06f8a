"""``y = x @ W^T`` on the GPU, each shape by the fastest way that keeps one order.

Contract: ``matmul.py``'s, whatever computes it.
Which candidate runs is chosen a weight shape and a row-count bucket at a time (``choices.py``).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import Tensor

from ..kernel_set import Linear
from .candidates import bucket_of, buckets_met, canonical, pieces, prepared
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

    @property
    def on_gpu(self) -> bool:
        return self._weight.is_cuda

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x, self._weight.dtype).to(x.dtype)

    def accumulators(self, x: Tensor) -> Tensor:
        return self._product(x, torch.float32)

    def tune(self, rows: int, *, accumulators: bool = False) -> None:
        """Choose now how ``rows`` rows are computed, before a graph or a step needs it."""
        x = self._weight.new_zeros(rows, self.in_features)
        self._product(x, torch.float32 if accumulators else self._weight.dtype)

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


def prepare(layers: Iterable[Linear], head: Linear, most_rows: int, most_logits: int) -> None:
    """Choose how every product that may come is computed, so that no step waits for a choice.

    :param layers: all whose results are taken in the weight's dtype; one of each shape is looked at
    :param head: whose accumulators are taken
    :param most_rows: of a step
    :param most_logits: rows of the head at most
    """
    shapes = {(each.out_features, each.in_features): each for each in layers}
    for linear in shapes.values():
        for rows in buckets_met(most_rows):
            _tune(linear, rows, accumulators=False)
    for rows in buckets_met(most_logits):
        _tune(head, rows, accumulators=True)


def _tune(linear: Linear, rows: int, *, accumulators: bool) -> None:
    """Off the GPU there is nothing to choose, nor for what somebody put in a linear's place."""
    if isinstance(linear, TritonLinear) and linear.on_gpu:
        linear.tune(rows, accumulators=accumulators)
