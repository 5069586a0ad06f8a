"""Log-probabilities over the vocabulary.

``out[v] = (x[v] - max) - log(sum_v e^(x[v] - max))``, one row at a time.

Contract (native): the exact maximum; ``e^(x[v] - max)`` added to lane ``v mod 16``, v ascending;
the 16 lanes added in halves; the logarithm in fp64, rounded to fp32. Contract (torch): the same
but for the sum, which is ``elementary.tree_sum``. A logit of -inf is a token of probability zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .elementary import exp_f32, log_f64, tree_sum
from .native.library import library


def log_softmax_torch(logits: Tensor) -> Tensor:
    """fp32 ``[R, V]`` -> fp32 ``[R, V]``."""
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    total = tree_sum(exp_f32(shifted))
    return shifted - log_f64(total.double()).float().unsqueeze(-1)


def log_softmax_native(logits: Tensor) -> Tensor:
    """fp32 ``[R, V]`` -> fp32 ``[R, V]``."""
    logits = logits.contiguous()
    rows, vocab = logits.shape
    out = torch.empty_like(logits)
    library().isobit_log_softmax(
        logits.data_ptr(), out.data_ptr(), rows, vocab, torch.get_num_threads()
    )
    return out
