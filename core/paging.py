"""The pages of each running request: taken from the pool, shared through the prefix cache.

A running request's ``page_ids`` are first the pages of the radix path that it locks
(``request.lock``), then pages of its own. Without a prefix cache all are its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..cache.pages import PagePool
from ..cache.radix import Match, RadixCache
from ..cache.reuse import Provenance
from ..errors import EngineError
from .request import Request


class Paging:
    """Moves pages between pool, prefix cache and requests; every page has one owner throughout."""

    def __init__(self, pool: PagePool, cache: RadixCache | None) -> None:
        self.pool = pool
        self.cache = cache

    def match(self, request: Request) -> Match | None:
        """What ``request`` could reuse if it were admitted now. Changes nothing.

        At least one token is left to compute, for its logits. Tokens to be decoded are never
        matched: a page that another request *prefilled* holds other bits where the two passes
        differ. A prompt that is to be scored needs all its logits once.
        """
        if self.cache is None:
            return None
        limit = min(request.num_tokens - 1, request.prefill_end)
        if request.params.prompt_logprobs is not None:
            limit = min(limit, request.num_scored_tokens)
        return self.cache.match(request.token_slice(0, limit))

    def admit(self, request: Request, match: Match | None, reserve: int) -> bool:
        """Give ``request`` the matched pages and new ones for all its known tokens.

        False, and nothing done, where that would leave fewer than ``reserve`` pages to be had.
        """
        matched: list[int] = []
        if self.cache is not None and match is not None:
            self.cache.lock(match.node)
            matched = match.pages
        needed = self.pool.pages_for(request.num_tokens) - len(matched)
        own = self._allocate(needed) if needed + reserve <= self._num_available() else None
        if own is None:
            if self.cache is not None and match is not None:
                self.cache.unlock(match.node)
            return False
        request.page_ids = matched + own
        if self.cache is not None and match is not None:
            request.lock = match.node
            request.num_computed_tokens = request.num_scheduled_tokens = match.num_tokens
            self.cache.stats.record(match)
        if request.num_cached_tokens is None:
            request.num_cached_tokens = request.num_computed_tokens
        return True

    def grow(self, request: Request, num_tokens: int) -> bool:
        """Give ``request`` pages for ``num_tokens`` tokens; False where they cannot be had."""
        own = self._allocate(self.pool.pages_for(num_tokens) - len(request.page_ids))
        if own is None:
            return False
        request.page_ids += own
        return True

    def share(self, request: Request) -> None:
        """Hand the pages that ``request`` has filled to the prefix cache, as it allows."""
        if self.cache is None or request.lock is None:
            return
        size = self.pool.page_size
        first, last = request.lock.depth, request.num_computed_tokens // size
        wrote = [
            Provenance.PREFILL if (page + 1) * size <= request.prefill_end else Provenance.DECODE
            for page in range(first, last)
        ]
        tokens = request.token_slice(first * size, last * size)
        pages = request.page_ids[first:last]
        request.lock, kept = self.cache.insert(request.lock, tokens, pages, wrote)
        request.page_ids[first : first + len(kept)] = kept

    def release(self, request: Request) -> None:
        """Take everything back from ``request``; what it filled stays in the prefix cache.

        Steps under way may still read and write its pages: they do so before any later step does.
        """
        self.share(request)
        shared = 0
        if self.cache is not None and request.lock is not None:
            shared = request.lock.depth
            self.cache.unlock(request.lock)
        self.pool.free(request.page_ids[shared:])
        request.page_ids = []
        request.lock = None
        request.num_computed_tokens = request.num_scheduled_tokens = 0
        request.num_pending_tokens = 0

    def check_integrity(self, running: Sequence[Request]) -> None:
        """Check that each page is free, the tree's, or one request's own, and all locks count.

        :raises EngineError: it is not so.
        """
        owned: list[int] = []
        locks = [request.lock for request in running if request.lock is not None]
        for request in running:
            path = [node.page for node in request.lock.path()][::-1] if request.lock else []
            if request.page_ids[: len(path)] != path:
                raise EngineError(f"{request.request_id}: its pages are not those it has locked")
            if self.pool.pages_for(request.num_scheduled_tokens) > len(request.page_ids):
                raise EngineError(f"{request.request_id}: computed tokens without pages")
            owned += request.page_ids[len(path) :]
        if self.cache is not None:
            self.cache.check_integrity(locks)
            owned += [node.page for node in self.cache.nodes()]
        self.pool.check_integrity(owned)

    def _num_available(self) -> int:
        return self.pool.num_free + (self.cache.num_evictable if self.cache else 0)

    def _allocate(self, count: int) -> list[int] | None:
        """New pages, evicting cached ones where too few are free; None and no change if short."""
        if count <= 0:
            return []
        if count > self._num_available():
            return None
        if self.cache is not None and count > self.pool.num_free:
            self.cache.evict(count - self.pool.num_free)
        return self.pool.allocate(count)
