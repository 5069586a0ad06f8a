"""What the engine has done so far and what it holds now, as counts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class SchedulerStats:
    """Counts since start. ``tokens_scheduled`` has recomputed tokens too."""

    steps: int = 0
    tokens_scheduled: int = 0
    admissions: int = 0
    preemptions: int = 0
    finished: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """A snapshot. The first seven are of now, the rest count since start.

    running, waiting:   choices (a request with ``n`` has that many)
    pages_total, pages_free, pages_cached: KV pages; cached ones are the prefix cache's, also those
                        in use; what is neither free nor cached is a running choice's own
    page_size:          tokens in a page
    unfinished:         requests on their way
    cache_lookups, cache_hits, cache_tokens: admissions that looked into the prefix cache, those
                        that reused a page, and the tokens that were reused
    preemptions, finished: choices
    steps:              scheduled steps, empty ones too
    tokens:             tokens computed, recomputed ones too
    """

    running: int
    waiting: int
    unfinished: int
    pages_total: int
    pages_free: int
    pages_cached: int
    page_size: int
    cache_lookups: int
    cache_hits: int
    cache_tokens: int
    preemptions: int
    finished: int
    steps: int
    tokens: int
