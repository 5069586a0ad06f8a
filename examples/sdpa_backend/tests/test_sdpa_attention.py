"""The kernels: the same bits however a sequence is cut, batched and paged; close to float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from isobit_sdpa_attention import KERNEL, TILE, SdpaAttention
from torch.nn.attention import SDPBackend

from isobit.plugins import AttentionConfig, Batch, LayerCache

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, GPU])]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CUTS = ([1, 64], [63], [64, 128], [65, 130], [7, 8, 9, 199], [16, 17, 48])
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Paged:
    """Sequences of given lengths in shuffled pages; the rest of the cache is NaN."""

    def __init__(self, device, lengths, *, heads=(6, 2), dim=32, page_size=16, seed=0, **changes):
        dtype = changes.pop("dtype", torch.float32)
        self.config = AttentionConfig(
            num_layers=1,
            num_q_heads=heads[0],
            num_kv_heads=heads[1],
            head_dim=dim,
            scale=dim**-0.5,
            page_size=page_size,
            dtype=dtype,
            device=device,
            max_model_len=1000,
            **changes,
        )
        self.backend = SdpaAttention(self.config)
        make = torch.Generator().manual_seed(sum(lengths) + dim)
        shapes = [(n, h, dim) for n in lengths for h in (heads[0], heads[1], heads[1])]
        drawn = [torch.randn(s, generator=make).to(device, dtype) for s in shapes]
        self.q, self.k, self.v = drawn[::3], drawn[1::3], drawn[2::3]
        pages = [-(-n // page_size) for n in lengths]
        shuffle = torch.Generator().manual_seed(seed)
        own = (1 + torch.randperm(sum(pages), generator=shuffle)).to(device).split(pages)
        self.table = torch.zeros(len(lengths), max(pages), dtype=torch.int32, device=device)
        for row, numbers in zip(self.table, own, strict=True):
            row[: len(numbers)] = numbers
        offsets = torch.arange(page_size, device=device)
        self.slots = [(numbers[:, None] * page_size + offsets).flatten() for numbers in own]
        self.shape = self.backend.kv_cache_shape(sum(pages) + 1)
        self.clear()

    def clear(self):
        options = {"dtype": self.config.dtype, "device": self.config.device}
        self.cache = LayerCache(0, *(torch.full(self.shape, torch.nan, **options) for _ in "kv"))

    def step(self, parts):
        """parts: (sequence, first position, end), each after what went before -> their rows."""
        lens = [end - first for _, first, end in parts]
        device = self.config.device
        q, k, v = (torch.cat([x[b][i:j] for b, i, j in parts]) for x in (self.q, self.k, self.v))
        counts = torch.tensor([0, *lens], dtype=torch.int32, device=device)
        batch = Batch(
            token_ids=torch.zeros(sum(lens), dtype=torch.int64, device=device),
            positions=torch.cat([torch.arange(i, j, device=device) for _, i, j in parts]),
            slot_mapping=torch.cat([self.slots[b][i:j] for b, i, j in parts]),
            cu_seqlens_q=counts.cumsum(0, dtype=torch.int32),
            seq_lens=torch.tensor([j for *_, j in parts], dtype=torch.int32, device=device),
            block_table=self.table[[b for b, _, _ in parts]],
            query_lens=lens,
            kv_lens=[j for *_, j in parts],
            num_decodes=0,
        )
        out = torch.full_like(q, torch.nan)
        self.backend.run(q, k, v, self.cache, self.backend.plan(batch), out)
        return list(out.split(lens))

    def prefill(self, b=0):
        """The whole sequence in one step on a cold cache."""
        self.clear()
        return self.step([(b, 0, len(self.q[b]))])[0]

    def in_chunks(self, cuts, b=0):
        self.clear()
        edges = [0, *cuts, len(self.q[b])]
        return torch.cat([self.step([(b, i, j)])[0] for i, j in pairwise(edges)])


def exact(case: Paged, b=0, window=None):
    group = case.config.num_q_heads // case.config.num_kv_heads
    q, k, v = (x[b].double().transpose(0, 1) for x in (case.q, case.k, case.v))
    scores = q @ k.repeat_interleave(group, 0).transpose(1, 2) * case.config.scale
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    if window is not None:
        hidden |= torch.ones_like(hidden).tril(-window)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return (weights @ v.repeat_interleave(group, 0)).transpose(0, 1)


def assert_same_bits(a, b):
    assert not a.isnan().any()
    assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "dim"), [((1, 1), 8), ((9, 3), 64), ((16, 1), 24), ((14, 2), 40), ((4, 2), 256)]
)
def test_close_to_fp64_and_decode_equals_prefill(device, heads, dim, dtype):
    case = Paged(device, [200], heads=heads, dim=dim, dtype=dtype)
    whole = case.prefill()
    torch.testing.assert_close(whole.double(), exact(case), rtol=0, atol=TOLERANCE[dtype])
    assert_same_bits(case.in_chunks(range(1, 200)), whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("page_size", [1, 3, 16, 300])
def test_chunks_equal_prefill(device, page_size, dtype):
    case = Paged(device, [200], page_size=page_size, dtype=dtype)
    whole = case.prefill()
    for cuts in CUTS:
        assert_same_bits(case.in_chunks(cuts), whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_pages_and_threads_change_no_bit(device, dtype):
    lengths = [200, 1, 64, 65, 130]
    case = Paged(device, lengths, dtype=dtype)
    alone = [case.prefill(b) for b in range(len(lengths))]
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for order in ([0, 1, 2, 3, 4], [4, 2, 0], [3, 1]):
            other = Paged(device, lengths, dtype=dtype, seed=threads)
            first = other.step([(b, 0, -(-lengths[b] // 2)) for b in order])
            rest = [(b, -(-lengths[b] // 2), lengths[b]) for b in order if lengths[b] > 1]
            second = dict(zip([b for b, *_ in rest], other.step(rest), strict=True))
            for b, head in zip(order, first, strict=True):
                assert_same_bits(torch.cat([head, second.get(b, head[:0])]), alone[b])


@pytest.mark.parametrize("window", [1, 5, 16, 17, 100, 5000])
def test_sliding_windows(device, window):
    case = Paged(device, [200], sliding_windows=(window,))
    whole = case.prefill()
    torch.testing.assert_close(whole.double(), exact(case, 0, window), rtol=0, atol=3e-6)
    for cuts in (*CUTS, range(1, 200)):
        assert_same_bits(case.in_chunks(cuts), whole)


def test_each_layer_has_its_own_window(device):
    case = Paged(device, [100], sliding_windows=(7, None))
    case.backend = SdpaAttention(replace(case.config, num_layers=2))
    assert_same_bits(case.prefill(), Paged(device, [100], sliding_windows=(7,)).prefill())
    plain = Paged(device, [100]).prefill()
    assert not torch.equal(case.prefill(), plain)
    case.clear()
    case.cache = LayerCache(1, case.cache.k, case.cache.v)
    assert_same_bits(case.step([(0, 0, 100)])[0], plain)


def test_a_long_prompt(device):
    case = Paged(device, [900], heads=(9, 3), dim=64)
    whole = case.prefill()
    torch.testing.assert_close(whole.double(), exact(case), rtol=0, atol=3e-6)
    assert_same_bits(case.in_chunks([700, 701, 702, 850]), whole)


def test_tiles_that_follow_the_chunk_are_caught(device, monkeypatch):
    """Negative control: tiles of another size give other bits, on CUDA another kernel does."""
    case = Paged(device, [900], heads=(9, 3), dim=64)
    whole = case.prefill()
    if device.type == "cuda":
        monkeypatch.setitem(KERNEL, "cuda", SDPBackend.MATH)
    else:
        monkeypatch.setitem(TILE, "cpu", 256)
    other = Paged(device, [900], heads=(9, 3), dim=64)
    torch.testing.assert_close(other.prefill(), whole, rtol=0, atol=3e-6)
    assert not torch.equal(other.prefill(), whole)
