"""Norm, QKV preparation, activation and log-softmax; in Triton's interpreter without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs the package triton")

from isobit.kernels.dispatch import load_kernels
from isobit.kernels.elementary import exp_f32, log_f64, tree_sum
from isobit.kernels.kernel_set import Draw, KernelSet, QkNorm
from isobit.kernels.rope import rope_table
from isobit.kernels.selfcheck import check_rowwise
from isobit.kernels.triton.trials import same_bits

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EXACT_DTYPES = [torch.float32, torch.float16]
"""The interpreter truncates to bf16 where the hardware rounds."""
STEP = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2**-6}


@pytest.fixture
def ours() -> KernelSet:
    return load_kernels("triton", DEVICE)


@pytest.fixture
def reference() -> KernelSet:
    return load_kernels("torch", DEVICE)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
    x[..., 5::97] *= 100
    return x.to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", STEP)
@pytest.mark.parametrize("width", [1, 15, 64, 576])
def test_rms_norm_close_to_fp64(ours: KernelSet, width: int, dtype: torch.dtype) -> None:
    x, weight = normal(3, 2, width, dtype=dtype), normal(width, dtype=dtype)
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    result = ours.rms_norm(x, weight, 1e-5)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), exact, rtol=STEP[dtype], atol=1e-5)


@pytest.mark.parametrize("dtype", EXACT_DTYPES)
def test_the_residual_is_added_and_rounded_first(ours: KernelSet, dtype: torch.dtype) -> None:
    x, residual, weight = normal(5, 100, dtype=dtype), normal(100, dtype=dtype), normal(100)
    residual = residual.expand(5, 100)
    out, total = ours.add_rms_norm(x, residual, weight, 1e-5)
    assert same_bits(total, x + residual)
    assert same_bits(out, ours.rms_norm(total, weight, 1e-5))


def qkv_inputs(dtype: torch.dtype, tokens: int = 6) -> tuple[Tensor, QkNorm, Tensor, Tensor]:
    """Five heads for q and two each for k and v, of 24."""
    norm = QkNorm(normal(24, dtype=dtype), normal(24, dtype=dtype) + 1, 1e-6)
    table = rope_table(torch.logspace(0, -4, 12), 64).to(DEVICE)
    positions = torch.arange(tokens, device=DEVICE) * 7 % 64
    return normal(tokens, 9 * 24, dtype=dtype), norm, table, positions


@pytest.mark.parametrize("dtype", EXACT_DTYPES)
def test_rope_has_the_bits_of_torch(
    ours: KernelSet, reference: KernelSet, dtype: torch.dtype
) -> None:
    qkv, _, table, positions = qkv_inputs(dtype)
    results = zip(
        ours.rope_qkv(qkv, 5, 2, None, table, positions),
        reference.rope_qkv(qkv, 5, 2, None, table, positions),
        strict=True,
    )
    for result, expected in results:
        assert result.is_contiguous()
        assert same_bits(result, expected)
    q, k = qkv.view(6, 9, 24)[:, :5], qkv.view(6, 9, 24)[:, 5:7]
    for result, expected in zip(
        ours.rope(q, k, table, positions), reference.rope(q, k, table, positions), strict=True
    ):
        assert same_bits(result, expected)


@pytest.mark.parametrize("dtype", STEP)
def test_qk_norm_then_rope(ours: KernelSet, reference: KernelSet, dtype: torch.dtype) -> None:
    qkv, norm, table, positions = qkv_inputs(dtype)
    results = ours.rope_qkv(qkv, 5, 2, norm, table, positions)
    expected = reference.rope_qkv(qkv, 5, 2, norm, table, positions)
    for result, want in zip(results, expected, strict=True):
        torch.testing.assert_close(result, want, rtol=2 * STEP[dtype], atol=STEP[dtype] * 20)
    assert same_bits(results[2], expected[2])
    assert not torch.equal(results[0], ours.rope_qkv(qkv, 5, 2, None, table, positions)[0])


HEADS = [(5, 2, 24), (32, 8, 128), (9, 3, 64), (3, 1, 256), (20, 20, 16), (1, 1, 8)]
"""q's, k's, and channels: on both sides of what one program takes."""


def contract(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm over each head ``[T, heads, D]``, its sum in the order of ``rope_qk.py``."""
    first, second = x.float().chunk(2, dim=-1)
    squares = first * first + second * second
    block = 1 << (squares.shape[-1] - 1).bit_length()
    squares = torch.nn.functional.pad(squares, (0, block - squares.shape[-1]))
    while squares.shape[-1] > 32:
        squares = squares[..., ::2] + squares[..., 1::2]
    # A tensor divisor: by a plain number, torch may multiply by its rounded reciprocal instead.
    mean = tree_sum(squares) / torch.full((), float(x.shape[-1]), device=x.device)
    # Rounded once: MKL's root in fp32, which torch calls on a CPU, is an ulp off here and there.
    root = (mean + eps).double().sqrt().float()
    inverse = 1.0 / root
    return (x.float() * inverse[..., None]).to(x.dtype) * weight


@pytest.mark.parametrize("dtype", EXACT_DTYPES)
@pytest.mark.parametrize(("q_heads", "kv_heads", "dim"), HEADS)
def test_qk_norm_has_the_bits_of_its_contract(
    ours: KernelSet, reference: KernelSet, dtype: torch.dtype, q_heads: int, kv_heads: int, dim: int
) -> None:
    qkv = normal(3, (q_heads + 2 * kv_heads) * dim, dtype=dtype)
    norm = QkNorm(normal(dim, dtype=dtype), normal(dim, dtype=dtype) + 1, 1e-6)
    table = rope_table(torch.logspace(0, -4, dim // 2), 64).to(DEVICE)
    positions = torch.tensor([7, 0, 63], device=DEVICE)
    q, k, v = qkv.view(3, -1, dim).split([q_heads, kv_heads, kv_heads], dim=1)

    def expected(order: Callable[..., Tensor]) -> list[Tensor]:
        normed = order(q, norm.q, norm.eps), order(k, norm.k, norm.eps)
        return [*reference.rope(*normed, table, positions), v]

    results = ours.rope_qkv(qkv, q_heads, kv_heads, norm, table, positions)
    assert all(same_bits(a, b) for a, b in zip(results, expected(contract), strict=True))
    if dim == 128 and dtype == torch.float32:  # the comparison sees an order

        def rolled(x: Tensor, weight: Tensor, eps: float) -> Tensor:
            return contract(x.roll(1, -1), weight.roll(1), eps).roll(-1, -1)

        others = expected(rolled)
        assert not same_bits(results[0], others[0])


@pytest.mark.parametrize("dtype", STEP)
@pytest.mark.parametrize(("q_heads", "kv_heads", "dim"), HEADS)
def test_k_and_v_land_in_their_slots(
    ours: KernelSet, dtype: torch.dtype, q_heads: int, kv_heads: int, dim: int
) -> None:
    qkv = normal(4, (q_heads + 2 * kv_heads) * dim, dtype=dtype)
    norm = QkNorm(normal(dim, dtype=dtype), normal(dim, dtype=dtype) + 1, 1e-6)
    table = rope_table(torch.logspace(0, -4, dim // 2), 64).to(DEVICE)
    given = (qkv, q_heads, kv_heads, norm, table, torch.arange(4, device=DEVICE) * 9)
    slots = torch.tensor([7, 3, 9, 4], device=DEVICE)
    q, *rows = ours.rope_qkv(*given)

    def as_expected(used: Tensor) -> bool:
        caches = [normal(4, 3, kv_heads, dim, dtype=dtype) for _ in "kv"]
        expected = [cache.clone() for cache in caches]
        for cache, new in zip(expected, rows, strict=True):
            cache.view(12, kv_heads, dim)[slots] = new
        assert same_bits(ours.rope_qkv_write(*given, *caches, used), q)
        return all(same_bits(a, b) for a, b in zip(caches, expected, strict=True))

    assert as_expected(slots)
    assert not as_expected(slots + torch.tensor([0, 0, 1, 0], device=DEVICE))


@pytest.mark.parametrize("dtype", EXACT_DTYPES)
def test_silu_mul_has_the_bits_of_torch(
    ours: KernelSet, reference: KernelSet, dtype: torch.dtype
) -> None:
    x = normal(4, 2 * 1100, dtype=dtype) * 3
    x[0, :6] = torch.tensor([0.0, -0.0, 200.0, -200.0, torch.inf, torch.nan])
    x[1, :8] = torch.tensor([-87, -88.7, -88.75, -89, 86.9, 87.1, -0.35, 1e4])  # exp's edges
    assert same_bits(ours.silu_mul(x).nan_to_num(7), reference.silu_mul(x).nan_to_num(7))
    assert ours.silu_mul(x)[0, 5].isnan()


def test_exp_and_log_are_those_of_torch(ours: KernelSet) -> None:
    """Through the ops that use them: silu of a range of gates, and noise of many words."""
    gates = torch.linspace(-90, 90, 20_001, device=DEVICE).view(1, -1)
    expected = gates / (1.0 + exp_f32(-gates))
    assert same_bits(ours.silu_mul(torch.cat([gates, torch.ones_like(gates)], 1)), expected)
    total = exp_f32(torch.zeros(1, 5, device=DEVICE)).sum(-1)
    expected = -log_f64(total.double()).float().expand(1, 5)
    assert same_bits(ours.log_softmax(torch.zeros(1, 5, device=DEVICE)), expected)


@pytest.mark.parametrize("vocab", [1, 4095, 4096, 9001])
def test_log_softmax_close_to_fp64(ours: KernelSet, vocab: int) -> None:
    logits = normal(3, vocab)
    logits[:, 1::5] = -torch.inf
    result = ours.log_softmax(logits)
    assert torch.equal(result.isinf(), logits.isinf())
    finite = logits.isfinite()
    exact = logits.double().log_softmax(-1)
    torch.testing.assert_close(result[finite].double(), exact[finite], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("vocab", [1, 4095, 9001])
def test_a_logprob_out_of_the_normalisers_has_the_bits_of_log_softmax(
    ours: KernelSet, vocab: int
) -> None:
    logits = normal(5, vocab)
    logits[:, 1::5] = -torch.inf
    assert ours.log_normalisers is not None
    highest, log_totals = ours.log_normalisers(logits)
    assert torch.equal(highest, logits.amax(1))
    high, log_total = highest.unsqueeze(1), log_totals.unsqueeze(1)
    assert same_bits((logits - high) - log_total, ours.log_softmax(logits))
    assert vocab == 1 or not same_bits(logits - (high + log_total), ours.log_softmax(logits))


def run_all(kernels: KernelSet, dtype: torch.dtype, which: Tensor) -> list[Tensor]:
    """Every row-wise op on the rows ``which`` of 21, side by side a row."""
    x, residual = normal(21, 200, dtype=dtype)[which], normal(21, 200, dtype=dtype).flip(0)[which]
    weight = normal(200, dtype=dtype)
    qkv, norm, table, positions = qkv_inputs(dtype, 21)
    qkv, positions = qkv[which], positions[which]
    normed = kernels.rope_qkv(qkv, 5, 2, norm, table, positions)
    plain = kernels.rope_qkv(qkv, 5, 2, None, table, positions)
    return [
        kernels.rms_norm(x, weight, 1e-5),
        torch.cat(kernels.add_rms_norm(x, residual, weight, 1e-5), dim=-1),
        torch.cat(normed, dim=1).flatten(1),
        torch.cat(plain, dim=1).flatten(1),
        kernels.silu_mul(x),
        kernels.log_softmax(normal(21, 5000)[which]),
    ]


def batches_change_a_bit(run: Callable[[Tensor], list[Tensor]]) -> bool:
    order = torch.randperm(21, generator=torch.Generator().manual_seed(0), device="cpu")
    whole = run(torch.arange(21))
    mixed = run(order)
    single = [run(order[i : i + 1]) for i in range(21)]
    alone = [torch.cat(rows) for rows in zip(*single, strict=True)]
    return not all(
        same_bits(a[order], b) and same_bits(b, c)
        for a, b, c in zip(whole, mixed, alone, strict=True)
    )


@pytest.mark.parametrize("dtype", STEP)
def test_batch_and_order_change_no_bit(ours: KernelSet, dtype: torch.dtype) -> None:
    assert not batches_change_a_bit(lambda which: run_all(ours, dtype, which))


def test_an_order_from_the_batch_is_caught(ours: KernelSet) -> None:
    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """In larger batches the sum begins at another column."""
        if len(x) <= 8:
            return ours.rms_norm(x, weight, eps)
        return ours.rms_norm(x.roll(1, -1), weight.roll(1), eps).roll(-1, -1)

    broken = replace(ours, rms_norm=rms_norm)
    assert batches_change_a_bit(lambda which: run_all(broken, torch.float32, which))


def test_misaligned_views_have_the_same_bits(ours: KernelSet) -> None:
    x, weight = normal(4, 201), normal(200)
    assert same_bits(
        ours.rms_norm(x[:, 1:], weight, 1e-5), ours.rms_norm(x[:, 1:].clone(), weight, 1e-5)
    )
    flat = normal(801)[1:].view(2, 400)
    assert same_bits(ours.silu_mul(flat), ours.silu_mul(flat.clone()))


def test_no_rows(ours: KernelSet) -> None:
    qkv, norm, table, positions = qkv_inputs(torch.float32)
    assert ours.rms_norm(normal(2, 8)[:0], normal(8), 1e-5).shape == (0, 8)
    assert ours.silu_mul(normal(2, 8)[:0]).shape == (0, 4)
    assert ours.log_softmax(normal(2, 8)[:0]).shape == (0, 8)
    given = (qkv[:0], 5, 2, norm, table, positions[:0])
    assert ours.rope_qkv(*given)[1].shape == (0, 2, 24)
    cache = normal(2, 3, 2, 24)
    assert ours.rope_qkv_write(*given, cache, cache, positions[:0]).shape == (0, 5, 24)


def test_the_self_check_passes_and_covers_the_draw(ours: KernelSet) -> None:
    assert check_rowwise(ours, 96, 200, DEVICE).mismatches == []
    choose = ours.choose
    assert choose is not None

    def by_the_batch(logits: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        ids, scores = choose(logits, draw)
        return ids, scores + len(logits)

    broken = check_rowwise(replace(ours, choose=by_the_batch), 96, 200, DEVICE)
    assert [str(m) for m in broken.mismatches] == ["choose: other bits in a batch of 3 rows"]
