"""The fa3 backend on a library in plain torch, judged by the conformance suite on a CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from isobit.backends import fa3, fa3_attention
from isobit.backends.base import AttentionConfig, Batch, LayerCache
from isobit.backends.fa3_attention import LONG_QUERY, FlashAttention3
from isobit.plugins.conformance.subject import Subject
from isobit.plugins.conformance.suite import Outcome, make_context, run_check
from isobit.plugins.conformance.waivers import known_check
from isobit.plugins.manager import PluginHost

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def judged(check: str) -> Outcome:
    """One check of the suite, as if the backend ran on a CPU; in bfloat16 and short."""
    (spec,) = fa3.isobit_attention_backends()
    offers = replace(
        spec.capabilities,
        dtypes={"bfloat16"},
        devices={"cpu"},
        head_dims={64},
        page_sizes={16},
        compute_capability=None,
        highest_compute_capability=None,
    )
    host = PluginHost(candidates=[])
    subject = Subject(replace(spec, capabilities=offers), FlashAttention3, "isobit", "0", host)
    return run_check(known_check(check), make_context(subject, "cpu", quick=True), {})


CHECKS = ("reference", "unwritten", "writes", "batch", "chunk", "decode")


@pytest.mark.parametrize("check", [*CHECKS, "graph"])
def test_the_suite_holds(fake: Any, check: str) -> None:
    outcome = judged(check)
    assert outcome.status == "passed", outcome.reason
    assert outcome.findings
    assert {call["num_splits"] for call in fake.calls} == {1}


@pytest.mark.usefixtures("broken")
def test_a_library_that_splits_by_the_batch_is_caught() -> None:
    assert judged("batch").status == "failed"


@pytest.mark.usefixtures("fake")
def test_a_query_length_that_follows_the_batch_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fa3_attention, "_ONE_TILE_LENGTH", {64, 128})
    assert judged("decode").status == "failed"


def config(**changes: Any) -> AttentionConfig:
    facts: dict[str, Any] = {
        "num_layers": 2,
        "num_q_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        "scale": 0.125,
        "page_size": 16,
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "max_model_len": 200,
    }
    return AttentionConfig(**(facts | changes))


def step(backend: FlashAttention3, *query_lens: int, layer: int = 0) -> None:
    """One step of new sequences of these lengths, all on one page each."""
    c, rows = backend.config, sum(query_lens)
    starts = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in query_lens])
    batch = Batch(
        token_ids=torch.zeros(rows, dtype=torch.int64),
        positions=positions,
        slot_mapping=positions,
        cu_seqlens_q=starts,
        seq_lens=torch.tensor(query_lens, dtype=torch.int32),
        block_table=torch.zeros(len(query_lens), 1, dtype=torch.int32),
        query_lens=query_lens,
        kv_lens=query_lens,
        num_decodes=0,
    )
    cache = [torch.zeros(2, 16, c.num_kv_heads, c.head_dim, dtype=c.dtype) for _ in range(2)]
    q = torch.zeros(rows, c.num_q_heads, c.head_dim, dtype=c.dtype)
    backend.run_written(q, LayerCache(layer, *cache), backend.plan(batch), torch.empty_like(q))


@pytest.mark.parametrize(
    ("head_dim", "deterministic", "max_model_len", "expected"),
    [
        (64, True, 200, {LONG_QUERY}),
        (64, True, 9000, {9000}),
        (96, True, 200, {LONG_QUERY}),
        (128, True, 200, {1, 9}),
        (64, False, 200, {1, 9}),
    ],
)
def test_max_seqlen_q_is_constant_wherever_a_tile_follows_it(
    fake: Any, head_dim: int, deterministic: bool, max_model_len: int, expected: set[int]
) -> None:
    facts = config(head_dim=head_dim, deterministic=deterministic, max_model_len=max_model_len)
    for query_lens in ((1, 1), (9, 1)):
        step(FlashAttention3(facts), *query_lens)
    assert {call["max_seqlen_q"] for call in fake.calls} == expected
    assert {call["max_seqlen_k"] for call in fake.calls} == {max_model_len}
    assert {call["num_splits"] for call in fake.calls} == {int(deterministic)}


@pytest.mark.usefixtures("fake")
def test_the_library_is_named() -> None:
    assert FlashAttention3(config()).library() == "sgl 1.0 (fake.so)"
