"""The prefix cache: a tree of KV pages keyed by the tokens that they hold.

One node is one whole page, so a path from the root is a token prefix, no node is ever split, and
each node says which pass wrote it.

Ownership. A page in the tree is the tree's. Whoever uses a path holds a lock on its last node;
a lock counts on every node up to the root, and a node with locks is never evicted. ``insert``
passes pages from their holder to the tree and moves the holder's lock down the path.

Eviction is least recently used first, and takes no clock: a node joins the end of one queue when
its last lock goes, the deeper nodes of a path before the upper ones. A node's locks include its
children's, so it always queues behind them, and the head of the queue is always a leaf.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from ..errors import EngineError
from .pages import PagePool
from .reuse import Provenance, ReusePolicy


@dataclass(slots=True, eq=False)
class RadixNode:
    """One page of the tree; ``depth`` pages lead to it, itself included (the root: 0)."""

    tokens: tuple[int, ...]
    page: int
    provenance: Provenance
    depth: int
    parent: RadixNode | None = field(repr=False)
    num_locks: int = 0
    children: dict[tuple[int, ...], RadixNode] = field(default_factory=dict, repr=False)

    def path(self) -> Iterator[RadixNode]:
        """This node and those above it, without the root."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent


@dataclass(frozen=True, slots=True)
class Match:
    """A cached prefix: its last node, pages and tokens, and how many tokens decoding wrote."""

    node: RadixNode
    pages: list[int]
    num_tokens: int
    num_decode_tokens: int


@dataclass(slots=True)
class RadixStats:
    """Counts since start; a hit is a lookup that reused at least one page."""

    lookups: int = 0
    hits: int = 0
    tokens_matched: int = 0
    decode_tokens_matched: int = 0
    pages_evicted: int = 0

    def record(self, match: Match) -> None:
        """Count a lookup that led to an admission."""
        self.lookups += 1
        self.hits += match.num_tokens > 0
        self.tokens_matched += match.num_tokens
        self.decode_tokens_matched += match.num_decode_tokens


class RadixCache:
    """Prefixes of earlier requests, as far as ``policy`` lets them be reused."""

    def __init__(self, pool: PagePool, policy: ReusePolicy) -> None:
        self.pool = pool
        self.policy = policy
        self.page_size = pool.page_size
        self.stats = RadixStats()
        self.root = RadixNode((), -1, Provenance.PREFILL, 0, None)
        self.num_pages = 0
        self._evictable: OrderedDict[RadixNode, None] = OrderedDict()

    @property
    def num_evictable(self) -> int:
        """Pages of the tree that nobody has locked."""
        return len(self._evictable)

    def match(self, tokens: Sequence[int]) -> Match:
        """The longest cached prefix of ``tokens`` that may be reused. Changes nothing."""
        nodes: list[RadixNode] = []
        node = self.root
        for key in self._page_keys(tokens):
            child = node.children.get(key)
            if child is None:
                break
            nodes.append(child)
            node = child
        num_tokens = self.policy.boundary(len(nodes) * self.page_size, self.page_size)
        del nodes[num_tokens // self.page_size :]
        decoded = sum(node.provenance is Provenance.DECODE for node in nodes)
        return Match(
            nodes[-1] if nodes else self.root,
            [node.page for node in nodes],
            num_tokens,
            decoded * self.page_size,
        )

    def lock(self, node: RadixNode) -> None:
        """Keep ``node`` and its path from eviction until ``unlock``."""
        for above in node.path():
            self._hold(above)

    def unlock(self, node: RadixNode) -> None:
        """Undo one ``lock``; nodes without locks become the most recently used.

        :raises EngineError: nobody had locked it.
        """
        for above in node.path():
            if above.num_locks < 1:
                raise EngineError(f"page {above.page} was unlocked, but nobody had locked it")
            above.num_locks -= 1
            if above.num_locks == 0:
                self._evictable[above] = None

    def insert(
        self,
        node: RadixNode,
        tokens: Sequence[int],
        pages: Sequence[int],
        provenance: Sequence[Provenance],
    ) -> tuple[RadixNode, list[int]]:
        """Hand ``pages``, which hold ``tokens``, to the tree below ``node``.

        The caller holds a lock on ``node``; it moves to the returned node. The returned pages
        take the place of as many of the given ones, in the caller's block table too. For each
        index ``i`` of them there are two cases:

        - the tree had no such page: ``pages[i]`` is returned and is the tree's now;
        - it had one: that page is returned, and ``pages[i]`` has been freed.

        Given pages beyond the returned ones stay the caller's: they come after the first page
        that the policy would never hand out.

        :raises EngineError: the lengths disagree, or a given page is the tree's already.
        """
        if not len(tokens) == len(pages) * self.page_size == len(provenance) * self.page_size:
            raise EngineError(
                f"{len(pages)} pages of {self.page_size} tokens were inserted for {len(tokens)} "
                f"tokens and {len(provenance)} provenances"
            )
        kept: list[int] = []
        for key, page, wrote in zip(self._page_keys(tokens), pages, provenance, strict=True):
            if not self.policy.allows(wrote):
                break
            child = node.children.get(key)
            if child is None:
                child = RadixNode(key, page, wrote, node.depth + 1, node)
                node.children[key] = child
                self.num_pages += 1
                child.num_locks = 1
            else:
                if child.page == page:
                    raise EngineError(f"page {page} was inserted, but is the tree's already")
                self._hold(child)
                self.pool.free([page])
            kept.append(child.page)
            node = child
        return node, kept

    def evict(self, count: int) -> int:
        """Free up to ``count`` pages that nobody has locked; how many were freed."""
        freed = 0
        while freed < count and self._evictable:
            node, _ = self._evictable.popitem(last=False)
            if node.parent is not None:
                del node.parent.children[node.tokens]
            self.pool.free([node.page])
            freed += 1
        self.num_pages -= freed
        self.stats.pages_evicted += freed
        return freed

    def flush(self) -> int:
        """Free every page that nobody has locked; how many. Locked paths stay as they are."""
        return self.evict(len(self._evictable))

    def nodes(self) -> Iterator[RadixNode]:
        """Every node but the root."""
        stack = [self.root]
        while stack:
            node = stack.pop()
            if node is not self.root:
                yield node
            stack.extend(node.children.values())

    def check_integrity(self, locks: Iterable[RadixNode]) -> None:
        """Check the tree against ``locks``, the node of every lock now held.

        :raises EngineError: a broken link, a wrong lock count, a page the policy forbids, an
            eviction queue that disagrees with the locks.
        """
        counts = Counter(above for node in locks for above in node.path())
        for node in self.nodes():
            parent = node.parent
            if parent is None or parent.children.get(node.tokens) is not node:
                raise EngineError(f"the node of page {node.page} is not its parent's child")
            if node.depth != parent.depth + 1 or len(node.tokens) != self.page_size:
                raise EngineError(f"the node of page {node.page} is not one page below its parent")
            if node.num_locks != counts[node]:
                raise EngineError(
                    f"page {node.page} counts {node.num_locks} locks; {counts[node]} are held"
                )
            if (node in self._evictable) != (node.num_locks == 0):
                raise EngineError(f"page {node.page} is wrongly in or out of the eviction queue")
            if not self.policy.allows(node.provenance):
                raise EngineError(f"page {node.page} is kept, but could never be reused")
            del counts[node]
        if counts:
            raise EngineError(f"{len(counts)} locked nodes are not in the tree")
        if self.num_pages != sum(1 for _ in self.nodes()) or self.num_pages < self.num_evictable:
            raise EngineError(f"the tree says it has {self.num_pages} pages and has not")

    def _hold(self, node: RadixNode) -> None:
        if node.num_locks == 0:
            del self._evictable[node]
        node.num_locks += 1

    def _page_keys(self, tokens: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """The tokens of each whole page."""
        size = self.page_size
        for stop in range(size, len(tokens) + 1, size):
            yield tuple(tokens[stop - size : stop])
