"""The least that a step must move and multiply, op by op, from the model's sizes alone.

Bytes that cannot be avoided are the weights, each read once a step (of the embedding only the rows
in use, which are left out; the output matrix only where a row's logits are wanted), and the KV
cache: the earlier tokens' K and V read once, the new ones' written. What passes between two ops
(``activations``) could stay in a cache: it is counted for an op, not for a step.

Multiply-adds are two operations each: every matrix once a row, and for every pair of a new token
and one that it sees ``q·k`` and ``p·v`` in each query head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..core.step import ScheduledSeq
    from ..models.config import ModelConfig
    from .limits import Limits


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step computed: (earlier tokens, new tokens) of each sequence; rows with logits."""

    seqs: tuple[tuple[int, int], ...]
    logit_rows: int

    @classmethod
    def of(cls, seqs: Sequence[ScheduledSeq]) -> StepShape:
        return cls(
            tuple((seq.start, seq.num_tokens) for seq in seqs), sum(seq.samples for seq in seqs)
        )

    @property
    def tokens(self) -> int:
        """New tokens of all sequences."""
        return sum(new for _, new in self.seqs)


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes of weights, of the KV cache and between ops; operations."""

    weights: int = 0
    kv: int = 0
    activations: int = 0
    flops: int = 0

    @property
    def num_bytes(self) -> int:
        return self.weights + self.kv + self.activations


def op_costs(model: ModelConfig, itemsize: int, step: StepShape) -> dict[str, Cost]:
    """What each op moves and multiplies, over all layers.

    The new tokens' K and V are written once, which counts as attention's, and are rope's output.

    :param itemsize: bytes of a weight, an activation and an element of the KV cache.
    """
    m, layers, rows = model, model.num_layers, step.tokens
    hidden, inner = m.hidden_size, m.intermediate_size
    qkv = m.q_size + 2 * m.kv_size

    def linear(columns: int, depth: int) -> Cost:
        weights = columns * depth * layers
        moved = rows * (columns + depth) * layers
        return Cost(weights * itemsize, 0, moved * itemsize, 2 * rows * weights)

    def rowwise(elements: int, weights: int = 0) -> Cost:
        return Cost(weights * itemsize, 0, elements * itemsize, 0)

    pairs = sum(_pairs(start, new, m.sliding_window) for start, new in step.seqs)
    read = sum(_seen(start, m.sliding_window) for start, _ in step.seqs)
    logits = step.logit_rows
    return {
        # x and residual in and out, two norms a layer and the last; the very first adds nothing
        "norm": rowwise(rows * hidden * (8 * layers + 2), hidden * (2 * layers + 1)),
        "qkv_proj": linear(qkv, hidden),
        "rope": rowwise(2 * rows * qkv * layers, 2 * m.head_dim * layers if m.qk_norm else 0),
        "attention": Cost(
            kv=2 * m.kv_size * (read + rows) * layers * itemsize,
            activations=rows * (2 * m.q_size + 2 * m.kv_size) * layers * itemsize,
            flops=4 * m.q_size * pairs * layers,
        ),
        "o_proj": linear(hidden, m.q_size),
        "gate_up_proj": linear(2 * inner, hidden),
        "act": rowwise(3 * rows * inner * layers),
        "down_proj": linear(hidden, inner),
        "lm_head": Cost(
            m.vocab_size * hidden * itemsize if logits else 0,
            0,
            logits * (hidden * itemsize + 4 * m.vocab_size),
            2 * logits * m.vocab_size * hidden,
        ),
        "sampling": Cost(activations=4 * logits * m.vocab_size),  # fp32 logits, read once
    }


def step_cost(model: ModelConfig, itemsize: int, step: StepShape) -> Cost:
    """What the whole step cannot avoid: ``activations`` is 0."""
    costs = op_costs(model, itemsize, step).values()
    return Cost(
        sum(cost.weights for cost in costs),
        sum(cost.kv for cost in costs),
        0,
        sum(cost.flops for cost in costs),
    )


@dataclass(frozen=True, slots=True)
class Floor:
    """The least time of several steps, and the limit that sets most of it."""

    seconds: float
    limit: str

    @classmethod
    def of(
        cls, model: ModelConfig, itemsize: int, steps: Sequence[StepShape], limits: Limits
    ) -> Floor:
        """The sum over the steps of each one's bytes or operations, whichever take longer.

        An empty step takes nothing.
        """
        by_limit = {"copy": 0.0, "matrix": 0.0}
        for step in (each for each in steps if each.tokens):
            cost = step_cost(model, itemsize, step)
            seconds = limits.seconds(cost.num_bytes, cost.flops)
            by_limit[limits.name(cost.num_bytes, cost.flops)] += seconds
        return cls(sum(by_limit.values()), max(by_limit, key=lambda name: by_limit[name]))


def _seen(start: int, window: int | None) -> int:
    """Earlier tokens that the new ones see at all."""
    return start if window is None else min(start, window - 1)


def _pairs(start: int, new: int, window: int | None) -> int:
    """Pairs of a new token and one that it sees, itself among them."""
    stop = start + new
    pairs = _triangle(stop) - _triangle(start)
    if window is not None:
        pairs -= _triangle(stop - window) - _triangle(start - window)
    return pairs


def _triangle(n: int) -> int:
    """1 + 2 + … + n."""
    return n * (n + 1) // 2 if n > 0 else 0
