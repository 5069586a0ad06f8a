"""Shows, at start-up, that the kernels keep their contracts on this machine.

Each op runs on random data with outlier columns, in a batch and alone, with one thread and with
all, and the results are compared bit for bit. The digest of those bits goes into the fingerprint.
Nothing global is touched: the data come from generators of their own, and the thread count is put
back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from .attention import write_kv
from .kernel_set import Draw, KernelSet, Linear, QkNorm
from .linear import PANEL, NativeLinear
from .rope import rope_table
from .threads import one_thread

OUTLIER_STEP = 97
OUTLIER_FACTOR = 100.0
THREAD_CHECK_ROWS = 64
MAX_OUTPUTS = 1 << 22  # of one batch: bounds the time that a vocabulary's projection takes
CANONICAL_ROWS = 3
_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One comparison that failed: ``op`` gave other bits in ``case``."""

    op: str
    case: str

    def __str__(self) -> str:
        return f"{self.op}: other bits {self.case}"


@dataclass
class CheckResult:
    """What failed (nothing, on a sound machine), and a digest of the bits that came out."""

    mismatches: list[Mismatch] = field(default_factory=list)
    _hash: hashlib._Hash = field(default_factory=hashlib.sha256)

    @property
    def digest(self) -> str:
        """Twelve hex digits."""
        return self._hash.hexdigest()[:12]

    def record(self, result: Tensor) -> None:
        """Let ``result``'s bits enter the digest."""
        self._hash.update(_bits(result).cpu().numpy().tobytes())

    def expect_equal(self, op: str, case: str, a: Tensor, b: Tensor) -> None:
        """Note a mismatch unless ``a`` and ``b`` have the same bits."""
        if not torch.equal(_bits(a), _bits(b)):
            self.mismatches.append(Mismatch(op, case))


def check_linear(
    linears: Mapping[str, Linear],
    rows: Sequence[int],
    dtype: torch.dtype,
    device: torch.device = _CPU,
) -> CheckResult:
    """Compare fp32 accumulators: batches of ``rows`` rows, each row alone, one thread, canonical.

    Of several linears of one shape and kind the first stands for all. In each batch row 0, the
    last row and the last rows of the smaller batches are compared. Batches of more than
    ``MAX_OUTPUTS`` outputs are left out.
    """
    result = CheckResult()
    shapes: set[tuple[type, int, int]] = set()
    for name, linear in linears.items():
        shape = (type(linear), linear.out_features, linear.in_features)
        if shape not in shapes:
            shapes.add(shape)
            _check_one_linear(result, name, linear, sorted(set(rows)), dtype, device)
    return result


def _check_one_linear(
    result: CheckResult,
    name: str,
    linear: Linear,
    rows: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    op = f"linear {name} [{linear.out_features}, {linear.in_features}]"
    rows = [m for m in rows if m == rows[0] or m * linear.out_features <= MAX_OUTPUTS]
    x = outliers(rows[-1], linear.in_features).to(device, dtype)
    probes = sorted({0, *(m - 1 for m in rows)})
    alone = {i: linear.accumulators(x[i : i + 1])[0] for i in probes}
    for i in probes:
        result.record(alone[i])
    for m in rows:
        batch = linear.accumulators(x[:m])
        here = [i for i in probes if i < m]
        result.expect_equal(
            op, f"in a batch of {m} rows", batch[here], torch.stack([alone[i] for i in here])
        )
    few = x[: min(rows[-1], THREAD_CHECK_ROWS)]
    with one_thread():
        single = linear.accumulators(few)
    result.expect_equal(op, "with one thread", single, linear.accumulators(few))
    if isinstance(linear, NativeLinear):
        for columns in (slice(0, 2 * PANEL), slice(-PANEL - 1, None)):
            result.expect_equal(
                op,
                "than its contract's scalar loop",
                torch.stack([alone[i] for i in probes[:CANONICAL_ROWS]])[:, columns],
                linear.canonical(x[probes[:CANONICAL_ROWS]], columns),
            )


def check_attention(
    kernels: KernelSet,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device = _CPU,
) -> CheckResult:
    """Compare a prefill with its chunks, with decode steps, with neighbours and one thread.

    Pages that no sequence owns, and the tail of the last one, hold NaN.
    """
    result = CheckResult()
    length = 131
    pages = -(-length // page_size)
    shape = (2 * pages + 1, page_size, num_kv_heads, head_dim)
    k_cache = torch.full(shape, torch.nan, dtype=dtype, device=device)
    v_cache = k_cache.clone()
    # The sequence's pages in descending order, then a shorter neighbour's.
    table = torch.arange(2 * pages, 0, -1, dtype=torch.int32, device=device).view(2, pages)
    in_page = torch.arange(page_size, device=device)
    slots = table[0].long()[:, None] * page_size + in_page
    neighbour = table[1].long()[:, None] * page_size + in_page
    # Outliers in v only: in q and k they would put each row's whole weight on one position.
    q = normal(length, num_q_heads * head_dim).view(length, num_q_heads, head_dim).to(device, dtype)
    k = (
        normal(length, num_kv_heads * head_dim)
        .view(length, num_kv_heads, head_dim)
        .to(device, dtype)
    )
    v = outliers(length, num_kv_heads * head_dim).view(k.shape).to(device, dtype)
    write_kv(k, v, k_cache, v_cache, slots.flatten()[:length])
    write_kv(k[:70], v[:70], k_cache, v_cache, neighbour.flatten()[:70])

    def attend(parts: Sequence[tuple[int, int, int]]) -> list[Tensor]:
        """parts: (sequence, first position, end) -> the rows of each."""
        rows = sum(end - first for _, first, end in parts)
        out = torch.empty(rows, num_q_heads, head_dim, dtype=dtype, device=device)
        lens = torch.tensor([0, *(end - first for _, first, end in parts)], dtype=torch.int32)
        kernels.paged_attention(
            torch.cat([q[first:end] for _, first, end in parts]),
            k_cache,
            v_cache,
            table[[b for b, _, _ in parts]],
            lens.cumsum(0, dtype=torch.int32).to(device),
            torch.tensor([end for _, _, end in parts], dtype=torch.int32, device=device),
            head_dim**-0.5,
            out,
        )
        return list(torch.split(out, lens[1:].tolist()))

    (whole,) = attend([(0, 0, length)])
    result.record(whole)
    op = f"attention {num_q_heads}/{num_kv_heads}x{head_dim}, pages of {page_size}"
    cuts = (0, 1, 38, 64, 127, length)
    chunks = [attend([(0, a, b)])[0] for a, b in pairwise(cuts)]
    result.expect_equal(op, "in chunks", whole, torch.cat(chunks))
    for position in (0, 63, 64, 65, length - 1):
        row = whole[position : position + 1]
        step = (0, position, position + 1)
        (alone,) = attend([step])
        result.expect_equal(op, f"decoding position {position} alone", row, alone)
        mixed = attend([(1, 20, 70), step, (1, 69, 70)])[1]
        result.expect_equal(op, f"decoding position {position} beside others", row, mixed)
    with one_thread():
        (single,) = attend([(0, 0, length)])
    result.expect_equal(op, "with one thread", whole, single)
    return result


def check_rowwise(
    kernels: KernelSet, hidden: int, vocab: int, device: torch.device = _CPU
) -> CheckResult:
    """Compare rows in a batch with rows alone, and with one thread, for the row-wise ops."""
    result = CheckResult()
    weight = outliers(1, hidden)[0].to(device)
    table = rope_table(torch.logspace(0, -4, 32), 64).to(device)
    norm = QkNorm(normal(1, 64)[0].to(device), normal(2, 64)[1].to(device), 1e-6)

    def rope(x: Tensor, positions: Tensor) -> Tensor:
        heads = x.view(x.shape[0], -1, 64)
        return torch.cat(kernels.rope(heads, heads[:, :1], table, positions), dim=1).flatten(1)

    def rope_qkv(x: Tensor, positions: Tensor) -> Tensor:
        return torch.cat(kernels.rope_qkv(x, 1, 1, norm, table, positions), dim=1).flatten(1)

    seeds = torch.tensor([0, -1, 42])
    ops: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
        "rms_norm": (lambda x: kernels.rms_norm(x, weight, 1e-5), [outliers(33, hidden)]),
        "add_rms_norm": (
            lambda x, r: torch.cat(kernels.add_rms_norm(x, r, weight, 1e-5), dim=-1),
            [outliers(33, hidden), outliers(33, hidden).flip(0)],
        ),
        "rope": (rope, [outliers(33, 3 * 64), torch.arange(33)]),
        "rope_qkv": (rope_qkv, [outliers(33, 3 * 64), torch.arange(33)]),
        "silu_mul": (kernels.silu_mul, [outliers(33, 2 * hidden)]),
        "log_softmax": (kernels.log_softmax, [outliers(3, vocab)]),
        "gumbel": (lambda s, c, p: kernels.gumbel(s, c, p, vocab), [seeds, seeds.abs(), seeds + 1]),
    }
    choose = kernels.choose
    if choose is not None:
        ops["choose"] = (
            lambda x, s: choose(x, _filtered_draw(s))[1],
            [outliers(3, vocab), seeds],
        )
    _check_written(result, kernels, norm, table)
    for op, (run, on_cpu) in ops.items():
        inputs = [t.to(device) for t in on_cpu]
        batch = run(*inputs)
        result.record(batch)
        alone = [run(*(t[i : i + 1] for t in inputs)) for i in range(batch.shape[0])]
        result.expect_equal(op, f"in a batch of {batch.shape[0]} rows", batch, torch.cat(alone))
        with one_thread():
            result.expect_equal(op, "with one thread", batch, run(*inputs))
    return result


def _check_written(result: CheckResult, kernels: KernelSet, norm: QkNorm, table: Tensor) -> None:
    """Compare what ``rope_qkv_write`` stores with what ``rope_qkv`` gives, slot by slot."""
    qkv, positions = outliers(33, 3 * 64).to(table.device), torch.arange(33, device=table.device)
    slots = 4 + positions.flip(0)
    caches = [torch.full((10, 4, 1, 64), torch.nan, device=table.device) for _ in range(2)]
    given = (qkv, 1, 1, norm, table, positions)
    q = kernels.rope_qkv_write(*given, caches[0], caches[1], slots)
    expected_q, *expected = kernels.rope_qkv(*given)
    result.expect_equal("rope_qkv_write", "than rope_qkv's q", q, expected_q)
    for name, cache, rows in zip("kv", caches, expected, strict=True):
        target = torch.full_like(cache, torch.nan)
        target.view(40, 1, 64)[slots] = rows
        result.expect_equal("rope_qkv_write", f"in the cache of {name}", cache, target)


def _filtered_draw(seeds: Tensor) -> Draw:
    """Every filter on, for as many rows as seeds."""
    rows = torch.arange(len(seeds), device=seeds.device)
    return Draw(
        temperatures=torch.full_like(seeds, 3, dtype=torch.float32),
        top_k=torch.full_like(seeds, 50),
        top_p=torch.full_like(seeds, 0.9, dtype=torch.float64),
        min_p=torch.full_like(seeds, 1e-3, dtype=torch.float32),
        filtered=rows,
        seeds=seeds,
        choices=seeds,
        positions=seeds,
    )


def combined_digest(results: Iterable[CheckResult]) -> str:
    """One digest for several results, in their order."""
    return hashlib.sha256("".join(r.digest for r in results).encode()).hexdigest()[:12]


def normal(rows: int, columns: int) -> Tensor:
    """fp32 normal variates, the same for the same shape."""
    generator = torch.Generator().manual_seed(rows * 1_000_003 + columns)
    return torch.randn(rows, columns, generator=generator)


def outliers(rows: int, columns: int) -> Tensor:
    """fp32 normal variates, every 97th column a hundred times larger."""
    x = normal(rows, columns)
    x[:, 5::OUTLIER_STEP] *= OUTLIER_FACTOR
    return x


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16 if x.element_size() == 2 else torch.int32)
