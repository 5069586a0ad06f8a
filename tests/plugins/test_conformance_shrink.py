"""A failing trial is made small, and what is left still fails."""

from __future__ import annotations

import torch

from isobit.backends.base import AttentionBackend
from isobit.plugins.conformance import Geometry, Run, Sequence, Trial
from isobit.plugins.conformance.judge import Judge, shrink
from isobit.plugins.conformance.scenario import alone, chunks, then_decode, together, whole


class Careful(AttentionBackend):
    """Right attention, one row at a time; ``seen`` is where the others go wrong."""

    def plan(self, batch):
        return batch

    def run(self, q, k, v, layer, plan, out):
        layer.k.flatten(0, 1)[plan.slot_mapping] = k
        layer.v.flatten(0, 1)[plan.slot_mapping] = v
        row, group = 0, self.config.num_q_heads // self.config.num_kv_heads
        for pages, new, length in zip(plan.block_table, plan.query_lens, plan.kv_lens, strict=True):
            keys, values = (
                cache[pages.long()].flatten(0, 1)[:length].repeat_interleave(group, 1)
                for cache in (layer.k, layer.v)
            )
            for position in range(length - new, length):
                seen = self.seen(position, new, length, plan)
                scores = torch.einsum("hd,thd->ht", q[row], keys[:seen]) * self.config.scale
                out[row] = torch.einsum("ht,thd->hd", scores.softmax(-1), values[:seen])
                row += 1

    def seen(self, position, new, length, batch):
        return position + 1


class Unmasked(Careful):
    """A row sees its whole chunk."""

    def seen(self, position, new, length, batch):
        return length


class Unsociable(Careful):
    """With neighbours, a row sees the first token only."""

    def seen(self, position, new, length, batch):
        return 1 if batch.num_seqs > 1 else position + 1


class Forgetful(Careful):
    """A chunk that does not begin at 0 misses its last token."""

    def seen(self, position, new, length, batch):
        return position if new > 1 and length > new else position + 1


def _crowd(*lengths, **against):
    pieces = [then_decode(i, n, n + 2) for i, n in enumerate(lengths)]
    return Trial(
        label="a crowd",
        cells=(),
        geometry=Geometry(head_dim=16),
        sequences=tuple(Sequence(length=n + 2, seed=i) for i, n in enumerate(lengths)),
        run=Run(steps=together(*pieces)),
        **{name: Run(steps=alone(*pieces)) for name in against},
    )


def _smallest(backend, trial):
    judge = Judge(backend)
    difference = judge.judge(trial)
    assert difference is not None
    smallest, told = shrink(judge, trial, difference)
    assert judge.judge(smallest) == told
    return smallest


def test_one_sequence_is_left_where_one_suffices():
    smallest = _smallest(Unmasked, _crowd(5, 1, 90, 30))
    assert [sequence.length for sequence in smallest.sequences] == [2]
    assert smallest.run.steps == (whole(0, 2),)


def test_the_neighbour_that_it_takes_stays():
    smallest = _smallest(Unsociable, _crowd(5, 1, 90, 30, against=True))
    assert sorted(sequence.length for sequence in smallest.sequences) == [1, 2]
    assert smallest.against is not None
    assert len(smallest.run.steps) < len(smallest.against.steps)


def test_the_source_of_a_shared_prefix_stays():
    trial = Trial(
        label="a shared prefix",
        cells=(),
        geometry=Geometry(head_dim=16),
        sequences=(
            Sequence(length=20),
            Sequence(length=30, seed=1),
            Sequence(length=60, seed=2, prefix_of=0, prefix=16),
        ),
        run=Run(
            steps=alone(whole(0, 20), whole(1, 30), chunks(2, 60, (16,))[1:]),
            shared=True,
        ),
        against=Run(steps=alone(whole(0, 20), whole(1, 30), whole(2, 60))),
    )
    smallest = _smallest(Forgetful, trial)
    source, tail = smallest.sequences
    assert (source.length, source.seed) == (20, 0)
    assert (tail.seed, tail.prefix_of, tail.prefix) == (2, 0, 16)
    assert tail.length < 20


def test_it_ends_where_a_smaller_trial_leaves_the_device_unusable():
    made = []

    class Faulting(Unmasked):
        """The fourth one that is made breaks the device, and nothing is right after that."""

        def __init__(self, config):
            super().__init__(config)
            made.append(self)

        def seen(self, position, new, length, batch):
            return 1 if len(made) >= 4 else super().seen(position, new, length, batch)

    def probe():
        if len(made) >= 4:
            raise RuntimeError("CUDA error")

    trial = _crowd(5, 1, 90, 30)
    judge = Judge(Faulting, probe)
    smallest, told = shrink(judge, trial, judge.judge(trial))
    assert len(made) == 4
    assert Judge(Unmasked).judge(smallest) == told  # a failure of the backend, not of the device


def test_a_backend_without_a_mistake_passes():
    judge = Judge(Careful)
    assert judge.judge(_crowd(5, 1, 90, 30)) is None
    assert judge.judge(_crowd(5, 1, 90, 30, against=True)) is None
