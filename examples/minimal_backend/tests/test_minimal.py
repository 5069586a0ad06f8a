"""What the minimal backend declares is true, and what it does not declare would be false."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import isobit_minimal
import isobit_minimal_attention
import pytest
import torch
from torch import Tensor

from isobit import LLM, SamplingParams
from isobit.errors import ConfigError
from isobit.plugins import AttentionConfig, Batch, LayerCache
from isobit.verify.judge import INVARIANCES, judge_all
from isobit.verify.restart import RestartSpec
from isobit.verify.workload import make_cases

PAGE, HEADS, DIM = 16, (6, 2), 32
OPTIONS = {"load_format": "random", "device": "cpu", "attention_backend": "minimal"}


class Sequence(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor


def sequence(length: int) -> Sequence:
    generator = torch.Generator().manual_seed(length)
    heads = (HEADS[0], HEADS[1], HEADS[1])
    return Sequence(*(torch.randn(length, h, DIM, generator=generator) for h in heads))


def attend(parts: list[tuple[Sequence, int]], seed: int = 0) -> list[Tensor]:
    """The rows from a position on of each sequence, in one batch; the cache is NaN elsewhere."""
    config = AttentionConfig(
        num_layers=1,
        num_q_heads=HEADS[0],
        num_kv_heads=HEADS[1],
        head_dim=DIM,
        scale=DIM**-0.5,
        page_size=PAGE,
        dtype=torch.float32,
        device=torch.device("cpu"),
        max_model_len=16384,
    )
    backend = isobit_minimal_attention.MinimalAttention(config)
    ends = [len(s.q) for s, _ in parts]
    pages = [-(-end // PAGE) for end in ends]
    shuffled = 1 + torch.randperm(sum(pages), generator=torch.Generator().manual_seed(seed))
    k_cache, v_cache = (torch.full(backend.kv_cache_shape(sum(pages) + 1), torch.nan) for _ in "kv")
    table = torch.zeros(len(parts), max(pages), dtype=torch.int32)
    slots = []
    for b, (s, first) in enumerate(parts):
        own = shuffled[sum(pages[:b]) : sum(pages[: b + 1])]
        table[b, : pages[b]] = own
        slots.append((own[:, None] * PAGE + torch.arange(PAGE)).flatten()[: ends[b]])
        k_cache.view(-1, HEADS[1], DIM)[slots[b][:first]] = s.k[:first]
        v_cache.view(-1, HEADS[1], DIM)[slots[b][:first]] = s.v[:first]
        slots[b] = slots[b][first:]
    new = [end - first for end, (_, first) in zip(ends, parts, strict=True)]
    q, k, v = (torch.cat([s[i][first:] for s, first in parts]) for i in range(3))
    batch = Batch(
        token_ids=torch.zeros(sum(new), dtype=torch.int64),
        positions=torch.cat([torch.arange(n - m, n) for n, m in zip(ends, new, strict=True)]),
        slot_mapping=torch.cat(slots),
        cu_seqlens_q=torch.tensor([0, *new], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        seq_lens=torch.tensor(ends, dtype=torch.int32),
        block_table=table,
        query_lens=new,
        kv_lens=ends,
        num_decodes=sum(n == 1 for n in new),
    )
    out = torch.full_like(q, torch.nan)
    backend.run(q, k, v, LayerCache(0, k_cache, v_cache), backend.plan(batch), out)
    return list(out.split(new))


def exact(s: Sequence) -> Tensor:
    group = HEADS[0] // HEADS[1]
    q, k, v = (x.double().transpose(0, 1) for x in s)
    scores = q @ k.repeat_interleave(group, 0).transpose(1, 2) * DIM**-0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    return (weights @ v.repeat_interleave(group, 0)).transpose(0, 1)


@pytest.fixture(autouse=True)
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("length", [1, 2, 16, 17, 130, 700])
def test_close_to_fp64(length):
    s = sequence(length)
    (whole,), (part,) = attend([(s, 0)]), attend([(s, length - 1)])
    torch.testing.assert_close(whole.double(), exact(s), rtol=0, atol=3e-6)
    torch.testing.assert_close(part.double(), exact(s)[-1:], rtol=0, atol=3e-6)


def test_neighbours_pages_and_threads_change_no_bit():
    parts = [(sequence(n), first) for n, first in ((700, 699), (9, 8), (130, 0), (65, 0), (1, 0))]
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        alone = [attend([part])[0] for part in parts]
        if threads == 1:
            wanted = alone
        for seed, batch in enumerate(([0, 1, 2, 3, 4], [1, 2, 3], [4, 2, 0])):
            for b, result in zip(batch, attend([parts[b] for b in batch], seed), strict=True):
                assert torch.equal(result, wanted[b])
        assert all(map(torch.equal, alone, wanted))


def test_what_is_not_declared_would_be_false():
    """Negative control: the bits of a row do follow from the rows that come with it."""
    s = sequence(700)
    (whole,) = attend([(s, 0)])
    decoded = [torch.equal(attend([(s_cut, p)])[0][0], whole[p]) for s_cut, p in cuts(s)]
    assert not all(decoded)


def cuts(s: Sequence):
    return [(Sequence(*(x[: p + 1] for x in s)), p) for p in range(50, 700, 50)]


def test_a_prompt_of_8000_tokens():
    s = sequence(8000)
    (out,) = attend([(s, 0)])
    assert out.isfinite().all()


def engine(**options) -> LLM:
    return LLM("tiny-llama", **OPTIONS, **options)


def test_the_engine_serves_and_the_proofs_hold():
    options = {"model": "tiny-llama", **OPTIONS}
    with LLM(**options) as llm:
        vocab = llm.engine.vocab_size
        cases = make_cases(
            None, vocab, (1, 17, 300), max_new_tokens=5, temperature=0.0, sampling_seed=None
        )
        verdicts = list(judge_all(llm.engine, cases, RestartSpec(options, 1)))
    assert [v.invariance for v in verdicts] == list(INVARIANCES)
    assert [v.failure for v in verdicts if not v.holds] == []
    assert [v.invariance for v in verdicts if v.skipped] == ["chunk", "cache", "score"]


def test_the_engine_refuses_what_is_not_declared():
    with pytest.raises(ConfigError, match=isobit_minimal.REASON):
        engine(chunked_prefill=True)
    params = SamplingParams(temperature=0.0, max_tokens=4)
    with engine() as llm:
        assert "radix_cache" in str(llm.report)
        assert llm.generate([1, 2, 3], params)[0].outputs[0].token_ids


def test_it_is_short():
    code = 0
    for module in (isobit_minimal, isobit_minimal_attention):
        lines = [line.strip() for line in Path(module.__file__).read_text().splitlines()]
        code += sum(bool(line) and not line.startswith(("#", '"""')) for line in lines)
    assert code < 40
