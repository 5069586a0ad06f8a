from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from isobit.kernels.elementary import exp_f32, log_f64, tree_sum
from isobit.kernels.kernel_set import KernelSet, QkNorm
from isobit.kernels.native import library
from isobit.kernels.rope import rope_table

DTYPES = [torch.float32, torch.bfloat16]
WIDTHS = [1, 15, 16, 17, 64, 576, 1000]


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16 if x.element_size() == 2 else torch.int32)


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 2e-6, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-2}


def test_exp_is_accurate_and_never_subnormal():
    x = torch.cat([torch.linspace(-87, 88.7, 100_001), torch.tensor([0.0])])
    exact = x.double().exp()
    assert ((exp_f32(x).double() - exact).abs() <= exact * 2.5e-7).all()
    edges = torch.tensor([-torch.inf, -87.1, -0.0, 89.0, torch.inf, torch.nan])
    result = exp_f32(edges)
    assert result[:5].tolist() == [0.0, 0.0, 1.0, torch.inf, torch.inf]
    assert result[5].isnan()


def test_log_is_accurate():
    x = torch.logspace(-300, 300, 100_001, dtype=torch.float64)
    x = torch.cat([x, 1 - torch.logspace(-16, -0.1, 1000, dtype=torch.float64)])
    exact = x.log()
    assert ((log_f64(x) - exact).abs() <= exact.abs() * 2e-15).all()


@pytest.mark.parametrize("width", [1, 2, 3, 17, 576])
def test_tree_sum(width, generator):
    x = torch.randn(4, width, generator=generator)
    torch.testing.assert_close(tree_sum(x), x.double().sum(-1).float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
def test_rms_norm(kernels: KernelSet, width, dtype, generator):
    x = (torch.randn(21, width, generator=generator) * 7).to(dtype)
    weight = torch.randn(width, generator=generator).to(dtype)
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    result = kernels.rms_norm(x, weight, 1e-5)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), exact, **tolerance(dtype))


def test_rms_norm_over_heads(kernels: KernelSet, generator):
    x = torch.randn(5, 3, 64, generator=generator)
    weight = torch.randn(64, generator=generator)
    result = kernels.rms_norm(x, weight, 1e-6)
    assert torch.equal(
        bits(result), bits(kernels.rms_norm(x.flatten(0, 1), weight, 1e-6)).view_as(x)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_add_rms_norm(kernels: KernelSet, dtype, generator):
    x, residual = (torch.randn(9, 100, generator=generator).to(dtype) for _ in range(2))
    weight = torch.randn(100, generator=generator).to(dtype)
    normed, total = kernels.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, kernels.rms_norm(total, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [2, 8, 64, 128])
def test_rope(kernels: KernelSet, dim, dtype, generator):
    table = rope_table(10_000.0 ** -(torch.arange(0, dim, 2) / dim), 4096)
    packed = torch.randn(7, 5 * dim, generator=generator).to(dtype)
    q, k = packed.view(7, 5, dim).split([3, 2], dim=1)
    positions = torch.tensor([0, 1, 5, 64, 1000, 4095, 17])
    for x, result in zip((q, k), kernels.rope(q, k, table, positions), strict=True):
        cos, sin = table[positions].double()[:, None].chunk(2, dim=-1)
        a, b = x.double().chunk(2, dim=-1)
        exact = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), exact, **tolerance(dtype))


def test_rope_table_follows_hugging_face():
    inv_freq = 10_000.0 ** -(torch.arange(0, 64, 2, dtype=torch.float32) / 64)
    angles = torch.arange(3000).float()[:, None] * inv_freq
    table = rope_table(inv_freq, 3000)
    torch.testing.assert_close(table[:, :32], angles.cos(), rtol=0, atol=2e-7)
    torch.testing.assert_close(table[:, 32:], angles.sin(), rtol=0, atol=2e-7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_qkv_is_split_norm_and_rope(kernels: KernelSet, dtype, generator):
    qkv = torch.randn(5, (3 + 1 + 1) * 16, generator=generator).to(dtype)
    norm = QkNorm(*torch.randn(2, 16, generator=generator).to(dtype), 1e-6)
    table, positions = rope_table(torch.logspace(0, -4, 8), 32), torch.arange(5) * 3
    q, k, v = (part.contiguous() for part in qkv.view(5, 5, 16).split([3, 1, 1], dim=1))
    plain = (*kernels.rope(q, k, table, positions), v)
    q, k = kernels.rms_norm(q, norm.q, norm.eps), kernels.rms_norm(k, norm.k, norm.eps)
    normed = (*kernels.rope(q, k, table, positions), v)
    for weights, expected in ((None, plain), (norm, normed)):
        for a, b in zip(
            kernels.rope_qkv(qkv, 3, 1, weights, table, positions), expected, strict=True
        ):
            assert a.is_contiguous()
            assert torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_qkv_write_puts_k_and_v_into_their_slots(kernels: KernelSet, dtype, generator):
    qkv = torch.randn(5, (3 + 2 + 2) * 16, generator=generator).to(dtype)
    table, positions = rope_table(torch.logspace(0, -4, 8), 32), torch.arange(5) * 3
    slots = torch.tensor([9, 4, 11, 5, 14])
    caches = [torch.full((4, 4, 2, 16), torch.nan, dtype=dtype) for _ in "kv"]
    given = (qkv, 3, 2, None, table, positions)
    q, *rows = kernels.rope_qkv(*given)
    assert torch.equal(bits(kernels.rope_qkv_write(*given, *caches, slots)), bits(q))
    for cache, new in zip(caches, rows, strict=True):
        expected = torch.full_like(cache, torch.nan)
        expected.view(16, 2, 16)[slots] = new
        assert torch.equal(bits(cache), bits(expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu_mul(kernels: KernelSet, dtype, generator):
    x = (torch.randn(13, 300, generator=generator) * 20).to(dtype)
    exact = functional.silu(x[:, :150].double()) * x[:, 150:].double()
    torch.testing.assert_close(kernels.silu_mul(x).double(), exact, **tolerance(dtype))


def test_silu_mul_of_extremes(kernels: KernelSet):
    gates = torch.tensor([[-1e30, -200.0, -88.0, 0.0, 88.0, 1e30]])
    result = kernels.silu_mul(torch.cat([gates, torch.ones(1, 6)], dim=1))
    torch.testing.assert_close(result, functional.silu(gates), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("vocab", [1, 5, 16, 31, 1000, 49152])
def test_log_softmax(kernels: KernelSet, vocab, generator):
    logits = torch.randn(3, vocab, generator=generator) * 8
    logits[1, vocab // 2 :] = -torch.inf
    logits[1, 0] = 3.0
    exact = logits.double().log_softmax(-1)
    torch.testing.assert_close(kernels.log_softmax(logits).double(), exact, rtol=2e-6, atol=4e-6)


def run_all(kernels: KernelSet, x: Tensor, positions: Tensor) -> list[Tensor]:
    """Every row-wise op on the same rows ``[T, 192]``."""
    heads = x.view(-1, 3, 64)
    table = rope_table(torch.logspace(0, -4, 32), 1024)
    normed, total = kernels.add_rms_norm(x, x.flip(-1), x.new_ones(192), 1e-5)
    return [
        kernels.rms_norm(x, x.new_ones(192), 1e-5),
        normed,
        total,
        *(t.flatten(1) for t in kernels.rope(heads, heads[:, :1], table, positions)),
        kernels.silu_mul(x),
        kernels.log_softmax(x.float()),
        kernels.gumbel(positions - 5, positions % 3, positions, 97),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_order_and_threads_change_no_bit(kernels: KernelSet, dtype, generator):
    x = (torch.randn(130, 192, generator=generator) * 5).to(dtype)
    positions = torch.arange(130)
    alone = [
        torch.cat(rows)
        for rows in zip(
            *(run_all(kernels, x[i : i + 1], positions[i : i + 1]) for i in range(130)), strict=True
        )
    ]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for m in (1, 2, 3, 15, 16, 17, 70, 128, 130):
            order = torch.randperm(130, generator=generator)[:m]
            for a, b in zip(alone, run_all(kernels, x[order], positions[order]), strict=True):
                assert torch.equal(bits(a[order]), bits(b)), (threads, m)


def test_every_instruction_set_gives_the_same_bits(native: KernelSet, isa, generator):
    x = torch.randn(33, 192, generator=generator) * 5
    x[0, 0] = torch.inf
    here = run_all(native, x, torch.arange(33))
    library.set_isa(None)
    for a, b in zip(here, run_all(native, x, torch.arange(33)), strict=True):
        assert torch.equal(bits(a), bits(b))


def test_the_comparison_can_fail(generator):
    """Negative control: adding the same numbers in another order is seen."""
    x = torch.randn(64, 576, generator=generator).square()
    shuffled = x[:, torch.randperm(576, generator=generator)]
    assert not torch.equal(bits(tree_sum(x)), bits(tree_sum(shuffled)))
