"""The page pool: every page is free or taken, never both, never twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isobit.cache.pages import PagePool
from isobit.errors import ConfigError, EngineError


def test_pages_come_in_a_fixed_order() -> None:
    pool = PagePool(4, 16)
    assert pool.allocate(3) == [1, 2, 3]
    pool.free([2, 1])
    assert pool.allocate(2) == [1, 2]  # freed last, taken first
    assert pool.num_free == 1


def test_too_few_pages_takes_none() -> None:
    pool = PagePool(2, 1)
    assert pool.allocate(3) is None
    assert pool.num_free == 2
    assert pool.allocate(0) == []


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (16, 1), (17, 2)])
def test_pages_for(tokens: int, pages: int) -> None:
    assert PagePool(1, 16).pages_for(tokens) == pages


@pytest.mark.parametrize("page_size", [0, -1, 257])
def test_page_size_limits(page_size: int) -> None:
    with pytest.raises(ConfigError, match=f"page_size was {page_size}; wanted 1 to 256"):
        PagePool(1, page_size)
    PagePool(1, 1)
    PagePool(1, 256)


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_pages was 0"):
        PagePool(0, 16)


@pytest.mark.parametrize("page", [0, 3, -1])
def test_freeing_what_nobody_took(page: int) -> None:
    pool = PagePool(2, 1)
    with pytest.raises(EngineError, match=f"page {page} was freed"):
        pool.free([page])


def test_double_free() -> None:
    pool = PagePool(2, 1)
    pages = pool.allocate(1)
    assert pages is not None
    with pytest.raises(EngineError, match="page 1 was freed"):
        pool.free(pages * 2)


@pytest.mark.parametrize(
    ("owned", "message"),
    [
        ([1], "page 2 .* has 0 owners"),
        ([1, 2, 2], "page 2 .* has 2"),
        ([1, 2, 3], "page 3 .*free"),
        ([0, 1, 2], "page 0 .* has 1 owners; wanted 0"),
    ],
)
def test_integrity_sees_lost_shared_and_freed_pages(owned: list[int], message: str) -> None:
    pool = PagePool(3, 1)
    pool.allocate(2)
    pool.check_integrity([1, 2])
    with pytest.raises(EngineError, match=message):
        pool.check_integrity(owned)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=60))
def test_any_sequence_keeps_the_accounts(calls: list[tuple[bool, int]]) -> None:
    pool = PagePool(8, 2)
    taken: list[int] = []
    for allocate, count in calls:
        if allocate:
            pages = pool.allocate(count)
            assert (pages is None) == (count > 8 - len(taken))
            taken += pages or []
        else:
            pool.free(taken[:count])
            del taken[:count]
        assert pool.num_free == 8 - len(taken)
        pool.check_integrity(taken)
