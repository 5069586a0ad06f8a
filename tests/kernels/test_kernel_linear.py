from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from isobit.kernels.kernel_set import KernelSet
from isobit.kernels.native import library

ROWS = [*range(1, 71), 96, 128, 200, 512]
SHAPES = [(96, 64), (33, 7), (1, 1), (100, 576), (64, 1536)]
DTYPES = [torch.float32, torch.bfloat16]


def operands(n: int, k: int, dtype: torch.dtype, generator: torch.Generator, m: int = 512):
    x = torch.randn(m, k, generator=generator)
    x[:, 3::29] *= 100
    weight = torch.randn(n, k, generator=generator)
    return x.to(dtype), weight.to(dtype)


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_close_to_fp64(kernels: KernelSet, n, k, dtype, generator):
    x, weight = operands(n, k, dtype, generator, m=37)
    linear = kernels.linear(weight)
    exact = x.double() @ weight.double().T
    magnitude = x.double().abs() @ weight.double().abs().T
    assert ((linear.accumulators(x) - exact).abs() <= magnitude * 1e-5).all()
    assert linear(x).dtype == dtype
    assert torch.equal(linear(x), linear.accumulators(x).to(dtype))
    assert (linear.out_features, linear.in_features) == (n, k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), [(100, 576), (64, 1536)])
def test_batch_size_and_threads_change_no_bit(kernels: KernelSet, n, k, dtype, generator):
    x, weight = operands(n, k, dtype, generator)
    linear = kernels.linear(weight)
    probes = torch.tensor([m - 1 for m in ROWS])
    alone = torch.cat([linear.accumulators(x[i : i + 1]) for i in probes])
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for m in ROWS:
            batch = linear.accumulators(x[:m])[probes[probes < m]]
            assert torch.equal(bits(batch), bits(alone[: len(batch)])), (threads, m)


def test_order_of_rows_changes_no_bit(kernels: KernelSet, generator):
    x, weight = operands(96, 576, torch.float32, generator, m=131)
    linear = kernels.linear(weight)
    order = torch.randperm(131, generator=generator)
    assert torch.equal(bits(linear.accumulators(x)[order]), bits(linear.accumulators(x[order])))


def test_views_give_the_same_bits(kernels: KernelSet, generator):
    x, weight = operands(96, 65, torch.float32, generator, m=20)
    linear = kernels.linear(weight)
    whole = linear.accumulators(x)
    assert torch.equal(bits(linear.accumulators(x[1:])), bits(whole[1:]))
    strided = x.T.contiguous().T
    assert torch.equal(bits(linear.accumulators(strided)), bits(whole))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_is_the_scalar_loop(native: KernelSet, isa, dtype, generator):
    x, weight = operands(100, 577, dtype, generator, m=29)
    linear = native.linear(weight)
    assert library.active_isa() == isa
    canonical = linear.canonical(x, slice(None))
    assert torch.equal(bits(linear.accumulators(x)), bits(canonical))


def test_empty_batches_and_widths(kernels: KernelSet):
    assert kernels.linear(torch.ones(5, 3))(torch.ones(0, 3)).shape == (0, 5)
    assert torch.equal(kernels.linear(torch.ones(5, 0))(torch.ones(2, 0)), torch.zeros(2, 5))


def test_weight_is_copied(kernels: KernelSet):
    weight = torch.ones(32, 4)
    linear = kernels.linear(weight)
    weight.zero_()
    assert torch.equal(linear(torch.ones(1, 4)), torch.full((1, 32), 4.0))


def test_the_comparison_can_fail(generator):
    """Negative control: an order that depends on the batch is seen by the same comparison."""
    x, weight = operands(96, 576, torch.float32, generator, m=8)

    def split_when_small(rows: Tensor) -> Tensor:
        if rows.shape[0] > 4:
            return functional.linear(rows, weight)
        return functional.linear(rows[:, :288], weight[:, :288]) + functional.linear(
            rows[:, 288:], weight[:, 288:]
        )

    assert not torch.equal(bits(split_when_small(x[:1])), bits(split_when_small(x)[:1]))
