"""Sampled tokens that the device may still be working on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isfinite

import torch
from torch import Tensor

from ..errors import EngineError
from ..kernels.transfer import HostCopy
from .ranks import RankedRows
from .rows import SampledRow


class Sampled:
    """What a launch gives: tokens on the device now, and on the host once they are read.

    token_ids: int64 ``[R]``, on the device; a valid id also where no token is possible

    :param highest: fp32 ``[R]``, the maxima of the raw logits, NaN where a row holds one
    :param scores: fp32 ``[R]``, what the tokens were chosen for, not finite where none is possible
    :param logprobs: fp32 ``[R]``, of the tokens
    :param num_top: how many of the likeliest tokens each row lists; None without a rank
    :param ranked: the rows that have a ``num_top``
    """

    def __init__(
        self,
        token_ids: Tensor,
        highest: Tensor,
        scores: Tensor,
        logprobs: Tensor,
        num_top: Sequence[int | None],
        ranked: Sequence[RankedRows],
    ) -> None:
        self.token_ids = token_ids
        self._num_top = tuple(num_top)
        self._ranked_rows = [part.rows for part in ranked]
        parts = [highest, scores, token_ids, logprobs]
        for part in ranked:
            parts += [part.ranks, part.top_ids, part.top_logprobs]
        self._shapes = [part.shape for part in parts]
        # One copy to the host: fp64 holds every id and every fp32 number as it is.
        self._copy = HostCopy(torch.cat([part.double().flatten() for part in parts]))

    def read(self, wanted: Sequence[bool] | None = None) -> list[SampledRow]:
        """One row's token each, in order. The host waits for the device here, and only here.

        :param wanted: which rows matter to anybody; None for all. The others are not judged, and
            what is read of them means nothing.
        :raises EngineError: where a row holds NaN or +inf, or no possible token.
        """
        flat = torch.split(self._copy.read(), [shape.numel() for shape in self._shapes])
        parts = [part.view(shape) for part, shape in zip(flat, self._shapes, strict=True)]
        highest, scores, token_ids, logprobs, *ranked = parts
        refuse_unusable(highest, wanted)
        _refuse_impossible(scores, wanted)
        rows = [
            SampledRow(token_id, logprob, None, ())
            for token_id, logprob in zip(token_ids.long().tolist(), logprobs.tolist(), strict=True)
        ]
        for at, which in enumerate(self._ranked_rows):
            ranks, top_ids, top_logprobs = ranked[3 * at : 3 * at + 3]
            ids, values = top_ids.long().tolist(), top_logprobs.tolist()
            for i, rank, *top in zip(which, ranks.long().tolist(), ids, values, strict=True):
                likeliest = tuple(zip(*top, strict=True))[: self._num_top[i]]
                rows[i] = replace(rows[i], rank=rank, top=likeliest)
        return rows


def refuse_unusable(highest: Tensor, wanted: Sequence[bool] | None = None) -> None:
    """Raise where one of the rows' maxima ``[R]`` shows NaN or +inf; waits for the device.

    :raises EngineError: naming the row.
    """
    for i, value in enumerate(highest.tolist()):
        if not isfinite(value) and (wanted is None or wanted[i]):
            raise EngineError(
                f"Row {i} of the logits is not usable: wanted finite values (or -inf for "
                f"impossible tokens), its maximum is {value}. The model or its weights produced it."
            )


def _refuse_impossible(best: Tensor, wanted: Sequence[bool] | None) -> None:
    for i, score in enumerate(best.tolist()):
        if not isfinite(score) and (wanted is None or wanted[i]):
            raise EngineError(
                f"Row {i} leaves no token to choose: its best score is {score}. Either "
                "min_tokens rules out the whole vocabulary, or the logits overflowed."
            )
