"""The whole engine under random use: whatever happens, every output is the one of a run alone.

The machine is in ``conftest.py``: it submits, aborts, preempts, evicts, flushes and steps a real
engine with a small model, tiny pages and a pool that is always short. ``pytest --long`` runs ten
times as many programs. Each broken engine of this file must be found by the same machine within
the programs of a plain run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from isobit.backends.base import Batch
from isobit.cache.radix import Match, RadixCache
from isobit.core.engine import Engine
from isobit.core.launched import Launched, SeqResult
from isobit.core.request import Request
from isobit.core.scheduler import ScheduledSeq
from isobit.errors import EngineError
from isobit.kernels.kernel_set import Linear
from isobit.sampling.sampler import SamplingRow

NUM_PROGRAMS = 16

Break = Callable[[Engine], None]
RunPrograms = Callable[..., Counter[str]]

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_output_is_the_one_alone(
    run_programs: RunPrograms, small_folder: Path, request: pytest.FixtureRequest
) -> None:
    count = NUM_PROGRAMS * (10 if request.config.getoption("--long") else 1)
    run_programs(small_folder, count)


def test_the_programs_reach_what_they_are_for(
    run_programs: RunPrograms,
    small_folder: Path,
) -> None:
    counts = run_programs(small_folder, NUM_PROGRAMS // 2, shrink=False)
    wanted = {
        "steps": 2_000,
        "outputs": 150,
        "preemptions": 40,
        "forced preemptions": 4,
        "forced evictions": 1,
        "pages evicted": 300,
        "hits": 60,
        "decoded tokens reused": 60,
        "aborts": 2,
    }
    assert {name: counts[name] for name in wanted if counts[name] < wanted[name]} == {}, counts


# Negative controls. The page accounts are not checked in these, so that bits alone can tell, and
# "alone" is computed by an engine broken in the same way: only its inconsistency is to be found.


class _EvictsLockedPages(RadixCache):
    def evict(self, count: int) -> int:
        for node in [node for node in self.nodes() if not node.children][:count]:
            if node in self._evictable:
                super().evict(1)
                continue
            assert node.parent is not None
            del node.parent.children[node.tokens]
            self.pool.free([node.page])
        return count


class _MatchesOnePageTooLong(RadixCache):
    def match(self, tokens: Sequence[int]) -> Match:
        found = super().match(tokens)
        left = len(tokens) - found.num_tokens
        for child in found.node.children.values():
            if left >= self.page_size:
                pages = [*found.pages, child.page]
                return Match(child, pages, found.num_tokens + self.page_size, 0)
        return found


def frees_pages_in_use(engine: Engine) -> None:
    """Eviction does not ask for locks."""
    if engine.scheduler.cache is not None:
        engine.scheduler.cache.__class__ = _EvictsLockedPages


def matches_one_page_too_long(engine: Engine) -> None:
    """The page after the matched prefix is taken too, whatever it holds."""
    if engine.scheduler.cache is not None:
        engine.scheduler.cache.__class__ = _MatchesOnePageTooLong


def writes_one_slot_off(engine: Engine) -> None:
    """K and V of one page's last row go into the slot before."""
    size = engine.scheduler.pool.page_size
    prepare = engine.runner.prepare

    def off(seqs: Sequence[ScheduledSeq]) -> Batch:
        batch = prepare(seqs)
        batch.slot_mapping[batch.slot_mapping == 4 * size - 1] -= 1
        return batch

    engine.runner.prepare = off


def forgets_the_last_token_of_the_preempted(engine: Engine) -> None:
    """Whoever comes back has the K and V of its last token not written."""
    prepare = engine.runner.prepare

    def forgets(seqs: Sequence[ScheduledSeq]) -> Batch:
        batch = prepare(seqs)
        for seq, stop in zip(seqs, batch.cu_seqlens_q.tolist()[1:], strict=True):
            if seq.request.num_preemptions and seq.samples and seq.num_tokens > 1:
                batch.slot_mapping[stop - 1] = batch.slot_mapping[stop - 2]
        return batch

    engine.runner.prepare = forgets


def counts_positions_from_the_chunk(engine: Engine) -> None:
    """The noise of a sampled token is that of its place in the chunk."""
    row = engine.runner._sampling_row

    def counts(seq: ScheduledSeq) -> SamplingRow:
        return replace(row(seq), position=seq.num_tokens)

    engine.runner._sampling_row = counts


def penalises_by_a_neighbour(engine: Engine) -> None:
    """Penalties look at the output of the first running request."""
    row = engine.runner._sampling_row

    def penalises(seq: ScheduledSeq) -> SamplingRow:
        first = engine.scheduler.running[0]
        return replace(row(seq), output_token_ids=first.output_token_ids, counts=None)

    engine.runner._sampling_row = penalises


def sums_by_the_batch(engine: Engine) -> None:
    """A linear that splits K where the batch is small."""
    layer = engine.runner.decoder.layers[0]
    layer.down_proj = _BatchVariantLinear(layer.down_proj)


class _BatchVariantLinear:
    def __init__(self, linear: Linear) -> None:
        self._linear = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def __call__(self, x: Tensor) -> Tensor:
        return self.accumulators(x)

    def accumulators(self, x: Tensor) -> Tensor:
        if len(x) > 3:
            return self._linear.accumulators(x)
        low, high = x.clone(), x.clone()
        low[:, self.in_features // 2 :] = 0
        high[:, : self.in_features // 2] = 0
        return self._linear.accumulators(low) + self._linear.accumulators(high)


def reverses_the_scores_of_a_chunk(engine: Engine) -> None:
    """Prompt logprobs of a chunk come back last first."""
    read = engine.runner.read

    def reverses(launched: Launched) -> list[SeqResult]:
        results = read(launched)
        for result in results:
            rows = result.prompt_rows
            result.prompt_rows = dict(zip(rows, reversed(rows.values()), strict=True))
        return results

    engine.runner.read = reverses


BROKEN: tuple[Break, ...] = (
    frees_pages_in_use,
    matches_one_page_too_long,
    writes_one_slot_off,
    forgets_the_last_token_of_the_preempted,
    counts_positions_from_the_chunk,
    penalises_by_a_neighbour,
    sums_by_the_batch,
    reverses_the_scores_of_a_chunk,
)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_a_broken_engine_is_found_by_its_bits(
    run_programs: RunPrograms, small_folder: Path, broken: Break
) -> None:
    with pytest.raises((AssertionError, EngineError), match=r"other bits than alone|not usable"):
        run_programs(small_folder, NUM_PROGRAMS, broken, shrink=False, check_pages=False)


def leaks_a_page(engine: Engine) -> None:
    """A preempted request loses one of its pages for good."""
    preempt = engine.scheduler.preempt

    def leaks(request: Request) -> None:
        request.page_ids = request.page_ids[:-1]
        preempt(request)

    engine.scheduler.preempt = leaks


@pytest.mark.parametrize("broken", [frees_pages_in_use, leaks_a_page], ids=lambda b: b.__name__)
def test_wrong_accounts_are_found(
    run_programs: RunPrograms, small_folder: Path, broken: Break
) -> None:
    with pytest.raises(EngineError):
        run_programs(small_folder, NUM_PROGRAMS, broken, shrink=False)
