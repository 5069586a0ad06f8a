"""Steps launched before the last one's results are known give the bits of steps that wait."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from isobit import LLM, SamplingParams
from isobit.backends.base import Batch
from isobit.core.scheduler import ScheduledSeq
from isobit.errors import EngineError
from isobit.verify.transcript import Transcript, transcripts

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = [[3 + (i * 7 + j * j) % 50 for j in range(1 + 9 * i % 70)] for i in range(24)]
PARAMS = [
    SamplingParams(
        temperature=(0.0, 1.0, 0.7)[i % 3],
        top_k=(-1, 7)[i % 2],
        top_p=(1.0, 0.8)[i // 2 % 2],
        seed=i,
        max_tokens=1 + 5 * i % 23,
        ignore_eos=i % 4 > 0,
        stop_token_ids=((), (9, 11, 30))[i % 2],
        logprobs=(None, 0, 2)[i % 3],
        prompt_logprobs=(None, None, 1)[i % 3],
        repetition_penalty=(1.0, 1.3)[i // 3 % 2],
        frequency_penalty=(0.0, 0.4)[i // 2 % 2],
        presence_penalty=(0.0, -0.3)[i % 2],
        min_tokens=min((0, 3)[i % 2], 1 + 5 * i % 23),
        n=1 + (i == 5),
    )
    for i in range(24)
]


def start(folder: Path, *, ahead: bool, **options: Any) -> LLM:
    return LLM(str(folder), max_model_len=128, max_num_seqs=7, async_scheduling=ahead, **options)


def run(llm: LLM) -> list[list[Transcript]]:
    return [transcripts(output) for output in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


@pytest.fixture(scope="module")
def expected(small_folder: Path) -> list[list[Transcript]]:
    with start(small_folder, ahead=False) as llm:
        return run(llm)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 17},
        {"page_size": 3, "kv_cache_memory": 60 * 3 * 256},  # so few pages that some are evicted
        {"radix_cache": False, "page_size": 1},
    ],
    ids=["plain", "chunks", "preemptions", "no cache"],
)
def test_the_bits_are_those_of_steps_that_wait(
    small_folder: Path, expected: list[list[Transcript]], options: dict[str, Any]
) -> None:
    with start(small_folder, ahead=True, **options) as llm:
        assert run(llm) == expected
        assert run(llm) == expected  # warm
        stats = llm.stats()
        assert (stats.running, stats.waiting) == (0, 0)
        assert (stats.preemptions > 0) == ("kv_cache_memory" in options)
        llm.engine.scheduler.check_integrity()
        llm.flush_cache()
        assert llm.stats().pages_free == llm.stats().pages_total


def events(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the engine asks of its runner from now on, in order."""
    seen: list[str] = []
    runner = llm.engine.runner
    for name in ("launch", "read"):
        method = getattr(runner, name)

        def noted(argument: Any, name: str = name, method: Any = method) -> Any:
            seen.append(name)
            return method(argument)

        monkeypatch.setattr(runner, name, noted)
    return seen


@pytest.mark.parametrize(
    ("ahead", "order"),
    [(True, "launch launch read launch read read"), (False, "launch read launch read launch read")],
)
def test_the_next_step_is_launched_before_one_is_read(
    small_folder: Path, monkeypatch: pytest.MonkeyPatch, ahead: bool, order: str
) -> None:
    with start(small_folder, ahead=ahead) as llm:
        seen = events(llm, monkeypatch)
        llm.generate([[5]], SamplingParams(max_tokens=3, ignore_eos=True))
    assert " ".join(seen) == order


def test_a_stop_is_found_one_step_late_and_trimmed(
    small_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=1, seed=3)
    with start(small_folder, ahead=True) as llm:
        (whole,) = llm.generate([[5, 6]], free)
        tokens = whole.outputs[0].token_ids
        place = next(i for i in range(3, 12) if tokens[i] not in tokens[:i])
        stopping = SamplingParams(max_tokens=12, logprobs=1, seed=3, stop_token_ids=[tokens[place]])
        seen = events(llm, monkeypatch)
        (cut,) = llm.generate([[5, 6]], stopping)
    assert cut.outputs[0].token_ids == tokens[: place + 1]
    assert whole.outputs[0].logprobs is not None
    assert cut.outputs[0].logprobs == whole.outputs[0].logprobs[: place + 1]
    assert cut.outputs[0].finish_reason == "stop"
    assert seen.count("launch") == place + 2  # one for nobody, which is never read
    assert seen.count("read") == place + 1


def test_a_processor_sees_every_token(small_folder: Path) -> None:
    """Its next token depends on the host, so the engine waits; its neighbours' bits stay."""
    lengths: list[int] = []

    def watches(token_ids: Sequence[int], logits: Tensor) -> Tensor:
        lengths.append(len(token_ids))
        logits[: 3 + sum(token_ids) % 40] -= 2.0
        return logits

    params = [PARAMS[1], SamplingParams(max_tokens=9, logits_processors=[watches], logprobs=1)]
    found = []
    for ahead in (False, True):
        with start(small_folder, ahead=ahead) as llm:
            outputs = llm.generate(PROMPTS[1:3], params, use_tqdm=False)
            found.append([transcripts(output) for output in outputs])
    assert found[0] == found[1]
    assert lengths == [*range(9), *range(9)]


def test_a_wrong_pending_token_is_caught(
    small_folder: Path, expected: list[list[Transcript]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: each row gets the token that its neighbour sampled."""
    with start(small_folder, ahead=True) as llm:
        runner = llm.engine.runner
        fill = runner._fill_pending

        def shifted(seqs: Sequence[ScheduledSeq], batch: Batch) -> None:
            fill(seqs, batch)
            if len(seqs) > 2 and all(seq.pending for seq in seqs[:2]):
                batch.token_ids[:2] = batch.token_ids[:2].flip(0)

        monkeypatch.setattr(runner, "_fill_pending", shifted)
        assert run(llm) != expected


def test_a_switch_turns_it_off_and_the_report_says_so(small_folder: Path) -> None:
    for ahead, said in ((True, "async"), (False, "sync")):
        with start(small_folder, ahead=ahead) as llm:
            rows = {item: choice for item, choice, _ in llm.report.rows}
            assert rows["steps"] == said
            assert llm.engine.scheduler.config.steps_ahead == ahead


def breaks_after(llm: LLM, token: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model gives NaN wherever it has just read a token."""
    runner = llm.engine.runner
    forward = runner.forward

    def broken(batch: Batch, owners: Any) -> Tensor:
        hidden = forward(batch, owners)
        return torch.where((batch.token_ids == token)[:, None], torch.nan, hidden)

    monkeypatch.setattr(runner, "forward", broken)


def test_a_row_that_counts_for_nothing_harms_nobody(
    small_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request stops; its row in the next step gives NaN. Its neighbour goes on."""
    free = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=1, seed=3)
    with start(small_folder, ahead=True) as llm:
        stopped, neighbour = llm.generate([[5, 6], [7, 8]], free, use_tqdm=False)
        tokens, others = stopped.outputs[0].token_ids, neighbour.outputs[0].token_ids
        place = next(i for i in range(3, 12) if tokens[i] not in {*tokens[:i], *others})
        breaks_after(llm, tokens[place], monkeypatch)
        stopping = SamplingParams(max_tokens=12, logprobs=1, seed=3, stop_token_ids=[tokens[place]])
        llm.flush_cache()
        cut, same = llm.generate([[5, 6], [7, 8]], [stopping, free], use_tqdm=False)
        assert cut.outputs[0].token_ids == tokens[: place + 1]
        assert transcripts(same) == transcripts(neighbour)
        llm.flush_cache()
        with pytest.raises(EngineError, match="not usable"):  # where it does count
            llm.generate([[5, 6], [7, 8]], free, use_tqdm=False)


def test_nobody_is_preempted_for_pages_that_come_back(small_folder: Path) -> None:
    """Pages for two requests: the one that ends gives its own back in the very same call."""
    options: dict[str, Any] = {"page_size": 1, "radix_cache": False}
    with LLM(
        str(small_folder),
        max_model_len=12,
        kv_cache_memory=13 * 256,
        async_scheduling=True,
        **options,
    ) as llm:
        params = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (4, 8)]
        llm.generate([[5, 6, 7], [8, 9, 3, 4]], params, use_tqdm=False)
        assert llm.stats().preemptions == 0
