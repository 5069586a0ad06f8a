"""The triton attention backend: on a CUDA device if there is one, else under Triton's interpreter.

The interpreter multiplies by numpy, which cannot do bfloat16 and whose order of addition follows
the shapes. Here its ``tl.dot`` adds in ascending order instead, as the contract of the device has
it: one order, whatever the height of a tile.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

if sys.platform != "linux":
    pytest.skip("triton is there on Linux only", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from triton.runtime import interpreter

from isobit.backends.base import AttentionConfig, Batch, LayerCache
from isobit.backends.triton_attention import TritonAttention
from isobit.kernels.triton.tiling import Launch, Tiling

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TILING = Tiling(
    near_split=64,
    near_end=128,
    split=128,
    prefill=Launch(16, 4, 1),
    decode=Launch(16, 4, 1),
    serial=128,
    serial_from=4,
)


def ordered_dot(builder, a, b, d, input_precision, max_num_imprecise_acc):
    """``d + a @ b`` in fp32, k ascending."""
    wide = [
        builder.cast_impl(x, interpreter.tl.float32).data
        if x.dtype.scalar == interpreter.tl.bfloat16
        else x.data.astype("float32")
        for x in (a, b)
    ]
    total = d.data.copy()
    for k in range(wide[0].shape[1]):
        total += wide[0][:, k, None] * wide[1][None, k]
    return interpreter.TensorHandle(total, d.dtype.scalar)


@pytest.fixture(autouse=True)
def _ordered_dot(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", ordered_dot)
    with torch.inference_mode():
        yield


@dataclass
class Served:
    """Sequences in shuffled pages, and the backend that attends to them."""

    backend: TritonAttention
    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    table: Tensor
    num_pages: int

    def slots(self, b: int, first: int, end: int) -> Tensor:
        size = self.backend.config.page_size
        positions = torch.arange(first, end, device=DEVICE)
        return self.table[b].long()[positions // size] * size + positions % size

    def cache(self, parts: list[tuple[int, int, int]]) -> LayerCache:
        """What earlier steps wrote, and the engine in this one; everything else is NaN."""
        shape = self.backend.kv_cache_shape(self.num_pages)
        dtype = self.backend.config.dtype
        k, v = (torch.full(shape, torch.nan, dtype=dtype, device=DEVICE) for _ in range(2))
        for b, _, end in parts:
            slots = self.slots(b, 0, end)
            k.view(-1, *shape[2:])[slots] = self.k[b][:end]
            v.view(-1, *shape[2:])[slots] = self.v[b][:end]
        return LayerCache(0, k, v)

    def queries(self, parts: list[tuple[int, int, int]]) -> Tensor:
        return torch.cat([self.q[b][first:end] for b, first, end in parts])

    def batch(self, parts: list[tuple[int, int, int]], decodes: int, padding: int = 0) -> Batch:
        lens = [end - first for _, first, end in parts] + [1] * padding
        kv_lens = [end for _, _, end in parts] + [1] * padding
        slots = [self.slots(*part) for part in parts]
        pages = torch.zeros(len(lens), self.table.shape[1] + 1, dtype=torch.int32, device=DEVICE)
        pages[: len(parts), :-1] = self.table[[b for b, _, _ in parts]]
        for row, length in enumerate(kv_lens):  # past the last page stands the null page
            pages[row, -(-length // self.backend.config.page_size) :] = 0
        zeros = torch.zeros(padding, dtype=torch.int64, device=DEVICE)
        slot_mapping = torch.cat([*slots, zeros])
        return Batch(
            token_ids=torch.zeros_like(slot_mapping),
            positions=torch.zeros_like(slot_mapping),  # not read
            slot_mapping=slot_mapping,
            cu_seqlens_q=torch.tensor([0, *lens], device=DEVICE).cumsum(0, dtype=torch.int32),
            seq_lens=torch.tensor(kv_lens, dtype=torch.int32, device=DEVICE),
            block_table=pages,
            query_lens=lens,
            kv_lens=kv_lens,
            num_decodes=decodes + padding,
        )

    def attend(
        self, parts: list[tuple[int, int, int]], decodes: int = 0, padding: int = 0
    ) -> list[Tensor]:
        """parts: (sequence, first position, end), decodes first -> each part's rows."""
        batch = self.batch(parts, decodes, padding)
        q = torch.cat([self.queries(parts), torch.full_like(self.q[0][:padding], torch.nan)])
        out = torch.full_like(q, torch.nan)
        self.backend.run_written(q, self.cache(parts), self.backend.plan(batch), out)
        return list(out.split(batch.query_lens))[: len(parts)]


def make_served(
    lengths: list[int],
    *,
    heads: tuple[int, int] = (3, 1),
    dim: int = 16,
    page_size: int = 16,
    dtype: torch.dtype = torch.float32,
    window: int | None = None,
    cap: float | None = None,
    tiling: Tiling = TILING,
) -> Served:
    generator = torch.Generator().manual_seed(sum(lengths) + dim)
    config = AttentionConfig(
        num_layers=1,
        num_q_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=dim,
        scale=dim**-0.5,
        page_size=page_size,
        dtype=dtype,
        device=DEVICE,
        max_model_len=256,
        sliding_windows=() if window is None else (window,),
        logit_soft_cap=cap,
    )
    q, k, v = (
        [torch.randn(n, h, dim, generator=generator).to(DEVICE, dtype) for n in lengths]
        for h in (heads[0], heads[1], heads[1])
    )
    counts = [-(-length // page_size) for length in lengths]
    order = 1 + torch.randperm(sum(counts) + 2, generator=generator, dtype=torch.int32)
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32, device=DEVICE)
    for b, count in enumerate(counts):
        table[b, :count] = order[sum(counts[:b]) : sum(counts[: b + 1])]
    return Served(TritonAttention(config, tiling), q, k, v, table, sum(counts) + 3)


def exact_attention(case: Served, b: int) -> Tensor:
    """Attention of one whole sequence in fp64."""
    config = case.backend.config
    q, k, v = (x[b].cpu().double().transpose(0, 1) for x in (case.q, case.k, case.v))
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * config.scale
    if config.logit_soft_cap is not None:
        scores = config.logit_soft_cap * torch.tanh(scores / config.logit_soft_cap)
    ones = torch.ones(scores.shape[-2:], dtype=torch.bool)
    hidden = ones.triu(1)
    if (window := config.sliding_window(0)) is not None:
        hidden = hidden | ones.tril(-window)
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1)


def as_bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16 if x.element_size() == 2 else torch.int32)


def check_same_bits(a: Tensor, b: Tensor, case: object = "") -> None:
    assert not a.isnan().any(), case
    assert torch.equal(as_bits(a), as_bits(b)), case


def check_close(case: Served, b: int, result: Tensor) -> None:
    limit = {torch.float32: 3e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}[result.dtype]
    exact = exact_attention(case, b)
    torch.testing.assert_close(result.cpu().double(), exact, rtol=0, atol=limit)


@pytest.fixture
def served() -> Callable[..., Served]:
    return make_served


@pytest.fixture
def small() -> Tiling:
    """Splits so short that a test's sequences have several."""
    return TILING


@pytest.fixture
def reference() -> Callable[..., Tensor]:
    return exact_attention


@pytest.fixture
def bits() -> Callable[[Tensor], Tensor]:
    return as_bits


@pytest.fixture
def assert_same_bits() -> Callable[..., None]:
    return check_same_bits


@pytest.fixture
def assert_close() -> Callable[..., None]:
    return check_close
