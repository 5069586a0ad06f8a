"""The radix tree: whole pages only, exact ownership, least recently used goes first."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from isobit.cache.pages import PagePool
from isobit.cache.radix import RadixCache, RadixNode
from isobit.cache.reuse import Provenance, ReusePolicy, ReuseScope
from isobit.errors import EngineError

ALL = ReusePolicy(ReuseScope.ALL)
PREFILL, DECODE = Provenance.PREFILL, Provenance.DECODE


def make(num_pages: int = 16, page_size: int = 2, policy: ReusePolicy = ALL) -> RadixCache:
    return RadixCache(PagePool(num_pages, page_size), policy)


def store(cache: RadixCache, tokens: list[int], decoded: int = 0) -> tuple[RadixNode, list[int]]:
    """Insert ``tokens`` as a request would that matched nothing; its lock stays held."""
    count = len(tokens) // cache.page_size
    pages = cache.pool.allocate(count)
    assert pages is not None
    wrote = [PREFILL] * (count - decoded) + [DECODE] * decoded
    return cache.insert(cache.root, tokens, pages, wrote)


def test_only_whole_pages_match() -> None:
    cache = make()
    node, pages = store(cache, [1, 2, 3, 4])
    match = cache.match([1, 2, 3, 4, 5])
    assert (match.pages, match.num_tokens, match.node) == (pages, 4, node)
    assert cache.match([1, 2, 3]).num_tokens == 2
    assert cache.match([1, 2, 3, 9]).pages == pages[:1]
    assert cache.match([1]).num_tokens == 0
    assert cache.match([9, 2]).node is cache.root


def test_matching_changes_nothing() -> None:
    cache = make()
    cache.unlock(store(cache, [1, 2])[0])
    cache.unlock(store(cache, [3, 4])[0])
    cache.match([1, 2, 3])
    cache.evict(1)
    assert cache.match([1, 2]).num_tokens == 0
    assert cache.match([3, 4]).num_tokens == 2
    assert cache.stats.lookups == 0


def test_duplicates_are_freed_and_replaced() -> None:
    cache = make(num_pages=8)
    first, pages = store(cache, [1, 2, 3, 4])
    second, kept = store(cache, [1, 2, 3, 4, 5, 6])
    assert kept[:2] == pages
    assert cache.pool.num_free == 5  # five given, two of them came back
    assert second.parent is first
    cache.check_integrity([first, second])
    cache.pool.check_integrity(node.page for node in cache.nodes())


def test_a_lock_moves_with_insert_and_protects_its_path() -> None:
    cache = make(num_pages=4)
    node, _ = store(cache, [1, 2])
    deeper, _ = cache.insert(node, [3, 4], cache.pool.allocate(1) or [], [PREFILL])
    cache.check_integrity([deeper])
    assert cache.evict(4) == 0
    cache.unlock(deeper)
    assert cache.num_evictable == cache.num_pages == 2
    assert cache.evict(1) == 1
    assert cache.match([1, 2, 3, 4]).num_tokens == 2  # from the end of the path


def test_eviction_takes_the_least_recently_used() -> None:
    cache = make()
    for tokens in ([1, 1, 5, 5], [2, 2], [1, 1, 6, 6], [3, 3]):
        cache.unlock(store(cache, tokens)[0])
    again = cache.match([2, 2]).node
    cache.lock(again)
    cache.unlock(again)
    order = []
    while cache.num_pages:
        before = {node.page: node.tokens for node in cache.nodes()}
        assert cache.evict(1) == 1
        gone = set(before) - {node.page for node in cache.nodes()}
        order.append(before[gone.pop()][0])
    assert order == [5, 6, 1, 3, 2]
    assert cache.stats.pages_evicted == 5
    assert cache.evict(1) == 0


def test_flush_leaves_what_is_locked() -> None:
    cache = make()
    node, pages = store(cache, [1, 2, 3, 4])
    cache.unlock(store(cache, [1, 2, 7, 7])[0])
    assert cache.flush() == 1
    assert cache.match([1, 2, 3, 4]).pages == pages
    cache.unlock(node)
    assert cache.flush() == 2
    assert cache.pool.num_free == cache.pool.num_pages


def test_prefill_only_keeps_no_page_that_decoding_wrote() -> None:
    cache = make(num_pages=8, policy=ReusePolicy(ReuseScope.PREFILL_ONLY))
    node, kept = store(cache, [1, 2, 3, 4, 5, 6], decoded=1)
    assert len(kept) == 2
    assert node.depth == 2
    assert cache.match([1, 2, 3, 4, 5, 6]).num_tokens == 4
    assert cache.pool.num_free == 5  # the third page stays the caller's


def test_none_keeps_nothing() -> None:
    cache = make(policy=ReusePolicy(ReuseScope.NONE))
    node, kept = store(cache, [1, 2, 3, 4])
    assert node is cache.root
    assert kept == []
    assert cache.match([1, 2, 3, 4]).num_tokens == 0


def test_all_counts_what_decoding_wrote() -> None:
    cache = make()
    store(cache, [1, 2, 3, 4, 5, 6], decoded=2)
    match = cache.match([1, 2, 3, 4, 5, 6])
    assert (match.num_tokens, match.num_decode_tokens) == (6, 4)
    cache.stats.record(match)
    cache.stats.record(cache.match([9]))
    stats = cache.stats
    assert (stats.lookups, stats.hits, stats.tokens_matched) == (2, 1, 6)
    assert stats.decode_tokens_matched == 4


@pytest.mark.parametrize(("alignment", "matched"), [(1, 10), (4, 8), (3, 6), (8, 8), (16, 0)])
def test_matches_end_at_the_alignment(alignment: int, matched: int) -> None:
    cache = make(policy=ReusePolicy(ReuseScope.ALL, alignment))
    store(cache, list(range(10)))
    match = cache.match(list(range(12)))
    assert match.num_tokens == matched
    assert match.node.depth == len(match.pages) == matched // 2


def test_misuse_is_an_engine_error() -> None:
    cache = make()
    node, pages = store(cache, [1, 2])
    with pytest.raises(EngineError, match="inserted for 3 tokens"):
        cache.insert(cache.root, [1, 2, 3], [5], [PREFILL])
    with pytest.raises(EngineError, match="is the tree's already"):
        cache.insert(cache.root, [1, 2], pages, [PREFILL])
    cache.unlock(node)
    with pytest.raises(EngineError, match="nobody had locked it"):
        cache.unlock(node)


def test_integrity_sees_wrong_locks() -> None:
    cache = make()
    node, _ = store(cache, [1, 2, 3, 4])
    for locks, message in (([], "counts 1 locks; 0"), ([node, node], "counts 1 locks; 2")):
        with pytest.raises(EngineError, match=message):
            cache.check_integrity(locks)
    node.num_locks = 0
    with pytest.raises(EngineError, match=r"eviction queue|counts"):
        cache.check_integrity([])


class CacheMachine(RuleBasedStateMachine):
    """Random use against a model: what each page holds, and when each prefix was last in use."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = make(num_pages=12, page_size=2)
        self.holders: list[tuple[RadixNode, list[int]]] = []
        self.content: dict[int, tuple[int, ...]] = {}
        self.last_used: dict[tuple[int, ...], int] = {}
        self.now = 0

    def prefix(self, node: RadixNode) -> tuple[int, ...]:
        return tuple(t for above in reversed(list(node.path())) for t in above.tokens)

    @rule(tokens=st.lists(st.integers(0, 1), max_size=12))
    def use(self, tokens: list[int]) -> None:
        """Match, lock, take pages for the rest, hand them in: a whole prefill."""
        match = self.cache.match(tokens)
        for index, page in enumerate(match.pages):
            assert self.content[page] == tuple(tokens[: 2 * index + 2])
        self.cache.lock(match.node)
        count = len(tokens) // 2 - len(match.pages)
        if count > self.cache.pool.num_free:
            self.evict(count - self.cache.pool.num_free)
        pages = self.cache.pool.allocate(count)
        node = match.node
        if pages is not None:
            whole = tokens[match.num_tokens : match.num_tokens + 2 * count]
            for index, page in enumerate(pages):
                self.content[page] = tuple(tokens[: match.num_tokens + 2 * index + 2])
            node, kept = self.cache.insert(node, whole, pages, [PREFILL] * count)
            assert kept == pages  # nobody else can have inserted them since the match
        self.holders.append((node, tokens))

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.holders) - 1))
        node, _ = self.holders.pop(index)
        self.cache.unlock(node)
        self.now += 1
        for above in node.path():
            self.last_used[self.prefix(above)] = self.now

    @rule(count=st.integers(1, 4))
    def evict(self, count: int) -> None:
        for _ in range(count):
            leaves = [n for n in self.cache.nodes() if not n.children and not n.num_locks]
            oldest = min(leaves, key=lambda n: self.last_used[self.prefix(n)], default=None)
            assert self.cache.evict(1) == (oldest is not None)
            if oldest is not None:
                assert oldest not in set(self.cache.nodes())

    @rule()
    def flush(self) -> None:
        self.cache.flush()
        assert all(node.num_locks for node in self.cache.nodes())

    @invariant()
    def accounts_hold(self) -> None:
        self.cache.check_integrity([node for node, _ in self.holders])
        self.cache.pool.check_integrity(node.page for node in self.cache.nodes())
        for node in self.cache.nodes():
            assert self.content[node.page] == self.prefix(node)
        for node, tokens in self.holders:
            assert self.prefix(node) == tuple(tokens[: 2 * node.depth])


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
