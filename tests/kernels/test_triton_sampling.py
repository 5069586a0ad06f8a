"""Noise, filters and the draw on the device; in Triton's interpreter without a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs the package triton")

import triton
import triton.language as tl

from isobit.errors import EngineError
from isobit.kernels.dispatch import load_kernels
from isobit.kernels.elementary import exp_f32
from isobit.kernels.kernel_set import Draw, KernelSet
from isobit.kernels.philox import gumbel_torch, philox_4x32_10
from isobit.kernels.triton.choose import choose
from isobit.kernels.triton.filters import cut
from isobit.kernels.triton.philox import ROUGH, gumbel, gumbel_of, noise_words, rough_gumbel_of
from isobit.kernels.triton.trials import same_bits
from isobit.kernels.triton.vocab import block_maxima
from isobit.sampling.filters import kept_ids
from isobit.sampling.params import SamplingParams
from isobit.sampling.rows import SamplingRow
from isobit.sampling.sampler import sample

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB = 2500  # two programs a row
KEYS = [(0, 0, 0), (-1, 3, 2**32 - 1), (2**62 + 5, 2**31 + 7, 9), (42, 1, 5), (42, 0, 5)]
MASK = 2**32 - 1
FILTERS = [
    {"top_k": 1},
    {"top_k": 40},
    {"top_k": VOCAB - 1},
    {"top_p": 0.7},
    {"top_p": 1e-9},
    {"top_p": 0.999999, "temperature": 5.0},
    {"min_p": 0.05},
    {"min_p": 1e-30},
    {"min_p": 1.0},
    {"top_k": 50, "top_p": 0.9, "min_p": 0.01, "temperature": 1.7},
    {"top_k": 20, "top_p": 0.5, "temperature": 0.1},
]
PARAMS = [SamplingParams(**p) for p in ({"temperature": 0}, {}, {"temperature": 0.3}, *FILTERS)]


@pytest.fixture
def ours() -> KernelSet:
    return load_kernels("triton", DEVICE)


def logits_of(rows: int, vocab: int = VOCAB) -> Tensor:
    """Many ties, both zeros, and some impossible tokens."""
    x = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(rows)) * 3
    x = (x * 2).round() / 2
    x[:, vocab // 3 : vocab // 2] = -torch.inf
    return x.to(DEVICE)


def rows_of(params: Sequence[SamplingParams]) -> list[SamplingRow]:
    return [
        SamplingRow(
            params=p,
            seed=3 * i - 5,
            choice=i % 3,
            position=7 + i,
            prompt_token_ids=[1, 2, 3],
            output_token_ids=[2, 2, 4],
            eos_token_ids=[0],
        )
        for i, p in enumerate(params)
    ]


@triton.jit
def _store_words(seed_ptr, choice_ptr, position_ptr, out_ptr, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    seed, choice, position = tl.load(seed_ptr), tl.load(choice_ptr), tl.load(position_ptr)
    w0, w1, w2, w3 = noise_words(seed, choice, position, i)
    tl.store(out_ptr + i, w0.to(tl.int64))
    tl.store(out_ptr + COUNT + i, w1.to(tl.int64))
    tl.store(out_ptr + 2 * COUNT + i, w2.to(tl.int64))
    tl.store(out_ptr + 3 * COUNT + i, w3.to(tl.int64))


@pytest.mark.parametrize("key", KEYS)
def test_the_generators_words_are_philox(key: tuple[int, int, int]) -> None:
    seed, choice, position = (torch.tensor([part], device=DEVICE) for part in key)
    words = torch.empty(4, 64, dtype=torch.int64, device=DEVICE)
    _store_words[(1,)](seed, choice, position, words, COUNT=64)
    counters = torch.arange(64, device=DEVICE)
    expected = philox_4x32_10(
        (counters, position & MASK, choice & MASK, torch.zeros_like(counters)),
        (seed & MASK, (seed >> 32) & MASK),
    )
    assert torch.equal(words, torch.stack(expected))


@triton.jit
def _store_noise(word_ptr, exact_ptr, rough_ptr, COUNT: tl.constexpr):
    i = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    word = tl.load(word_ptr + i).to(tl.uint32)
    tl.store(exact_ptr + i, gumbel_of(word))
    tl.store(rough_ptr + i, rough_gumbel_of(word))


def test_rough_noise_stays_within_its_bound() -> None:
    """Around every power of two from both ends, and over the whole range."""
    near = [2**e + d for e in range(33) for d in range(-40, 41)]
    ends = {w for w in near if 0 <= w <= MASK}
    spread = range(0, MASK, MASK // 150_000)
    words = torch.tensor(sorted({*ends, *(MASK - w for w in ends), *spread}))
    words = torch.nn.functional.pad(words, (0, -len(words) % 1024)).to(DEVICE)
    exact, rough = torch.empty(2, len(words), device=DEVICE)
    _store_noise[(len(words) // 1024,)](words, exact, rough, COUNT=1024)
    assert (rough - exact).abs().max() < 0.85 * ROUGH.value


@pytest.mark.parametrize("vocab", [1, 6, 1027])
def test_noise_has_the_bits_of_torch(vocab: int) -> None:
    seeds, choices, positions = torch.tensor(KEYS, device=DEVICE).unbind(1)
    noise = gumbel(seeds, choices, positions, vocab)
    assert same_bits(noise, gumbel_torch(seeds, choices, positions, vocab))


def draw_of(rows: Sequence[SamplingRow], vocab: int = VOCAB) -> Draw:
    params = [row.params for row in rows]
    active = [p.top_k > 0 or p.top_p < 1 or p.min_p > 0 for p in params]
    return Draw(
        temperatures=torch.tensor([p.temperature for p in params], device=DEVICE),
        top_k=torch.tensor([p.top_k if p.top_k > 0 else vocab for p in params], device=DEVICE),
        top_p=torch.tensor([p.top_p for p in params], dtype=torch.float64, device=DEVICE),
        min_p=torch.tensor([p.min_p for p in params], device=DEVICE),
        filtered=torch.tensor(active, device=DEVICE).nonzero().flatten(),
        seeds=torch.tensor([row.seed for row in rows], device=DEVICE),
        choices=torch.tensor([row.choice for row in rows], device=DEVICE),
        positions=torch.tensor([row.position for row in rows], device=DEVICE),
    )


def kept_by_cut(logits: Tensor, draw: Draw) -> Tensor:
    """Mask ``[R, V]`` of the tokens up to each row's cut."""
    value, last = cut(logits, block_maxima(logits), draw)
    ids = torch.arange(logits.shape[1], device=DEVICE)
    return (logits > value[:, None]) | ((logits == value[:, None]) & (ids <= last[:, None]))


def test_filters_keep_what_the_sorted_ones_keep() -> None:
    rows = rows_of([SamplingParams(**p) for p in FILTERS])
    logits = logits_of(len(rows))
    mask = kept_by_cut(logits, draw_of(rows))
    for row, own, kept in zip(rows, logits, mask, strict=True):
        logprobs = (own / row.params.temperature).log_softmax(-1)
        expected = kept_ids(own, logprobs, row.params).sort().values
        kept &= own > -torch.inf
        expected = expected[own[expected] > -torch.inf]
        assert torch.equal(kept.nonzero().flatten(), expected), row.params


def kept_by_contract(logits: Tensor, params: SamplingParams) -> list[int]:
    """One row's kept ids, of finite logits, with Python's integers."""
    weights = exp_f32((logits - logits.max()) / torch.tensor(params.temperature, device=DEVICE))
    masses = [int(w * 2.0**40) for w in weights.tolist()]
    order = sorted(range(len(masses)), key=lambda i: (-logits[i].item(), i))
    likely = int((weights >= params.min_p).sum())
    order = order[: max(1, min(likely, params.top_k if params.top_k > 0 else likely))]
    if params.top_p == 1.0:
        return sorted(order)
    needed = max(1, int(float(sum(masses[i] for i in order)) * params.top_p))
    kept, mass = 0, 0
    while mass < needed:
        mass += masses[order[kept]]
        kept += 1
    return sorted(order[:kept])


@pytest.mark.parametrize("vocab", [1, 2048, 4100])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_the_cut_is_that_of_the_contract(scale: float, vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    rows = rows_of(
        [SamplingParams(**(p | {"top_k": min(p.get("top_k", 0), vocab)})) for p in FILTERS]
    )
    logits = torch.randn(len(rows), vocab, generator=generator).to(DEVICE) * scale
    logits[:, vocab // 2 :: 3] = logits[:, :1].clone()  # ties in every block
    mask = kept_by_cut(logits, draw_of(rows, vocab))
    for row, own, kept in zip(rows, logits, mask, strict=True):
        assert kept.nonzero().flatten().tolist() == kept_by_contract(own, row.params), row.params


@pytest.mark.parametrize(("top_k", "kept"), [(1, 1), (3, 3), (7, 7)])
def test_equal_logits_are_kept_by_lowest_id(top_k: int, kept: int) -> None:
    logits = torch.zeros(1, 9, device=DEVICE)
    logits[0, ::2] = -0.0  # equal to 0
    rows = rows_of([SamplingParams(top_k=top_k)])
    assert kept_by_cut(logits, draw_of(rows, 9))[0].nonzero().flatten().tolist() == [*range(kept)]


def test_top_p_stops_inside_equal_logits() -> None:
    rows = rows_of([SamplingParams(top_p=p) for p in (0.05, 0.5, 0.51, 0.95)])
    kept = kept_by_cut(torch.zeros(4, 10, device=DEVICE), draw_of(rows, 10)).sum(1)
    assert kept.tolist() == [1, 5, 6, 10]


def test_the_draw_is_its_formula() -> None:
    rows = rows_of(PARAMS)
    logits, draw = logits_of(len(rows)), draw_of(rows)
    token_ids, scores = choose(logits, draw)
    kept = kept_by_cut(logits, draw)
    noise = gumbel_torch(draw.seeds, draw.choices, draw.positions, VOCAB)
    shifted = logits - logits.amax(1, keepdim=True)
    warm = shifted / draw.temperatures[:, None] + noise
    expected = torch.where(draw.temperatures[:, None] == 0, logits, warm)
    expected = expected.masked_fill(~kept, -torch.inf)
    assert torch.equal(token_ids, expected.argmax(1))
    assert same_bits(scores, expected.amax(1))


def test_the_draw_is_its_formula_for_many_seeds_and_shapes_of_logits() -> None:
    """Peaked and flat rows, temperatures at both limits, one token, and the last ids only."""
    seeds = torch.arange(24, device=DEVICE)
    for temperature in (1e-5, 0.02, 1.0, 30.0, 1e5):
        for vocab in (1, 2, 2100):
            logits = logits_of(24, vocab)
            logits[:8] = (logits[:8] * 0.01).nan_to_num(neginf=0.0)
            logits[:, 0] = logits[:, 0].nan_to_num(neginf=0.0)
            logits[16:20, : vocab - 1] = -torch.inf
            logits[16:20, vocab - 1] = -1e30
            params = SamplingParams(temperature=temperature)
            draw = replace(draw_of(rows_of([params] * 24), vocab), seeds=seeds)
            noise = gumbel_torch(draw.seeds, draw.choices, draw.positions, vocab)
            shifted = logits - logits.amax(1, keepdim=True)
            expected = shifted / draw.temperatures[:, None] + noise
            token_ids, scores = choose(logits, draw)
            assert torch.equal(token_ids, expected.argmax(1))
            assert same_bits(scores, expected.amax(1))


def test_equal_scores_go_to_the_lowest_id() -> None:
    logits = torch.zeros(3, VOCAB, device=DEVICE)
    logits[1, :7] = -1
    logits[2, 2100:] = 1  # in the second program's block
    draw = draw_of(rows_of([SamplingParams(temperature=0)] * 3))
    assert choose(logits, draw)[0].tolist() == [0, 7, 2100]


def test_a_greedy_sample_with_edits_is_that_of_torch(ours: KernelSet) -> None:
    edits = [
        {},
        {"logit_bias": {5: 50.0, 9: -3.0}},
        {"repetition_penalty": 1.9, "presence_penalty": 1.0, "frequency_penalty": -2.0},
        {"min_tokens": 10, "logit_bias": {0: 100.0}},
        {"top_k": 3, "top_p": 0.4},
    ]
    rows = rows_of([SamplingParams(temperature=0, max_tokens=20, **edit) for edit in edits])
    logits = logits_of(len(rows), 300)
    results, expected = (
        sample(logits, rows, k).read() for k in (ours, load_kernels("torch", DEVICE))
    )
    assert [r.token_id for r in results] == [r.token_id for r in expected]
    assert results[1].token_id == 5
    assert results[3].token_id != 0


def test_pending_rows_are_as_known_ones(ours: KernelSet) -> None:
    """With every parameter on, and tokens that are already listed, or not."""
    edits = {"repetition_penalty": 1.3, "frequency_penalty": 1.4, "presence_penalty": -0.2}
    others = {"logit_bias": {5: 2.0}, "min_tokens": 3, "logprobs": 4}
    rows = rows_of([SamplingParams(**edits, **others, **p) for p in FILTERS])
    rows = [replace(row, output_token_ids=[2, 4, (5, 300, 4)[i % 3]]) for i, row in enumerate(rows)]
    pending = [replace(row, output_token_ids=[2, 4], pending=True) for row in rows]
    last = torch.tensor([row.output_token_ids[-1] for row in rows], device=DEVICE)
    logits = logits_of(len(rows))
    logits[:, :6] = 12.0
    known = sample(logits, rows, ours).read()
    assert sample(logits, pending, ours, last).read() == known
    assert sample(logits, pending, ours, last + 6).read() != known


def neighbours_change_a_row(kernels: KernelSet) -> bool:
    """Whether some row's token, score or logprob differs between a batch, its reverse and alone."""
    edits = {"repetition_penalty": 1.3, "logit_bias": {7: 2.0}, "top_p": 0.8}
    rows = rows_of([*PARAMS[:3], PARAMS[12], SamplingParams(**edits)])
    logits = logits_of(len(rows))
    whole = sample(logits, rows, kernels).read()
    reverse = sample(logits.flip(0), rows[::-1], kernels).read()[::-1]
    alone = [
        sample(logits[i : i + 1], rows[i : i + 1], kernels).read()[0] for i in range(len(rows))
    ]
    assert kernels.choose is not None
    scores = kernels.choose(logits, draw_of(rows))[1]
    each = [
        kernels.choose(logits[i : i + 1], draw_of(rows[i : i + 1]))[1] for i in range(len(rows))
    ]
    return not (whole == reverse == alone and same_bits(scores, torch.cat(each)))


def test_neighbours_change_nothing(ours: KernelSet) -> None:
    assert not neighbours_change_a_row(ours)


def test_a_draw_that_looks_at_the_batch_is_caught(ours: KernelSet) -> None:
    def shifted(logits: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
        """Noise keyed by the row's place."""
        return choose(logits, replace(draw, choices=torch.arange(len(logits), device=DEVICE)))

    assert neighbours_change_a_row(replace(ours, choose=shifted))


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_row_without_any_possible_token_is_an_error(ours: KernelSet, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, min_tokens=5, stop_token_ids=[0, 1, 2])
    rows = rows_of([SamplingParams(), params])
    sampled = sample(torch.zeros(2, 3, device=DEVICE), rows, ours)
    assert 0 <= int(sampled.token_ids[1]) < 3
    with pytest.raises(EngineError, match="Row 1 leaves no token"):
        sampled.read()
