"""The model's own distribution: logprobs before temperature, penalties and filters."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.kernel_set import KernelSet


class Distribution:
    """Logprobs of rows of logits, fp32 ``[R, V]``: only those asked for, where the kernels can."""

    def __init__(self, logits: Tensor, kernels: KernelSet) -> None:
        self.logits = logits
        self._kernels = kernels
        self._whole: Tensor | None = None
        self._normalisers: tuple[Tensor, Tensor] | None = None
        if kernels.log_normalisers is not None:
            self._normalisers = kernels.log_normalisers(logits)

    def whole(self) -> Tensor:
        """Of all tokens, fp32 ``[R, V]``."""
        if self._whole is None:
            self._whole = self._kernels.log_softmax(self.logits)
        return self._whole

    def of(self, rows: Tensor, token_ids: Tensor) -> Tensor:
        """Of some tokens, the bits of ``whole``: int64 ``[Q]``, ``[Q, K]`` -> fp32 ``[Q, K]``."""
        rows = rows.unsqueeze(1)
        if self._normalisers is None:
            return self.whole()[rows, token_ids]
        highest, log_totals = self._normalisers
        return (self.logits[rows, token_ids] - highest[rows]) - log_totals[rows]

    def of_each(self, token_ids: Tensor) -> Tensor:
        """Of one token of every row, int64 ``[R]`` -> fp32 ``[R]``."""
        rows = torch.arange(len(token_ids), device=token_ids.device)
        return self.of(rows, token_ids.unsqueeze(1)).squeeze(1)
