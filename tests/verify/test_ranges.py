"""What ``isobit verify`` can be asked for: many requests at once, long prompts, equal digests."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from click.testing import CliRunner
from torch import Tensor

from isobit import LLM
from isobit.cli.main import main
from isobit.errors import ConfigError
from isobit.verify import invariances
from isobit.verify.crowd import crowd
from isobit.verify.invariances import Proofs
from isobit.verify.judge import Verdict, judge_runs
from isobit.verify.workload import Case, make_cases, prompt_lengths

LENGTHS = (15, 16, 17, 40, 63)
MANY = 40


def cases_of(llm: LLM, lengths: Sequence[int] = LENGTHS) -> list[Case]:
    return make_cases(
        None, llm.engine.vocab_size, lengths, max_new_tokens=4, temperature=0, sampling_seed=None
    )


def row(llm: LLM, name: str, requests: int | None = None) -> Verdict:
    proofs = Proofs(llm.engine, cases_of(llm), requests)
    return judge_runs(name, proofs, getattr(proofs, name)(), 0.0)


@pytest.fixture
def llm() -> Iterator[LLM]:
    with LLM("tiny-llama", load_format="random", max_num_batched_tokens=64) as llm:
        yield llm


class VariantAbove:
    """A logits projection with other bits in batches of more than ``limit`` rows."""

    def __init__(self, linear: Any, limit: int) -> None:
        self.linear = linear
        self.limit = limit

    def accumulators(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear.accumulators(x)
        return out * (1 + 2**-10) if len(x) > self.limit else out


def test_so_many_decode_at_once_and_the_row_says_so(llm: LLM) -> None:
    """Also with a budget that the prompts alone would fill several times."""
    verdict = row(llm, "batch", MANY)
    assert verdict.holds, verdict.failure
    *others, last = verdict.results
    assert (last.label, last.requests) == (f"{MANY} at once", MANY)
    assert last.detail == f"{MANY} decoding in one step"
    assert [other.detail for other in others] == ["", "", ""]


def test_without_a_prefix_cache_they_still_decode_at_once() -> None:
    options: dict[str, Any] = {"load_format": "random", "max_num_batched_tokens": 64}
    with LLM("tiny-llama", radix_cache=False, **options) as llm:
        assert row(llm, "batch", 30).results[-1].detail == "30 decoding in one step"


def test_only_the_many_catch_what_is_wrong_in_large_batches() -> None:
    """The negative control: logits that change beyond any smaller batch."""
    for requests, found in ((None, True), (MANY, False)):
        with LLM("tiny-llama", load_format="random", max_num_batched_tokens=64) as llm:
            decoder = llm.engine.runner.decoder
            decoder.lm_head = VariantAbove(decoder.lm_head, 3 * len(LENGTHS))  # type: ignore[assignment]
            verdict = row(llm, "batch", requests)
        assert verdict.holds == found
    assert [result.equal for result in verdict.results] == [True, True, True, False]
    assert f"{MANY} at once" in str(verdict.failure)
    assert "lm_head" in str(verdict.failure)


def test_fewer_at_once_prove_nothing(llm: LLM) -> None:
    """Without the longer outputs the first are gone before the last come."""
    proofs = Proofs(llm.engine, cases_of(llm), MANY)
    proofs.crowd = [proofs.cases[i % len(LENGTHS)] for i in range(MANY)]
    verdict = judge_runs("batch", proofs, proofs.batch(), 0.0)
    assert not verdict.holds
    assert all(result.equal for result in verdict.results)
    assert "nothing is proved" in str(verdict.failure)
    assert "decoding in one step" in str(verdict.failure)


@pytest.mark.parametrize("requests", [64, 300])
def test_a_step_has_no_room_for_so_many(llm: LLM, requests: int) -> None:
    with pytest.raises(ConfigError, match="max_num_batched_tokens = 64 tokens"):
        crowd(llm.engine, cases_of(llm), requests)


def test_long_prompts_are_cut_into_larger_pieces(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no step is larger than the engine's own."""
    monkeypatch.setattr(invariances, "_CUT_SMALL", 20)
    verdict = row(llm, "chunk")
    assert verdict.holds, verdict.failure
    small = sum(length <= 20 for length in LENGTHS)
    found = [(result.label, result.requests) for result in verdict.results]
    few = [("chunks of 33", small), ("chunks of 64", small), ("random chunks", small)]
    assert found == [*few, ("chunks of 64", len(LENGTHS))]
    backend, plan = llm.engine.runner.backend, llm.engine.runner.backend.plan

    def variant(batch: Any) -> Any:
        """In long chunks that start amid a prompt, the last token goes where the first should."""
        for start, new in zip(batch.kv_lens, batch.query_lens, strict=True):
            if new > 20 and start > new:
                batch.slot_mapping[-1] = batch.slot_mapping[0]
        return plan(batch)

    monkeypatch.setattr(backend, "plan", variant)
    verdict = row(llm, "chunk")
    assert [result.equal for result in verdict.results] == [True, True, True, False]


def test_half_of_the_cache_is_evicted(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = row(llm, "cache")
    assert verdict.holds, verdict.failure
    details = {result.label: result.detail for result in verdict.results}
    evicted, _, cached, *_ = details["half evicted"].split()
    assert int(evicted) == int(cached) // 2 > 0
    assert "decoded tokens reused" in details["written by decoding"]
    assert not details["written by decoding"].startswith("0")
    cache = llm.engine.scheduler.cache
    assert cache is not None
    monkeypatch.setattr(cache, "evict", lambda count: 0)
    verdict = row(llm, "cache")
    assert "half evicted: what it is about did not take place" in str(verdict.failure)


def test_other_bits_in_pages_that_decoding_wrote_are_caught(llm: LLM) -> None:
    """The negative control: attention of decoding differs from that of a prefill, in any batch."""
    backend = llm.engine.runner.backend
    plan, run = backend.plan, backend.run_written
    decodes = 0

    def watched(batch: Any) -> Any:
        nonlocal decodes
        decodes = batch.num_decodes
        return plan(batch)

    def variant(q: Tensor, layer: Any, planned: Any, out: Tensor) -> None:
        run(q, layer, planned, out)
        out[:decodes] *= 1 + 2**-8

    backend.plan, backend.run_written = watched, variant  # type: ignore[method-assign]
    assert row(llm, "batch").holds
    verdict = row(llm, "cache")
    assert [result.equal for result in verdict.results] == [True, True, False]
    assert "written by decoding" in str(verdict.failure)


def digests(*options: str) -> set[str]:
    """Of ``isobit verify --json``: one, if all rows hold."""
    args = ["verify", "--model", "tiny-qwen3", "--load-format", "random", "--quick", "--json"]
    done = CliRunner().invoke(main, [*args, "--max-new-tokens", "3", "--threads", "1", *options])
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["longest_prompt"] for row in rows} == {900}
    assert len({row["fingerprint"] for row in rows}) == 1
    return {row["digest"] for row in rows if not row["skipped"]}


def test_a_workload_has_one_digest_whatever_the_pages_and_the_chunks() -> None:
    common = ("--max-prompt-tokens", "900")
    found = [
        digests(*common, "--page-size", "16"),
        digests(
            *common, "--page-size", "64", "--max-num-batched-tokens", "256", "--requests", "50"
        ),
        digests(*common, "--page-size", "128", "--no-radix-cache"),
    ]
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 1
    assert digests(*common, "--temperature", "0.5") != found[0]  # a digest can differ


@pytest.mark.parametrize("quick", [True, False])
def test_prompt_lengths_are_those_of_any_usual_page(quick: bool) -> None:
    def lengths(page_size: int, **options: int) -> list[int]:
        return prompt_lengths(quick=quick, page_size=page_size, **({"longest": 40_000} | options))

    usual = lengths(16)
    assert usual == lengths(32) == lengths(64) == lengths(128) == lengths(256)
    assert lengths(40) == sorted({*usual, 39})
    assert lengths(16, reach=16_000)[-2:] == [11_200 if quick else 8_000, 16_000]
    assert lengths(16, reach=100)[-1] == 100
    assert lengths(16, longest=500)[-1] <= 500


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-prompt-tokens", "5000"), "leaves room for 2028 beside the outputs"),
        (("--requests", "256", "--max-num-batched-tokens", "256"), "Raise them, or ask for fewer"),
        (("--requests", "9", "--test-mode", "single"), "belong to --test-mode all"),
    ],
)
def test_usage_errors(options: tuple[str, ...], message: str) -> None:
    args = [
        "verify",
        "--model",
        "tiny-qwen3",
        "--load-format",
        "random",
        "--quick",
        "--threads",
        "1",
    ]
    done = CliRunner().invoke(main, [*args, *options])
    assert done.exit_code == 2, done.output
    assert message in " ".join(done.output.split())
