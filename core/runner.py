"""Runs one scheduled step: tensors in, sampled tokens and logprobs out.

The split in ``prepare`` (host), ``forward`` (device) and ``sample`` is the one that captured graphs
take, and that a host that schedules ahead needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..backends.base import AttentionBackend, Batch, LayerCache
from ..errors import BackendError
from ..kernels.kernel_set import KernelSet
from ..models.decoder import Decoder
from ..sampling.sampler import SampledRow, SamplingRow, sample, score_prompt
from .devices import current_device
from .graphs import DecodeGraphs
from .packing import pack, to_device
from .phases import explained_step
from .request import Request
from .scheduler import ScheduledSeq, Step

_LOGITS_ROWS = 256
"""Rows of logits held at once: what prompt scoring needs beyond is computed piece by piece."""

RowOwners = list[tuple[Request, int]]
"""For every packed row: its request and its absolute position."""

Observer = Callable[[str, Tensor, RowOwners], None]
"""Called after every op with its name, its packed rows and who owns them."""


@dataclass(slots=True)
class SeqResult:
    """What a step found out for one sequence.

    ``prompt_rows`` scores prompt tokens, by position.
    """

    sampled: SampledRow | None = None
    prompt_rows: dict[int, SampledRow] = field(default_factory=dict)


class Runner:
    """A model with its backend, caches and kernels.

    ``backend_name`` is what errors call the backend.

    ``graphs`` are the captured decode steps, where there are any.

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
    ) -> None:
        self.decoder = decoder
        self.backend = backend
        self.device = backend.config.device
        self.layers = layers
        self.kernels = kernels
        self.sampling_seed = sampling_seed
        self.eos_token_ids = eos_token_ids
        self.backend_name = backend_name
        self.observer: Observer | None = None
        self.graphs: DecodeGraphs | None = None

    @torch.inference_mode()
    def execute(self, step: Step) -> list[SeqResult]:
        """Run the step; one result for each of ``step.seqs``, in order.

        Nothing but the pages of the step's own new tokens is written, so a step that raises can be
        forgotten.

        :raises BackendError: the backend raised an error; it is the cause.
        :raises LogitsProcessorError: a request's own processor failed.
        :raises DeviceMemoryError: the GPU's memory ran out.
        """
        with current_device(self.device), explained_step(step):
            batch = self.prepare(step.seqs)
            owners = _row_owners(step.seqs) if self.observer else []
            hidden = self.forward(batch, owners)
            return self._finish(step.seqs, hidden, owners)

    def prepare(self, seqs: Sequence[ScheduledSeq]) -> Batch:
        """The packed index tensors of a step, filled up to a captured size where there is one."""
        padding = 0
        if self.graphs is not None and not self.observer and all(seq.is_decode for seq in seqs):
            padding = self.graphs.padding(len(seqs)) or 0
        return pack(seqs, self.backend.config.page_size, self.device, padding)

    def forward(self, batch: Batch, owners: RowOwners) -> Tensor:
        """Hidden states ``[T, hidden]`` after the final norm; K and V land in the cache.

        A decode step of a captured size is replayed, unless an observer wants to see its ops.
        """
        self._observe(owners)
        if self.graphs is not None and not self.observer and self.graphs.holds(batch):
            with self._blaming("replay"):
                return self.graphs.replay(batch)
        with self._blaming("plan"):
            plan = self.backend.plan(batch)
        return self.compute(batch, plan)

    def compute(self, batch: Batch, plan: Any) -> Tensor:
        """``forward`` under the backend's plan of the batch."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = torch.empty_like(q)
            with self._blaming("run"):
                self.backend.run(q, k, v, self.layers[layer], plan, out)
            return out

        return self.decoder.forward(batch.token_ids, batch.positions, attend)

    def _finish(
        self, seqs: Sequence[ScheduledSeq], hidden: Tensor, owners: RowOwners
    ) -> list[SeqResult]:
        results = [SeqResult() for _ in seqs]
        sampling_rows: list[int] = []
        row = 0
        for seq, result in zip(seqs, results, strict=True):
            if seq.request.params.prompt_logprobs is not None:
                result.prompt_rows = self._score(seq, hidden, row - seq.start, owners)
            row += seq.num_tokens
            if seq.samples:
                sampling_rows.append(row - 1)
        if sampling_rows:
            self._observe([owners[r] for r in sampling_rows] if owners else [])
            chosen = to_device(sampling_rows, torch.int64, self.device)
            logits = self.decoder.logits(hidden[chosen])
            sampling = [(seq, res) for seq, res in zip(seqs, results, strict=True) if seq.samples]
            sampled = sample(logits, [self._sampling_row(seq) for seq, _ in sampling], self.kernels)
            for (_, result), token in zip(sampling, sampled, strict=True):
                result.sampled = token
        return results

    def _score(
        self, seq: ScheduledSeq, hidden: Tensor, row_of_0: int, owners: RowOwners
    ) -> dict[int, SampledRow]:
        """Logprobs of the prompt tokens that this chunk's rows predict, by position.

        The row of position ``p`` is ``row_of_0 + p``; it predicts the token at ``p + 1``.
        """
        request = seq.request
        wanted = request.params.prompt_logprobs or 0
        scored: dict[int, SampledRow] = {}
        first = max(seq.start, request.num_scored_tokens)
        last = min(seq.start + seq.num_tokens, request.num_prompt_tokens - 1)
        for begin in range(first, last, _LOGITS_ROWS):
            end = min(begin + _LOGITS_ROWS, last)
            rows = slice(row_of_0 + begin, row_of_0 + end)
            targets = request.prompt_token_ids[begin + 1 : end + 1]
            self._observe(owners[rows])
            logits = self.decoder.logits(hidden[rows])
            reports = score_prompt(logits, targets, [wanted] * len(targets), self.kernels)
            scored.update(enumerate(reports, begin + 1))
        return scored

    def _sampling_row(self, seq: ScheduledSeq) -> SamplingRow:
        request = seq.request
        seed = request.params.seed
        return SamplingRow(
            params=request.params,
            seed=self.sampling_seed if seed is None else seed,
            choice=request.choice,
            position=request.num_tokens,
            prompt_token_ids=request.prompt_token_ids,
            output_token_ids=request.output_token_ids,
            eos_token_ids=self.eos_token_ids,
            request_id=request.group_id,
        )

    @contextmanager
    def _blaming(self, call: str) -> Iterator[None]:
        """Name the backend in whatever error its ``call`` raises."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise  # not the backend's fault
        except Exception as error:
            raise BackendError(
                f"attention backend {self.backend_name!r} raised {type(error).__name__} in "
                f"{call}(): {error}. The step was not computed; the engine can be used again. If "
                "it comes back, report it to the backend's author or pass another "
                "attention_backend."
            ) from error

    def _observe(self, owners: RowOwners) -> None:
        observer = self.observer
        self.decoder.tap = (lambda name, rows: observer(name, rows, owners)) if observer else None


def _row_owners(seqs: Sequence[ScheduledSeq]) -> RowOwners:
    return [
        (seq.request, position)
        for seq in seqs
        for position in range(seq.start, seq.start + seq.num_tokens)
    ]
