"""What may be reused follows from the backend's declarations alone."""

from __future__ import annotations

import itertools

import pytest

from isobit.cache.reuse import Provenance, ReusePolicy, ReuseScope, reuse_policy
from isobit.errors import ConfigError


@pytest.mark.parametrize(
    ("chunk_invariant", "decode_equals_prefill", "scope"),
    [
        (True, True, ReuseScope.ALL),
        (True, False, ReuseScope.PREFILL_ONLY),
        (False, True, ReuseScope.NONE),
        (False, False, ReuseScope.NONE),
    ],
)
def test_deterministic(
    chunk_invariant: bool, decode_equals_prefill: bool, scope: ReuseScope
) -> None:
    policy = reuse_policy(
        deterministic=True,
        chunk_invariant=chunk_invariant,
        alignment=64,
        decode_equals_prefill=decode_equals_prefill,
    )
    assert policy.scope is scope
    if scope is not ReuseScope.NONE:
        assert policy.alignment == 64


def test_without_determinism_everything_may_be_reused() -> None:
    for chunk, decode in itertools.product((True, False), repeat=2):
        policy = reuse_policy(
            deterministic=False, chunk_invariant=chunk, alignment=64, decode_equals_prefill=decode
        )
        assert policy == ReusePolicy(ReuseScope.ALL, 1)


@pytest.mark.parametrize(
    ("scope", "prefill", "decode"),
    [
        (ReuseScope.ALL, True, True),
        (ReuseScope.PREFILL_ONLY, True, False),
        (ReuseScope.NONE, False, False),
    ],
)
def test_allows(scope: ReuseScope, prefill: bool, decode: bool) -> None:
    policy = ReusePolicy(scope)
    assert policy.allows(Provenance.PREFILL) is prefill
    assert policy.allows(Provenance.DECODE) is decode


@pytest.mark.parametrize(
    ("alignment", "page_size", "tokens", "boundary"),
    [(1, 1, 7, 7), (1, 16, 47, 32), (64, 16, 127, 64), (24, 16, 95, 48), (4, 16, 31, 16)],
)
def test_boundary(alignment: int, page_size: int, tokens: int, boundary: int) -> None:
    assert ReusePolicy(ReuseScope.ALL, alignment).boundary(tokens, page_size) == boundary


def test_alignment_must_be_positive() -> None:
    with pytest.raises(ConfigError, match="alignment was 0"):
        ReusePolicy(ReuseScope.ALL, 0)
