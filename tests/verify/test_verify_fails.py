"""Negative controls: what is broken on purpose is found, and named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from isobit import LLM
from isobit.errors import SelfCheckError
from isobit.kernels.kernel_set import Linear
from isobit.verify.judge import Verdict, judge_all
from isobit.verify.workload import make_cases


class BatchVariantLinear:
    """Sums K in two halves where the batch is small, as a split-K kernel would."""

    def __init__(self, weight: Tensor, limit: int = 8) -> None:
        self._weight = weight
        self._limit = limit
        self.out_features, self.in_features = weight.shape

    def __call__(self, x: Tensor) -> Tensor:
        return self.accumulators(x).to(x.dtype)

    def accumulators(self, x: Tensor) -> Tensor:
        x, weight = x.double(), self._weight.double()
        half = self.in_features // 2
        if len(x) > self._limit:
            return (x @ weight.T).float()
        low = (x[:, :half] @ weight[:, :half].T).float()
        return low + (x[:, half:] @ weight[:, half:].T).float()


def judge(llm: LLM) -> dict[str, Verdict]:
    cases = make_cases(
        None,
        llm.engine.vocab_size,
        (1, 16, 17, 40),
        max_new_tokens=4,
        temperature=0,
        sampling_seed=None,
    )
    return {verdict.invariance: verdict for verdict in judge_all(llm.engine, cases, None)}


def test_a_batch_variant_linear_is_caught_and_named() -> None:
    with LLM("tiny-qwen3", load_format="random") as llm:
        layer = llm.engine.runner.decoder.layers[2]
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(128, 384, generator=generator) * 0.02
        layer.down_proj = BatchVariantLinear(weight)
        verdicts = judge(llm)
    for name in ("batch", "order", "chunk", "cache", "score"):
        failure = verdicts[name].failure
        assert failure is not None
        assert "layers.2.mlp.down_proj" in failure, failure
        assert "token" in failure
        assert verdicts[name].distinct > 1
    assert verdicts["rng"].holds


def test_a_sampler_that_sees_its_neighbours_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from isobit.core import runner

    original = runner.sample

    def leaky(logits: Tensor, rows: list[Any], *rest: Any) -> object:
        return original(logits + 1e-3 * len(rows) * torch.arange(logits.shape[1]), rows, *rest)

    monkeypatch.setattr(runner, "sample", leaky)
    with LLM("tiny-llama", load_format="random") as llm:
        failure = judge(llm)["batch"].failure
    assert failure is not None
    assert "sampling" in failure


def test_a_sampler_that_reads_the_global_generator_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from isobit.core import runner

    original = runner.sample

    def noisy(logits: Tensor, *rest: Any) -> object:
        return original(logits + torch.rand(()), *rest)

    monkeypatch.setattr(runner, "sample", noisy)
    with LLM("tiny-llama", load_format="random") as llm:
        assert not judge(llm)["rng"].holds


def test_the_librarys_default_kernels_do_not_hold() -> None:
    """What the constraints are for: torch as it comes gives other bits in other batches."""
    with LLM("tiny-qwen3", load_format="random", deterministic=False, kernels="library") as llm:
        verdicts = judge(llm)
    if torch.backends.mkl.is_available():
        assert not verdicts["batch"].holds
        assert not verdicts["chunk"].holds


@pytest.mark.parametrize("kernels", ["auto", "native", "torch"])
def test_the_engine_refuses_to_start_on_broken_kernels(
    monkeypatch: pytest.MonkeyPatch, kernels: str
) -> None:
    from isobit.core import kernel_choice
    from isobit.kernels.dispatch import load_kernels

    def broken(name: str, device: torch.device) -> object:
        from dataclasses import replace

        linear: Callable[[Tensor], Linear] = BatchVariantLinear
        return replace(load_kernels(name, device), linear=linear)

    monkeypatch.setattr(kernel_choice, "load_kernels", broken)
    with pytest.raises(SelfCheckError, match="does not start"):
        LLM("tiny-qwen3", load_format="random", kernels=kernels)


def test_auto_demotes_a_broken_provider_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from isobit.core import kernel_choice
    from isobit.kernels.dispatch import load_kernels

    def broken(name: str, device: torch.device) -> object:
        kernels = load_kernels(name, device)
        return replace(kernels, linear=BatchVariantLinear) if name == "native" else kernels

    monkeypatch.setattr(kernel_choice, "load_kernels", broken)
    with LLM("tiny-qwen3", load_format="random") as llm:
        row = next(row for row in llm.report.rows if row[0] == "kernels")
    assert row[1] == "torch"
    assert "not native" in row[2]


def test_the_report_names_ways_that_gave_other_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Providers with several ways for an op, such as triton, say which they do not use."""
    from dataclasses import replace

    from isobit.core import kernel_choice
    from isobit.kernels.dispatch import load_kernels

    line = "cublaslt, of other bits for 3 products, first N40 K300"

    def with_ways(name: str, device: torch.device) -> object:
        return replace(load_kernels(name, device), demoted=lambda device: [line])

    monkeypatch.setattr(kernel_choice, "load_kernels", with_ways)
    with LLM("tiny-qwen3", load_format="random") as llm:
        row = next(row for row in llm.report.rows if row[0] == "kernels")
    assert row[2].endswith(f"; not {line}")
