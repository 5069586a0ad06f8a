"""Checks the triton attention kernels on a GPU: bit by bit, and against fp64.

    python benchmarks/gpu_attention_bits.py

A row a shape: the largest error of the last rows, and what holds. Every comparison is with a
sequence that was prefilled alone and at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from isobit.backends.base import AttentionConfig, Batch, LayerCache
from isobit.backends.triton_attention import TritonAttention
from isobit.kernels.triton.tiling import Launch, Tiling

CUDA = torch.device("cuda")
HEADS = [(32, 8, 128), (9, 3, 64), (16, 8, 128), (8, 1, 256)]
LENGTHS = [5300, 1, 1024, 4097, 4500]
EDGES = [0, 1, 63, 64, 65, 255, 256, 257, 4095, 4096, 4097, 5119, 5120, 5299]
CUTS = [0, 1, 100, 1024, 1500, 1501, 4096, 5300]
Part = tuple[int, int, int]


@dataclass
class Case:
    """Sequences whose K and V lie in the cache, in shuffled pages; the rest of it is NaN."""

    config: AttentionConfig
    q: list[Tensor]
    k: list[Tensor]
    v: list[Tensor]
    table: Tensor
    cache: LayerCache

    def batch(self, parts: list[Part], decodes: int) -> Batch:
        """parts: (sequence, first position, end), decodes first."""
        size = self.config.page_size
        positions = torch.cat([torch.arange(a, e, device=CUDA) for _, a, e in parts])
        lens = [e - a for _, a, e in parts]
        owner = torch.tensor([b for b, _, _ in parts], device=CUDA)
        rows = owner.repeat_interleave(torch.tensor(lens, device=CUDA))
        slots = self.table[rows, positions // size].long() * size + positions % size
        return Batch(
            token_ids=torch.zeros_like(slots),
            positions=positions,
            slot_mapping=slots,
            cu_seqlens_q=torch.tensor([0, *lens], device=CUDA).cumsum(0, dtype=torch.int32),
            seq_lens=torch.tensor([e for _, _, e in parts], dtype=torch.int32, device=CUDA),
            block_table=self.table[owner].contiguous(),
            query_lens=lens,
            kv_lens=[e for _, _, e in parts],
            num_decodes=decodes,
        )

    def queries(self, parts: list[Part]) -> Tensor:
        return torch.cat([self.q[b][a:e] for b, a, e in parts])

    def attend(
        self, parts: list[Part], decodes: int = 0, tiling: Tiling | None = None
    ) -> list[Tensor]:
        backend, batch = TritonAttention(self.config, tiling), self.batch(parts, decodes)
        q = self.queries(parts)
        out = torch.full_like(q, torch.nan)
        backend.run_written(q, self.cache, backend.plan(batch), out)
        return list(torch.split(out, list(batch.query_lens)))


def make_case(
    lengths: list[int],
    heads: tuple[int, int, int],
    page_size: int,
    dtype: torch.dtype,
    window: int | None = None,
    cap: float | None = None,
) -> Case:
    num_q_heads, num_kv_heads, dim = heads
    config = AttentionConfig(
        num_layers=1,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=dim,
        scale=dim**-0.5,
        page_size=page_size,
        dtype=dtype,
        device=CUDA,
        max_model_len=max(lengths),
        sliding_windows=() if window is None else (window,),
        logit_soft_cap=cap,
    )
    generator = torch.Generator(CUDA).manual_seed(0)
    q, k, v = (
        [torch.randn(n, h, dim, device=CUDA, generator=generator).to(dtype) for n in lengths]
        for h in (num_q_heads, num_kv_heads, num_kv_heads)
    )
    width = -(-max(lengths) // page_size)
    pages = 1 + torch.randperm(len(lengths) * width, device=CUDA, generator=generator)
    table = pages.view(len(lengths), width).int()
    shape = (1 + pages.numel(), page_size, num_kv_heads, dim)
    cache = LayerCache(0, *(torch.full(shape, torch.nan, dtype=dtype, device=CUDA) for _ in "kv"))
    case = Case(config, q, k, v, table, cache)
    for b, length in enumerate(lengths):
        slots = case.batch([(b, 0, length)], 0).slot_mapping
        cache.k.view(-1, num_kv_heads, dim)[slots] = k[b]
        cache.v.view(-1, num_kv_heads, dim)[slots] = v[b]
    return case


def largest_error(case: Case, rows: int, result: Tensor) -> float:
    """Of the last ``rows`` rows of sequence 0, against attention in fp64."""
    c, n = case.config, len(case.q[0])
    q, k, v = (x[0].double().transpose(0, 1) for x in (case.q, case.k, case.v))
    k, v = (x.repeat_interleave(c.num_q_heads // c.num_kv_heads, 0) for x in (k, v))
    scores = q[:, -rows:] @ k.transpose(1, 2) * c.scale
    if c.logit_soft_cap is not None:
        scores = c.logit_soft_cap * torch.tanh(scores / c.logit_soft_cap)
    behind = torch.arange(n - rows, n, device=CUDA)[:, None] - torch.arange(n, device=CUDA)
    hidden = behind < 0
    if (window := c.sliding_window(0)) is not None:
        hidden = hidden | (behind >= window)
    exact = (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1)
    return float((result[-rows:].double() - exact).abs().max())


def same(a: Tensor, b: Tensor) -> bool:
    return bool(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) and not a.isnan().any())


def capture(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def graph_decode(case: Case, lengths: list[int]) -> list[Tensor]:
    """Last rows from a graph that was recorded with other lengths."""
    backend = TritonAttention(case.config)
    backend.capture(len(lengths))
    last = [(b, n - 1, n) for b, n in enumerate(lengths)]
    batch = case.batch([(b, 0, 1) for b in range(len(lengths))], len(lengths))
    q = case.queries(last)
    plan, out = backend.plan(batch), torch.empty_like(q)
    graph = capture(lambda: backend.run_written(q, case.cache, plan, out))
    now = case.batch(last, len(lengths))
    for name in ("slot_mapping", "seq_lens", "block_table"):
        getattr(batch, name).copy_(getattr(now, name))
    backend.replay(plan, replace(batch, kv_lens=now.kv_lens))
    graph.replay()
    return list(torch.split(out, 1))


def check(
    heads: tuple[int, int, int], dtype: torch.dtype, window: int | None, cap: float | None
) -> bool:
    lengths, end = LENGTHS, LENGTHS[0]
    case = make_case(lengths, heads, 16, dtype, window, cap)
    whole = [case.attend([(b, 0, n)])[0] for b, n in enumerate(lengths)]
    held: dict[str, bool] = {}
    held["decode"] = all(
        same(case.attend([(0, p, p + 1)], 1)[0], whole[0][p : p + 1]) for p in EDGES
    )
    chunks = [case.attend([(0, a, e)])[0] for a, e in pairwise(CUTS)]
    held["chunk"] = same(torch.cat(chunks), whole[0])
    last = [(b, n - 1, n) for b, n in enumerate(lengths)]
    mixed = [*last[2:], (0, end - 700, end), (1, 0, 1)]
    held["batch"] = all(
        same(out, whole[b][a:e])
        for parts, decodes in ((last, 5), (mixed, 3), (mixed[::-1], 0))
        for (b, a, e), out in zip(parts, case.attend(parts, decodes), strict=True)
    )
    others = [make_case(lengths, heads, size, dtype, window, cap) for size in (48, 64, 256)]
    held["page"] = all(
        same(other.attend([(0, 0, end)])[0], whole[0])
        and same(other.attend(last, 5)[0], whole[0][-1:])
        for other in others
    )
    held["launch"] = all(
        same(case.attend([(0, 0, end)], 0, tiling)[0], whole[0])
        and same(case.attend(last, 5, tiling)[0], whole[0][-1:])
        for tiling in launches(case)
    )
    graphed = graph_decode(case, lengths)
    held["graph"] = all(same(a, b[-1:]) for a, b in zip(graphed, whole, strict=True))
    error = largest_error(case, 64, whole[0])
    row = " ".join(f"{name}:{'ok' if ok else 'BROKEN'}" for name, ok in held.items())
    print(f"{heads} {dtype} window={window} cap={cap} error={error:.1e} {row}", flush=True)
    return all(held.values()) and error < (1e-5 if dtype == torch.float32 else 3e-2)


def launches(case: Case) -> Iterator[Tiling]:
    """Other launches of the same contract; narrow types have taller tiles."""
    wide = case.config.dtype == torch.float32 or case.config.head_dim > 128
    for rows, warps in ((16, 4), (32, 4), (64, 8)) if wide else ((16, 2), (64, 4), (128, 8)):
        decode = Launch(min(rows, 64), warps, 1)
        few = rows == 16
        yield Tiling(
            prefill=Launch(rows, warps, 1),
            flat=not few,
            decode=decode,
            serial=1024 if few else 4096,
            serial_from=1,
            decode_programs=1 if few else 1 << 12,
        )


def check_all() -> bool:
    good = [check(heads, torch.bfloat16, None, None) for heads in HEADS]
    good += [check(HEADS[1], dtype, None, None) for dtype in (torch.float16, torch.float32)]
    good += [check(HEADS[0], torch.bfloat16, *more) for more in ((100, None), (1024, 30.0))]
    return all(good)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        sys.exit("These checks need a CUDA device.")
    sys.exit(not check_all())
