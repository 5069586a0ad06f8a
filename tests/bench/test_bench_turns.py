"""``isobit bench turns``: hit rates as arithmetic gives them, digests that compare."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from click.testing import CliRunner

from isobit.backends import torch as torch_plugin
from isobit.cli.main import main
from isobit.plugins import hookimpl
from isobit.plugins.discovery import Candidate, discover

COUNT, TURNS, USER, ANSWER, SYSTEM, PAGE = 3, 4, 20, 40, 32, 16
SPEC = torch_plugin.isobit_attention_backends()[0]
BEFORE = [SYSTEM + turn * (USER + ANSWER) for turn in range(TURNS)]
"""Tokens of a conversation before each turn."""


def whole(tokens: int, step: int = PAGE) -> int:
    return tokens // step * step


def turns(*options: str) -> list[dict[str, Any]]:
    args = ["bench", "turns", "--model-config", "tiny-qwen3", "--load-format", "random"]
    args += ["--conversations", str(COUNT), "--turns", str(TURNS), "--user-tokens", str(USER)]
    args += ["--answer-tokens", str(ANSWER), "--system-tokens", str(SYSTEM), "--threads", "1"]
    done = CliRunner().invoke(main, [*args, "--warmup", "0", "--json", *options])
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.stdout.splitlines()]


def cached(rows: list[dict[str, Any]]) -> list[int]:
    """Of each turn; the total is checked to be theirs."""
    *each, total = rows
    for key in ("prompt_tokens", "cached_tokens"):
        assert total[key] == sum(row[key] for row in each)
    assert [row["turn"] for row in rows] == [*range(1, TURNS + 1), "total"]
    for row, before in zip(each, BEFORE, strict=True):
        assert row["prompt_tokens"] == COUNT * (before + USER)
    for row in rows:
        assert row["hit_rate"] == row["cached_tokens"] / row["prompt_tokens"]
        assert row["hit_rate"] <= row["possible_hit_rate"] < 1
        assert 0 < row["time_to_first_token_ms"] < 1e3 * row["seconds"]
    return [row["cached_tokens"] for row in each]


@pytest.fixture
def weaker(monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch backend, declared weaker than it is, under two names of a plugin of its own."""
    low, high = (
        replace(
            SPEC,
            name=name,
            capabilities=replace(SPEC.capabilities, decode_equals_prefill=False, alignment=cut),
        )
        for name, cut in (("prefilled", 1), ("prefilled-48", 48))
    )

    class Plugin:
        @hookimpl
        def isobit_attention_backends(self) -> list[Any]:
            return [low, high]

    found = [*discover(), Candidate("weaker", "weaker", "1.0", "weaker", Plugin)]
    monkeypatch.setattr("isobit.plugins.manager.discover", lambda: found)


def test_a_backend_that_holds_all_finds_all_that_was_computed() -> None:
    """All begin in one step, where nobody finds the system prompt yet."""
    rows = turns("--attention-backend", "torch")
    expected = [0, *(COUNT * whole(before - 1) for before in BEFORE[1:])]
    assert cached(rows) == expected
    *each, _ = rows
    assert [row["possible_hit_rate"] for row in each[1:]] == [row["hit_rate"] for row in each[1:]]
    first = each[0]
    assert first["possible_hit_rate"] * first["prompt_tokens"] == (COUNT - 1) * whole(SYSTEM)
    assert {row["attention_backend"] for row in rows} == {"torch"}


def test_those_that_begin_later_find_the_system_prompt() -> None:
    """A step has room for one opening, so the others are admitted after the first."""
    rows = turns("--attention-backend", "torch", "--max-num-batched-tokens", str(SYSTEM + USER))
    assert cached(rows)[0] == (COUNT - 1) * whole(SYSTEM)
    assert rows[0]["hit_rate"] == rows[0]["possible_hit_rate"]


@pytest.mark.parametrize(("name", "step"), [("prefilled", PAGE), ("prefilled-48", 48)])
@pytest.mark.usefixtures("weaker")
def test_a_weaker_backend_finds_what_prefill_wrote(name: str, step: int) -> None:
    """An answer's pages are computed again by the next turn's prefill, and found by the one after.

    The boundary is a common multiple of page size and alignment.
    """
    prompts = [before + USER for before in BEFORE]
    expected = [0, *(COUNT * whole(whole(prompt), step) for prompt in prompts[:-1])]
    rows = turns("--attention-backend", name)
    assert cached(rows) == expected
    assert rows[-1]["hit_rate"] < rows[-1]["possible_hit_rate"]


@pytest.mark.usefixtures("weaker")
def test_the_digest_is_that_of_the_bits() -> None:
    """Equal for every way to serve the same tokens; another request's is another."""
    ways = (
        ("--attention-backend", "torch"),
        ("--no-radix-cache",),
        ("--attention-backend", "prefilled-48"),
        ("--page-size", "5", "--max-num-batched-tokens", "30"),
    )
    found = [turns(*way) for way in ways]
    assert cached(found[1]) == [0] * TURNS
    assert len({tuple(row["digest"] for row in rows) for rows in found}) == 1
    assert len({row["digest"] for row in found[0]}) == TURNS + 1
    other = turns("--seed", "1")
    assert all(a["digest"] != b["digest"] for a, b in zip(found[0], other, strict=True))


def test_a_table_and_its_heading() -> None:
    args = ["bench", "turns", "--model-config", "tiny-qwen3", "--load-format", "random"]
    args += ["--conversations", "2", "--turns", "2", "--user-tokens", "3", "--answer-tokens", "2"]
    done = CliRunner().invoke(main, [*args, "--system-tokens", "0", "--threads", "1"])
    assert done.exit_code == 0, done.output
    engine, heading, *rows = done.stdout.splitlines()
    assert "attention torch, ib-" in engine
    assert heading.split()[:3] == ["turn", "prompt", "tokens"]
    assert [row.split()[:3] for row in rows] == [
        ["1", "6", "0"],
        ["2", "16", "0"],
        ["total", "22", "0"],
    ]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--turns", "0"], "--turns"),
        (["--system-tokens", "-1"], "--system-tokens"),
        (["--model-config", "tiny-qwen3", "--load-format", "random", "--max-model-len", "9"], "9"),
    ],
)
def test_usage_errors_exit_2(args: list[str], message: str) -> None:
    done = CliRunner().invoke(main, ["bench", "turns", *args])
    assert done.exit_code == 2, done.output
    assert message in done.output
