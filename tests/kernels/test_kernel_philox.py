from __future__ import annotations

import pytest
import torch

from isobit.kernels.kernel_set import KernelSet
from isobit.kernels.philox import gumbel_torch, philox_4x32_10

MAX = 0xFFFFFFFF
# From the kat_vectors of Random123, the authors' own library.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MAX, MAX, MAX, MAX), (MAX, MAX), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
def test_known_answers(counter, key, answer):
    words = philox_4x32_10(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert tuple(int(w) for w in words) == answer


def test_native_gives_the_bits_of_torch(native: KernelSet, isa):
    seeds = torch.tensor([0, 1, -1, 42, 2**63 - 1, -(2**63), 2**32, 2**31])
    choices = torch.tensor([0, 1, 2, 3, 2**31, 5, 6, 7])
    positions = torch.tensor([0, 1, 2**31, 3, 4, 2**32 - 1, 6, 7])
    ours = native.gumbel(seeds, choices, positions, 5001)
    reference = gumbel_torch(seeds, choices, positions, 5001)
    assert torch.equal(ours.view(torch.int32), reference.view(torch.int32))


def test_noise_is_keyed_by_the_vocabulary_id(kernels: KernelSet):
    one = torch.tensor([7])
    small, large = (kernels.gumbel(one, one, one, vocab) for vocab in (101, 4096))
    assert torch.equal(small, large[:, :101])


def test_every_key_part_matters(kernels: KernelSet):
    base = (5, 6, 7)
    rows = torch.tensor(
        [base, (5 + 2**32, 6, 7), (6, 6, 7), (5, 7, 7), (5, 6, 8)], dtype=torch.int64
    ).T.contiguous()
    noise = kernels.gumbel(rows[0], rows[1], rows[2], 64)
    assert len({tuple(row.tolist()) for row in noise}) == 5


def test_noise_is_finite_and_gumbel(kernels: KernelSet):
    seeds = torch.arange(64)
    zeros = torch.zeros(64, dtype=torch.int64)
    noise = kernels.gumbel(seeds, zeros, zeros, 20_000).double()
    assert noise.isfinite().all()
    assert abs(noise.mean().item() - 0.5772157) < 0.005
    assert abs(noise.var().item() - torch.pi**2 / 6) < 0.01


def test_extreme_words_stay_finite():
    from isobit.kernels.elementary import log_f64

    word = torch.tensor([0, MAX])
    noise = -log_f64(-log_f64((word.double() + 0.5) * 2.0**-32)).float()
    assert noise.isfinite().all()


@pytest.mark.parametrize("spread", ["position", "choice", "seed"])
def test_argmax_follows_softmax(kernels: KernelSet, spread):
    """Chi-square of 20,000 draws over 8 tokens; the 99.99% point at 7 degrees is 29.9."""
    draws = 20_000
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 0.5, 0.5, 3.0, -0.5])
    varying, fixed = torch.arange(draws), torch.full((draws,), 42)
    seeds, choices, positions = (
        varying if spread == name else fixed for name in ("seed", "choice", "position")
    )
    noise = kernels.gumbel(seeds, choices, positions, 8)
    counts = torch.bincount((logits + noise).argmax(-1), minlength=8).double()
    expected = logits.double().softmax(-1) * draws
    assert ((counts - expected).square() / expected).sum() < 29.9
