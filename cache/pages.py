"""The pool of KV pages: which are free, which are taken. It knows nothing of who holds them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..errors import ConfigError, EngineError

MAX_PAGE_SIZE = 256


class PagePool:
    """``num_pages`` pages of ``page_size`` tokens each, handed out by id, from 1 up.

    Page 0 is the null page of ``backends.base.Batch``: it exists beside them and is never taken.

    A taken page has exactly one owner: the radix tree or one request. The order of allocation
    depends only on the calls made: the page freed last is taken first.

    :raises ConfigError: no pages, or a page size outside 1 to 256.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        if num_pages < 1:
            raise ConfigError(
                f"num_pages was {num_pages}; wanted at least 1. Give the KV cache more memory."
            )
        if not 1 <= page_size <= MAX_PAGE_SIZE:
            raise ConfigError(f"page_size was {page_size}; wanted 1 to {MAX_PAGE_SIZE}.")
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages, 0, -1))
        self._is_free = bytearray(b"\x01" * (num_pages + 1))

    @property
    def num_free(self) -> int:
        return len(self._free)

    def pages_for(self, num_tokens: int) -> int:
        """How many pages ``num_tokens`` tokens take."""
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int] | None:
        """Take ``count`` pages; None, and nothing taken, where fewer are free."""
        if count > len(self._free):
            return None
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._is_free[page] = 0
        return pages

    def free(self, pages: Sequence[int]) -> None:
        """Give pages back.

        :raises EngineError: a page that is free already, or that does not exist.
        """
        for page in pages:
            if not 1 <= page <= self.num_pages or self._is_free[page]:
                raise EngineError(f"page {page} was freed, but nobody had taken it")
            self._is_free[page] = 1
            self._free.append(page)

    def check_integrity(self, owned: Iterable[int]) -> None:
        """Check that every page is either free or, exactly once, among ``owned``.

        :raises EngineError: a page lost, owned twice, or both free and owned; the null page taken.
        """
        owners = [0] * (self.num_pages + 1)
        for page in owned:
            owners[page] += 1
        for page in self._free:
            owners[page] += 1
        for page, count in enumerate(owners):
            wanted = 0 if page == 0 else 1
            if count != wanted:
                state = "free" if self._is_free[page] else "taken"
                raise EngineError(f"page {page} ({state}) has {count} owners; wanted {wanted}")
