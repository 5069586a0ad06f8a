"""The configurations of ``gpu_proof.py``: backends, models, pages, chunks, graphs, batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, slots=True)
class Model:
    """What all configurations of a model have in common; ``weights`` in GiB."""

    name: str
    weights: float
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Configuration:
    """One ``isobit verify``, a piece of ``gpu_lanes.Work``; ``kv`` is its KV cache in GiB."""

    timed: ClassVar[bool] = False
    after: ClassVar[str] = ""

    model: Model
    page_size: int
    chunk: int
    requests: int
    kv: int
    flags: tuple[str, ...] = ()
    backend: str = "triton"

    @property
    def name(self) -> str:
        rest = "".join(f" {flag.removeprefix('--')}" for flag in self.flags)
        backend = "" if self.backend == "triton" else f" on {self.backend}"
        return f"{self.model.name} page {self.page_size} chunk {self.chunk}{rest}{backend}"

    @property
    def memory(self) -> float:
        """GiB: twice weights, KV cache and a step, as the restarted engine stands beside."""
        return 2 * (self.model.weights + self.kv + 4)

    def arguments(self, device: str) -> list[str]:
        return [
            *("verify", "--json", "--device", device, "--threads", "1", *self.model.flags),
            *("--attention-backend", self.backend),
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


def _each_model(backend: str, largest_page: int) -> list[Configuration]:
    """Every page size, chunk and kind of graphs with every model, with steps ahead and without;
    the largest model least often."""
    rows: list[tuple[Model, int, int, int, int, tuple[str, ...]]] = [
        (_BIG, 16, 2048, 300, 14, ()),
        (_BIG, 64, 256, 200, 14, _EAGER + _SYNC),
        (_BIG, largest_page, 8192, 300, 20, ()),
        (_MIDDLE, 16, 8192, 300, 10, _SYNC),
        (_MIDDLE, 64, 256, 200, 10, _EAGER),
        (_MIDDLE, largest_page, 2048, 300, 14, _FEW),
        (_LLAMA, 16, 256, 200, 4, _FEW),
        (_LLAMA, 64, 8192, 300, 4, _EAGER),
        (_LLAMA, largest_page, 2048, 300, 6, _SYNC),
        (_REAL, 16, 8192, 300, 3, _EAGER),
        (_REAL, 64, 2048, 300, 3, _FEW + _SYNC),
        (_REAL, largest_page, 256, 200, 4, ()),
    ]
    return [Configuration(*row, backend=backend) for row in rows]


def _pair(backend: str) -> list[Configuration]:
    return [
        Configuration(_BIG, 16, 2048, 300, 14, backend=backend),
        Configuration(_LLAMA, 64, 256, 200, 4, _FEW, backend=backend),
    ]


TABLE = [
    *_each_model("triton", largest_page=128),
    *_each_model("fa3", largest_page=32),  # 64 is the largest that it offers
    *_each_model("flashinfer", largest_page=128),
    *_pair("prefill=fa3,decode=triton"),
    *_pair("prefill=flashinfer,decode=triton"),
]

TRIAL = [
    Configuration(_TINY, 16, 2048, 60, 1, backend="torch"),
    Configuration(_TINY, 64, 64, 40, 1, _EAGER, backend="torch"),
]
"""Run only when ``--only`` asks for it: the script itself, where there is no GPU."""
