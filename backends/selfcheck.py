"""Shows, at start-up, that a backend keeps on this machine what it declares of its bits.

For backends whose kernels a library chooses (``BackendSpec.self_check``). One sequence is computed
whole, in chunks, by decoding, alone and among others, on caches that hold NaN where nothing was
written; all ways must give the same bits, and some rows are compared with attention in float64.
The digest of the bits goes into the fingerprint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..kernels.selfcheck import CheckResult, Mismatch, normal, outliers
from .base import AttentionBackend, AttentionConfig, Batch, LayerCache
from .capabilities import Capabilities

LENGTH = 2101
"""Tokens of the sequence: enough for a library to split them, and no multiple of a page."""

_CUTS = (1, 38, 64, 127, 128, 640, 641, 1500)
_EDGES = (0, 1, 63, 64, 65, 127, 128, 129, 500, 1023, 1024)
_CROWDS = (2, 7, 40, 150)
"""Decodes in one step: fewer than fill a GPU, and more."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """The positions ``start … stop - 1`` of sequence 0, or of its shorter neighbour, 1."""

    sequence: int
    start: int
    stop: int
    decode: bool = False


def check_backend(
    factory: Callable[[AttentionConfig], AttentionBackend],
    config: AttentionConfig,
    offers: Capabilities,
) -> CheckResult:
    """Judge a backend made for the engine's own ``config``, once for each window of its layers.

    The sequence is as long in every engine, so that the digest does not follow ``max_model_len``.
    """
    config = replace(config, max_model_len=max(LENGTH, config.max_model_len))
    result = CheckResult()
    windows = config.sliding_windows or (None,)
    for window in dict.fromkeys(windows):
        subject = _Subject(factory(config), windows.index(window), offers.engine_writes_kv)
        _check_layer(result, subject, offers)
    return result


def _check_layer(result: CheckResult, subject: _Subject, offers: Capabilities) -> None:
    length, (whole,) = LENGTH, subject.attend(_Piece(0, 0, LENGTH))
    result.record(whole)
    op = f"attention, {subject.name}"
    result.expect_equal(op, "again", whole, subject.attend(_Piece(0, 0, length))[0])
    neighbour = _Piece(1, 0, subject.lengths[1])
    subject.attend(neighbour)  # a backend that writes K and V has them now
    edges = [*(p for p in _EDGES if p < length), length - 1]
    _expect_right(result, op, "at", subject, edges, whole[edges])
    decodes = [_Piece(0, p, p + 1, decode=True) for p in [*edges, *_spread(length, _CROWDS[-1])]]
    alone = torch.cat([subject.attend(piece)[0] for piece in decodes])
    if offers.decode_equals_prefill:
        rows = whole[[piece.start for piece in decodes]]
        result.expect_equal(op, "by decoding", rows, alone)
    else:  # bits of their own, which must be attention too
        result.record(alone)
        _expect_right(result, op, "decoding", subject, edges, alone)
    for count in _CROWDS:
        for first in range(0, len(decodes), count):
            together = torch.cat(subject.attend(*decodes[first : first + count]))
            what = f"decoding {len(together)} rows at once, from row {first} on"
            result.expect_equal(op, what, alone[first : first + count], together)
    beside = [_Piece(1, p, p + 1, decode=True) for p in _spread(neighbour.stop, 7)]
    *_, among = subject.attend(*beside, neighbour, _Piece(0, 0, length))
    result.expect_equal(op, "beside others", whole, among)
    if offers.chunk_invariant:
        step = offers.alignment
        cuts = sorted({0, length, *(c for cut in _CUTS if (c := -(-cut // step) * step) < length)})
        chunks = [subject.attend(_Piece(0, a, b))[0] for a, b in pairwise(cuts)]
        result.expect_equal(op, "in chunks", whole, torch.cat(chunks))


def _expect_right(
    result: CheckResult,
    op: str,
    how: str,
    subject: _Subject,
    positions: Sequence[int],
    rows: Tensor,
) -> None:
    for position, row in zip(positions, rows, strict=False):
        if not subject.is_right(position, row):
            what = f"{how} position {position} than attention in float64, beyond any rounding"
            result.mismatches.append(Mismatch(op, what))


def _spread(length: int, count: int) -> list[int]:
    """Positions of a sequence from its first to its last."""
    return [(length - 1) * i // (count - 1) for i in range(count)]


class _Subject:
    """A backend, one of its layers, and two sequences of which it has the K and V."""

    def __init__(self, backend: AttentionBackend, layer: int, engine_writes_kv: bool) -> None:
        self._backend, self._config, self._written = backend, backend.config, engine_writes_kv
        c = self._config
        self.lengths = (LENGTH, -(-LENGTH // 3))
        window = c.sliding_window(layer)
        self._seen = c.max_model_len if window is None else window
        self.name = f"{c.num_q_heads}/{c.num_kv_heads}x{c.head_dim}, window {window or 'none'}"
        own = [self._values(i) for i in range(3)]
        self._rows = [own, [values.flip(0) for values in own]]  # q, k, v of each sequence
        width = -(-LENGTH // c.page_size)
        # Page 0 stays empty; the sequence's pages descend.
        pages = torch.arange(2 * width, 0, -1, dtype=torch.int32).view(2, width)
        self._table = pages.to(c.device)
        shape = backend.kv_cache_shape(2 * width + 1)
        k, v = (torch.full(shape, torch.nan, dtype=c.dtype, device=c.device) for _ in range(2))
        self._cache = LayerCache(layer, k, v)
        if self._written:
            for sequence, length in enumerate(self.lengths):
                slots = self._slots(_Piece(sequence, 0, length))
                k.flatten(0, 1)[slots] = self._rows[sequence][1][:length]
                v.flatten(0, 1)[slots] = self._rows[sequence][2][:length]

    @torch.inference_mode()
    def attend(self, *pieces: _Piece) -> list[Tensor]:
        """The rows of each piece, computed in one step; pieces that decode come first."""
        batch = self._batch(pieces)
        q, k, v = (
            torch.cat([self._rows[p.sequence][i][p.start : p.stop] for p in pieces])
            for i in range(3)
        )
        out = torch.full_like(q, torch.nan)
        plan = self._backend.plan(batch)
        if self._written:
            self._backend.run_written(q, self._cache, plan, out)
        else:
            self._backend.run(q, k, v, self._cache, plan, out)
        return list(torch.split(out, list(batch.query_lens)))

    def is_right(self, position: int, row: Tensor) -> bool:
        """Whether a row ``[q_heads, head_dim]`` is what float64 gives, to within 2 %.

        The bound is a part of the weighted mean of ``|v|``: loose for a rounding, and far from what
        a wrong mask, scale or head gives.
        """
        c = self._config
        seen = slice(max(0, position - self._seen + 1), position + 1)
        group = c.num_q_heads // c.num_kv_heads
        own_q, own_k, own_v = self._rows[0]
        q = own_q[position].double().view(c.num_kv_heads, group, c.head_dim)
        k, v = own_k[seen].double(), own_v[seen].double()
        scores = torch.einsum("hgd,shd->hgs", q, k) * c.scale
        if c.logit_soft_cap is not None:
            scores = c.logit_soft_cap * torch.tanh(scores / c.logit_soft_cap)
        weights = scores.softmax(-1)
        expected = torch.einsum("hgs,shd->hgd", weights, v).flatten(0, 1)
        bound = torch.einsum("hgs,shd->hgd", weights, v.abs()).flatten(0, 1) / 50 + 1e-6
        return bool(((row.double() - expected).abs() <= bound).all())

    def _values(self, index: int) -> Tensor:
        """The values of q, k or v ``[length, heads, head_dim]``; outliers in v only.

        In q and k they would put each row's whole weight on one position.
        """
        c = self._config
        heads = c.num_kv_heads if index else c.num_q_heads
        draw = outliers if index == 2 else normal
        values = draw(LENGTH + index, heads * c.head_dim)[:LENGTH]
        return values.view(LENGTH, heads, c.head_dim).to(c.device, c.dtype)

    def _slots(self, piece: _Piece) -> Tensor:
        size, device = self._config.page_size, self._config.device
        positions = torch.arange(piece.start, piece.stop, device=device)
        return self._table[piece.sequence].long()[positions // size] * size + positions % size

    def _batch(self, pieces: Sequence[_Piece]) -> Batch:
        device = self._config.device
        query_lens = [p.stop - p.start for p in pieces]
        kv_lens = [p.stop for p in pieces]
        ends = torch.tensor([0, *accumulate(query_lens)], dtype=torch.int32)
        pages = torch.tensor([-(-length // self._config.page_size) for length in kv_lens])
        table = self._table[[p.sequence for p in pieces], : int(pages.max())]
        columns = torch.arange(table.shape[1], device=device)
        rows = [torch.arange(p.start, p.stop) for p in pieces]
        return Batch(
            token_ids=torch.zeros(sum(query_lens), dtype=torch.int64, device=device),
            positions=torch.cat(rows).to(device),
            slot_mapping=torch.cat([self._slots(p) for p in pieces]),
            cu_seqlens_q=ends.to(device),
            seq_lens=torch.tensor(kv_lens, dtype=torch.int32, device=device),
            block_table=table * (columns < pages.to(device)[:, None]),
            query_lens=query_lens,
            kv_lens=kv_lens,
            num_decodes=sum(p.decode for p in pieces),
        )
