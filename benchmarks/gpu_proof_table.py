"""The configurations of ``gpu_proof.py``: which models, pages, chunks, graphs and batches."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Model:
    """What all configurations of a model have in common; ``weights`` in GiB."""

    name: str
    weights: float
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Configuration:
    """One ``isobit verify``; ``kv`` is its KV cache in GiB."""

    model: Model
    page_size: int
    chunk: int
    requests: int
    kv: int
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        rest = "".join(f" {flag.removeprefix('--')}" for flag in self.flags)
        return f"{self.model.name} page {self.page_size} chunk {self.chunk}{rest}"

    @property
    def memory(self) -> float:
        """GiB: twice weights, KV cache and a step, as the restarted engine stands beside."""
        return 2 * (self.model.weights + self.kv + 4)

    def arguments(self, device: str) -> list[str]:
        return [
            *("verify", "--json", "--device", device, "--threads", "1", *self.model.flags),
            *("--page-size", str(self.page_size), "--max-num-batched-tokens", str(self.chunk)),
            *("--requests", str(self.requests), "--kv-cache-memory", f"{self.kv}GiB", *self.flags),
        ]


def _random(shape: str, weights: float, *flags: str) -> Model:
    given = ("--model", shape, "--load-format", "random")
    return Model(shape, weights, (*given, *flags))


_LONG = ("--dtype", "bfloat16", "--max-model-len", "17000", "--max-prompt-tokens", "16000")
_EAGER, _FEW = ("--no-cuda-graph",), ("--cuda-graph-max-bs", "16")
_SYNC = ("--no-async-scheduling",)
_BIG = _random("qwen3-8b", 15.3, *_LONG, "--quick", "--max-new-tokens", "16")
_MIDDLE = _random("qwen3-1.7b", 3.3, *_LONG, "--quick", "--max-new-tokens", "16")
_LLAMA = _random("llama-3.2-1b", 2.4, *_LONG, "--quick", "--max-new-tokens", "16")
_REAL = Model(
    "smollm2",
    0.3,
    ("--model", "smollm2", "--dtype", "bfloat16", "--max-prompt-tokens", "8000"),
)
_TINY = _random("tiny-qwen3", 0.1, "--quick", "--max-new-tokens", "4")

TABLE = [
    Configuration(_BIG, 16, 2048, 300, 14),
    Configuration(_BIG, 64, 256, 200, 14, _EAGER + _SYNC),
    Configuration(_BIG, 128, 8192, 300, 20),
    Configuration(_MIDDLE, 16, 8192, 300, 10, _SYNC),
    Configuration(_MIDDLE, 64, 256, 200, 10, _EAGER),
    Configuration(_MIDDLE, 128, 2048, 300, 14, _FEW),
    Configuration(_LLAMA, 16, 256, 200, 4, _FEW),
    Configuration(_LLAMA, 64, 8192, 300, 4, _EAGER),
    Configuration(_LLAMA, 128, 2048, 300, 6, _SYNC),
    Configuration(_REAL, 16, 8192, 300, 3, _EAGER),
    Configuration(_REAL, 64, 2048, 300, 3, _FEW + _SYNC),
    Configuration(_REAL, 128, 256, 200, 4),
]
"""Every page size, chunk and kind of graphs with every model, with steps ahead and without; the
largest model least often."""

TRIAL = [
    Configuration(_TINY, 16, 2048, 60, 1),
    Configuration(_TINY, 64, 64, 40, 1, _EAGER),
]
"""Run only when ``--only`` asks for it: the script itself, where there is no GPU."""
