"""Launches one scheduled step: tensors in, sampled tokens and logprobs on their way out.

Nothing here waits for the device, so that the next step can be launched while one runs: a token
that the host does not know yet is taken from where the last step leaves it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..backends.base import AttentionBackend, Batch, LayerCache
from ..errors import EngineError
from ..kernels.kernel_set import KernelSet
from ..kernels.transfer import to_device
from ..models.decoder import Attend, Decoder, WrittenAttention
from ..sampling.sampled import Sampled
from ..sampling.sampler import SamplingRow, sample, score_prompt
from .blaming import blaming
from .devices import current_device, stream_of
from .graphs import DecodeGraphs
from .launched import Launched, Scored, SeqResult
from .packing import pack
from .phases import explained_step
from .pieces import Heads, PiecewiseGraphs
from .request import Request
from .scheduler import ScheduledSeq, Step

LOGITS_ROWS = 256
"""Rows of logits held at once: what prompt scoring needs beyond is computed piece by piece."""

_STEP_FAILED = (
    "The step was not computed; the engine can be used again. If it comes back, report it to the "
    "backend's author or pass another attention_backend."
)

RowOwners = list[tuple[Request, int]]
"""For every packed row: its request and its absolute position."""

Observer = Callable[[str, Tensor, RowOwners], None]
"""Called after every op with its name, its packed rows and who owns them."""


class Runner:
    """A model with its backend, caches and kernels.

    ``backend_name`` is what errors call the backend; ``engine_writes_kv`` is as it declares.

    ``graphs`` are the captured decode steps, ``pieces`` those of steps with a prefill, where there
    are any.

    ``observer`` is None except while ``verify`` looks for the first op where two runs part.
    """

    def __init__(
        self,
        decoder: Decoder,
        backend: AttentionBackend,
        layers: Sequence[LayerCache],
        kernels: KernelSet,
        sampling_seed: int,
        eos_token_ids: tuple[int, ...],
        backend_name: str,
        engine_writes_kv: bool,
    ) -> None:
        self.decoder = decoder
        self.backend = backend
        self.device = backend.config.device
        self.layers = layers
        self.kernels = kernels
        self.sampling_seed = sampling_seed
        self.eos_token_ids = eos_token_ids
        self.backend_name = backend_name
        self.engine_writes_kv = engine_writes_kv
        self.observer: Observer | None = None
        self.graphs: DecodeGraphs | None = None
        self.pieces: PiecewiseGraphs | None = None
        self._last: Launched | None = None
        self._blaming = partial(
            blaming, f"attention backend {backend_name!r}", what_now=_STEP_FAILED
        )
        # Steps follow one another on one stream, whichever is the caller's current one.
        self._on_stream = stream_of(self.device)

    @torch.inference_mode()
    def launch(self, step: Step) -> Launched:
        """Start the step; what it samples can be read later.

        Nothing but the pages of the step's own new tokens is written, so a step that raises can be
        forgotten. On a CPU the step is computed when this returns.

        :raises BackendError: the backend raised an error; it is the cause.
        :raises LogitsProcessorError: a request's own processor failed.
        :raises DeviceMemoryError: the GPU's memory ran out.
        """
        with current_device(self.device), self._on_stream(), explained_step(step):
            batch = self.prepare(step.seqs)
            owners = _row_owners(step.seqs) if self.observer else []
            hidden = self.forward(batch, owners)
            self._last = self._finish(step, batch, hidden, owners)
            return self._last

    def read(self, launched: Launched) -> list[SeqResult]:
        """What a step found out, for each of its ``seqs``, in order; waits for the device.

        What it found for a sequence that no longer counts means nothing.

        :raises EngineError: logits that are not usable, or no possible token.
        """
        seqs = launched.step.seqs
        results = [SeqResult() for _ in seqs]
        for scored in launched.scored:
            if seqs[scored.index].counts:
                rows = enumerate(scored.rows.read(), scored.position)
                results[scored.index].prompt_rows.update(rows)
        if launched.sampled is not None:
            sampling = [(r, s) for r, s in zip(results, seqs, strict=True) if s.samples]
            sampled = launched.sampled.read([seq.counts for _, seq in sampling])
            for (result, _), row in zip(sampling, sampled, strict=True):
                result.sampled = row
        return results

    def prepare(self, seqs: Sequence[ScheduledSeq]) -> Batch:
        """The packed index tensors of a step, filled up to a captured size where there is one."""
        padding = 0
        if self.graphs is not None and not self.observer and all(seq.is_decode for seq in seqs):
            padding = self.graphs.padding(len(seqs)) or 0
        batch = pack(seqs, self.backend.config.page_size, self.device, padding)
        self._fill_pending(seqs, batch)
        return batch

    def forward(self, batch: Batch, owners: RowOwners) -> Tensor:
        """Hidden states ``[T, hidden]`` after the final norm; K and V land in the cache.

        A decode step of a captured size is replayed, and so are the pieces of a step with a prefill
        that is no larger than the largest of theirs, unless an observer wants to see the ops.
        """
        self._observe(owners)
        if self.graphs is not None and not self.observer and self.graphs.holds(batch):
            with self._blaming("replay"):
                return self.graphs.replay(batch)
        with self._blaming("plan"):
            plan = self.backend.plan(batch)
        if self.pieces is not None and not self.observer and self.pieces.holds(batch):
            return self.pieces.replay(batch, partial(self._attend, plan))
        return self.compute(batch, plan)

    def compute(self, batch: Batch, plan: Any) -> Tensor:
        """``forward`` under the backend's plan of the batch."""

        def attend(layer: int, *heads: Tensor) -> Tensor:
            out = torch.empty_like(heads[0])
            self._attend(plan, layer, heads, out)
            return out

        return self.model(batch.token_ids, batch.positions, batch.slot_mapping, attend)

    def model(
        self,
        token_ids: Tensor,
        positions: Tensor,
        slot_mapping: Tensor,
        attend: Callable[..., Tensor],
    ) -> Tensor:
        """Hidden states ``[T, hidden]``; all inputs are int64 ``[T]``.

        :param attend: ``(layer, *heads) -> [T, q_heads, head_dim]``, called layer by layer.
        """
        attention: Attend | WrittenAttention = attend
        if self.engine_writes_kv:
            attention = WrittenAttention(self.layers, slot_mapping, attend)
        return self.decoder.forward(token_ids, positions, attention)

    def _attend(self, plan: Any, layer: int, heads: Heads, out: Tensor) -> None:
        call = "run_written" if self.engine_writes_kv else "run"
        with self._blaming(call):
            getattr(self.backend, call)(*heads, self.layers[layer], plan, out)

    def _fill_pending(self, seqs: Sequence[ScheduledSeq], batch: Batch) -> None:
        """Copy the tokens that only the device knows from the last step to this one's rows."""
        rows, sources = [], []
        row = -1
        for seq in seqs:
            row += seq.num_tokens
            if seq.pending:
                rows.append(row)
                sources.append(self._row_of(seq.request))
        if rows:
            tokens = self._last.token_ids if self._last else None
            if tokens is None:
                raise EngineError("a token is pending, but the last step sampled none")
            index = to_device(rows + sources, torch.int64, self.device)
            batch.token_ids.index_copy_(0, index[: len(rows)], tokens[index[len(rows) :]])

    def _row_of(self, request: Request) -> int:
        row = self._last.rows.get(request) if self._last else None
        if row is None:
            raise EngineError(f"{request.request_id}: its pending token is not the last step's")
        return row

    def _finish(self, step: Step, batch: Batch, hidden: Tensor, owners: RowOwners) -> Launched:
        scored: list[Scored] = []
        sampling: list[ScheduledSeq] = []
        rows: list[int] = []
        row = 0
        for index, seq in enumerate(step.seqs):
            if seq.request.params.prompt_logprobs is not None:
                scored += self._score(index, seq, hidden, row - seq.start, owners)
            row += seq.num_tokens
            if seq.samples:
                sampling.append(seq)
                rows.append(row - 1)
        sampled = self._sample(sampling, rows, batch, hidden, owners) if rows else None
        places = {seq.request: place for place, seq in enumerate(sampling)}
        return Launched(step, sampled, places, scored)

    def _sample(
        self,
        seqs: Sequence[ScheduledSeq],
        rows: list[int],
        batch: Batch,
        hidden: Tensor,
        owners: RowOwners,
    ) -> Sampled:
        """The next token of each sequence, whose last row is the one of ``rows``."""
        self._observe([owners[row] for row in rows] if owners else [])
        index = to_device(rows, torch.int64, self.device)
        logits = self.decoder.logits(hidden[index])
        last_tokens = batch.token_ids[index] if any(seq.pending for seq in seqs) else None
        return sample(logits, [self._sampling_row(s) for s in seqs], self.kernels, last_tokens)

    def _score(
        self,
        index: int,
        seq: ScheduledSeq,
        hidden: Tensor,
        row_of_0: int,
        owners: RowOwners,
    ) -> Iterator[Scored]:
        """Logprobs of the prompt tokens that this chunk's rows predict.

        The row of position ``p`` is ``row_of_0 + p``; it predicts the token at ``p + 1``.
        """
        request = seq.request
        wanted = request.params.prompt_logprobs or 0
        first = max(seq.start, request.num_scored_tokens)
        last = min(seq.stop, request.num_prompt_tokens - 1)
        for begin in range(first, last, LOGITS_ROWS):
            end = min(begin + LOGITS_ROWS, last)
            rows = slice(row_of_0 + begin, row_of_0 + end)
            targets = request.prompt_token_ids[begin + 1 : end + 1]
            self._observe(owners[rows])
            logits = self.decoder.logits(hidden[rows])
            reports = score_prompt(logits, targets, [wanted] * len(targets), self.kernels)
            yield Scored(index, begin + 1, reports)

    def _sampling_row(self, seq: ScheduledSeq) -> SamplingRow:
        request = seq.request
        seed = request.params.seed
        return SamplingRow(
            params=request.params,
            seed=self.sampling_seed if seed is None else seed,
            choice=request.choice,
            position=seq.stop,
            prompt_token_ids=request.prompt_token_ids,
            output_token_ids=request.output_token_ids,
            eos_token_ids=self.eos_token_ids,
            request_id=request.group_id,
            pending=seq.pending,
            counts=request.token_counts,
        )

    def _observe(self, owners: RowOwners) -> None:
        observer = self.observer
        self.decoder.tap = (lambda name, rows: observer(name, rows, owners)) if observer else None


def _row_owners(seqs: Sequence[ScheduledSeq]) -> RowOwners:
    return [
        (seq.request, position)
        for seq in seqs
        for position in range(seq.start, seq.start + seq.num_tokens)
    ]
