from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from isobit.kernels.elementary import tree_sum
from isobit.kernels.kernel_set import KernelSet
from isobit.kernels.selfcheck import (
    CheckResult,
    check_attention,
    check_linear,
    check_rowwise,
    combined_digest,
)

ROWS = (1, 2, 4, 16, 64, 128)


class SplitsSmallBatches:
    """Negative control: a linear that splits K where there are few rows."""

    def __init__(self, weight: Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        self.weight = weight

    def accumulators(self, x: Tensor) -> Tensor:
        if x.shape[0] >= 16:
            return functional.linear(x, self.weight)
        half = self.in_features // 2
        left = functional.linear(x[:, :half], self.weight[:, :half])
        return left + functional.linear(x[:, half:], self.weight[:, half:])

    def __call__(self, x: Tensor) -> Tensor:
        return self.accumulators(x)


class DependsOnThreads(SplitsSmallBatches):
    """Negative control: another order where there is one thread only."""

    def accumulators(self, x: Tensor) -> Tensor:
        if torch.get_num_threads() > 1:
            return tree_sum(x[:, None, :] * self.weight)
        order = torch.randperm(self.in_features, generator=torch.Generator().manual_seed(0))
        return tree_sum((x[:, None, :] * self.weight)[..., order])


@pytest.fixture
def weight(generator) -> Tensor:
    return torch.randn(96, 576, generator=generator)


def test_sound_kernels_pass(kernels: KernelSet, weight):
    torch.set_num_threads(2)
    for dtype in (torch.float32, torch.bfloat16):
        linears = {"a": kernels.linear(weight.to(dtype)), "b": kernels.linear(weight.to(dtype))}
        results = [
            check_linear(linears, ROWS, dtype),
            check_attention(kernels, 9, 3, 64, 16, dtype),
            check_rowwise(kernels, 576, 1000),
        ]
        assert [m for r in results for m in r.mismatches] == []
        assert len(combined_digest(results)) == 12
    assert torch.get_num_threads() == 2


def test_digest_is_stable_and_says_what_ran(kernels: KernelSet, weight):
    def digest(w: Tensor) -> str:
        return check_linear({"a": kernels.linear(w)}, ROWS, torch.float32).digest

    assert digest(weight) == digest(weight)
    assert digest(weight) != digest(-weight)


def test_batch_variant_linear_is_caught(weight):
    result = check_linear({"bad": SplitsSmallBatches(weight)}, ROWS, torch.float32)
    cases = {m.case for m in result.mismatches}
    assert "in a batch of 16 rows" in cases
    assert "in a batch of 128 rows" in cases
    assert str(result.mismatches[0]).startswith("linear bad [96, 576]: other bits")


def test_thread_variant_linear_is_caught(weight):
    torch.set_num_threads(2)
    result = check_linear({"bad": DependsOnThreads(weight)}, (1, 4), torch.float32)
    assert {m.case for m in result.mismatches} == {"with one thread"}


def test_kernel_outside_the_contract_is_caught(native: KernelSet, weight):
    linear = native.linear(weight)
    linear.canonical = lambda x, columns: functional.linear(x, weight)[:, columns]
    result = check_linear({"bad": linear}, (1,), torch.float32)
    assert {m.case for m in result.mismatches} == {"than its contract's scalar loop"}


def test_batch_variant_attention_is_caught(kernels: KernelSet):
    def attention(q, k_cache, v_cache, table, cu_seqlens_q, seq_lens, scale, out):
        bias = 1.0 if q.shape[0] > 1 else 1.0 + 2.0**-20
        kernels.paged_attention(
            q, k_cache, v_cache, table, cu_seqlens_q, seq_lens, scale * bias, out
        )

    bad = dataclasses.replace(kernels, paged_attention=attention)
    cases = {m.case for m in check_attention(bad, 9, 3, 64, 16, torch.float32).mismatches}
    assert "decoding position 130 alone" in cases
    assert "decoding position 130 beside others" not in cases


def test_batch_variant_norm_is_caught(kernels: KernelSet):
    def norm(x, weight, eps):
        return kernels.rms_norm(x, weight, eps * (1 + x.shape[0]))

    bad = dataclasses.replace(kernels, rms_norm=norm)
    assert {m.op for m in check_rowwise(bad, 64, 100).mismatches} == {"rms_norm"}


def test_a_wrong_slot_is_caught(kernels: KernelSet):
    def written(*given):
        *rest, slots = given
        return kernels.rope_qkv_write(*rest, slots - 1)

    bad = dataclasses.replace(kernels, rope_qkv_write=written)
    assert {str(m) for m in check_rowwise(bad, 64, 100).mismatches} == {
        "rope_qkv_write: other bits in the cache of k",
        "rope_qkv_write: other bits in the cache of v",
    }


def test_global_generators_are_untouched(kernels: KernelSet, weight):
    before = torch.get_rng_state()
    check_linear({"a": kernels.linear(weight)}, (1, 4), torch.float32)
    check_attention(kernels, 2, 1, 16, 16, torch.float32)
    check_rowwise(kernels, 64, 100)
    assert torch.equal(before, torch.get_rng_state())


def test_nan_with_equal_bits_is_no_mismatch():
    result = CheckResult()
    x = torch.tensor([torch.nan, -0.0])
    result.expect_equal("op", "case", x, x.clone())
    assert result.mismatches == []
    result.expect_equal("op", "case", x, torch.tensor([torch.nan, 0.0]))
    assert len(result.mismatches) == 1
