"""A decode step of a model with random weights, for ``gpu_decode_step.py``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from torch import Tensor

from isobit.backends.base import AttentionConfig, Batch, LayerCache
from isobit.backends.triton_attention import TritonAttention
from isobit.kernels.dispatch import load_kernels
from isobit.kernels.triton import launch, linear, matmul
from isobit.kernels.triton.candidates import Candidate
from isobit.kernels.triton.linear import TritonLinear
from isobit.kernels.triton.trials import Problem
from isobit.models.config import ModelConfig
from isobit.models.decoder import Decoder, WrittenAttention
from isobit.models.weights import random_weights

DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16
PAGE = 16
SWEPT_LAYERS = 8

Choices = dict[tuple[int, int, int], Candidate]
"""(columns, depth, bucket) -> the way."""


@contextmanager
def overlap(enabled: bool, ahead: int = 16) -> Iterator[None]:
    """Kernels launched in the block overlap or not."""
    before = launch.OVERLAP, matmul.AHEAD
    launch.OVERLAP, matmul.AHEAD = enabled, ahead << 20
    try:
        yield
    finally:
        launch.OVERLAP, matmul.AHEAD = before


@contextmanager
def chosen(choices: Choices) -> Iterator[None]:
    """Linears computed in the block are computed in these ways."""

    def choose(problem: Problem, weight: Tensor) -> Candidate:
        return choices[problem.columns, problem.depth, problem.bucket]

    before = linear.chooser
    linear.chooser = lambda device: SimpleNamespace(choose=choose)  # type: ignore[assignment]
    try:
        yield
    finally:
        linear.chooser = before


class Model:
    """A decoder with random weights, and caches for ``seqs`` sequences of ``context`` tokens."""

    def __init__(self, config: ModelConfig, seqs: int, context: int) -> None:
        self.config, self.context = config, context
        weights = random_weights(config, 0, DTYPE, DEVICE)
        self.decoder = Decoder(config, weights, load_kernels("triton", DEVICE), DTYPE, 40960)
        self.width = -(-context // PAGE)
        c = config
        self.backend = TritonAttention(
            AttentionConfig(
                num_layers=c.num_layers,
                num_q_heads=c.num_q_heads,
                num_kv_heads=c.num_kv_heads,
                head_dim=c.head_dim,
                scale=c.head_dim**-0.5,
                page_size=PAGE,
                dtype=DTYPE,
                device=DEVICE,
                max_model_len=40960,
            )
        )
        shape = self.backend.kv_cache_shape(1 + seqs * self.width)

        def cache() -> Tensor:
            return torch.empty(shape, dtype=DTYPE, device=DEVICE).normal_()

        self.caches = [LayerCache(i, cache(), cache()) for i in range(c.num_layers)]
        self.pages = 1 + torch.randperm(seqs * self.width, device=DEVICE).int()

    def batch(self, rows: int) -> Batch:
        """The last token of ``rows`` sequences."""
        last = self.context - 1
        table = self.pages[: rows * self.width].view(rows, self.width).contiguous()
        return Batch(
            token_ids=torch.randint(self.config.vocab_size, (rows,), device=DEVICE),
            positions=torch.full((rows,), last, device=DEVICE),
            slot_mapping=table[:, -1].long() * PAGE + last % PAGE,
            cu_seqlens_q=torch.arange(rows + 1, dtype=torch.int32, device=DEVICE),
            seq_lens=torch.full((rows,), self.context, dtype=torch.int32, device=DEVICE),
            block_table=table,
            query_lens=[1] * rows,
            kv_lens=[self.context] * rows,
            num_decodes=rows,
        )

    def step(self, batch: Batch) -> Callable[[], Tensor]:
        """Computes the batch's hidden states."""
        self.backend.capture(batch.num_seqs)
        plan = self.backend.plan(batch)

        def attend(layer: int, q: Tensor) -> Tensor:
            out = torch.empty_like(q)
            self.backend.run_written(q, self.caches[layer], plan, out)
            return out

        attention = WrittenAttention(self.caches, batch.slot_mapping, attend)
        return lambda: self.decoder.forward(batch.token_ids, batch.positions, attention)

    def linears(self) -> dict[str, list[TritonLinear]]:
        """Some of each kind, on other weights."""
        layers = self.decoder.layers[:SWEPT_LAYERS]
        kinds = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
        return {kind: [getattr(layer, kind) for layer in layers] for kind in kinds} | {
            "lm_head": [self.decoder.lm_head]
        }
