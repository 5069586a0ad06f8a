"""Tables of recorded runs: what they show, what is left out, what stops the generator."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PAIR = "prefill=fa3,decode=triton"
STEM = "h200-qwen3-8b-throughput"
ENTRY = {
    "name": "m page 16",
    "model": "m",
    "backend": "triton",
    "page_size": 16,
    "chunk": 8192,
    "flags": "--no-cuda-graph",
    "requests": 300,
    "longest_prompt": 16000,
    "held": ["batch"],
    "skipped": {},
    "digests": ["abc"],
    "seconds": 12.3,
    "failures": [],
    "command": "isobit verify",
    "commit": "1234567",
    "date": "2026-11-22",
    "device": "a GPU",
    "versions": {"torch": "2.11"},
}


@pytest.fixture
def results(generator: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of results."""
    recorded = sys.modules["recorded"]
    monkeypatch.setattr(recorded, "RESULTS", tmp_path)
    monkeypatch.setattr(recorded, "GPU_PROOF", tmp_path / "proof.json")
    return tmp_path


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_peers(folder: Path) -> None:
    names = ("vLLM", "vLLM, batch-invariant", "SGLang", "SGLang, deterministic")
    times = dict(zip(names, (1.0, 2.0, 3.0, None), strict=True))
    peers = [
        {"workload": "64:2048:1", "unit": "s"} | times,
        {"workload": "1:512:256", "unit": "ms a token"} | times,
    ]
    (folder / "h200-peers.json").write_text(json.dumps(peers))


def measured(backend: str, workload: str, seconds: float, gap: float) -> dict[str, Any]:
    requests, before, after = map(int, workload.split(":"))
    return {
        "attention_backend": backend,
        "deterministic": True,
        "requests": requests,
        "input_len": before,
        "output_len": after,
        "seconds": seconds,
        "inter_token_ms": gap,
    }


def turns(backend: str, prompt_tokens: int = 100) -> list[dict[str, Any]]:
    """Two turns and their total."""
    rows = [(1, 0.0, 0.25, 80.0, 1.0), (2, 0.5, 0.75, 40.0, 2.0), ("total", 0.4, 0.6, 60.0, 3.0)]
    return [
        {
            "attention_backend": backend,
            "turn": turn,
            "prompt_tokens": prompt_tokens,
            "hit_rate": rate,
            "possible_hit_rate": possible,
            "time_to_first_token_ms": first,
            "seconds": seconds,
        }
        for turn, rate, possible, first, seconds in rows
    ]


def test_a_recorded_proof_becomes_a_table(generator: ModuleType, results: Path) -> None:
    failed = ENTRY | {"failures": ["chunk: other bits"], "flags": ""}
    (results / "proof.json").write_text(json.dumps([ENTRY, failed]))
    text = generator.gpu_proof()
    row = "| `m` | `triton` | 16 | 8,192 | `--no-cuda-graph` | 300 | 16,000 | 1 | `abc` | 12 |"
    assert row in text
    assert "| 8,192 | defaults | 300 | 16,000 | 1, **1 failed** |" in text
    assert "[1]" not in text
    assert text.endswith(
        "a GPU, torch 2.11; commit `1234567`, 2026-11-22. The first row is\n`isobit verify`.\n"
    )


def test_a_reason_to_skip_a_row_stands_once_for_a_backend(
    generator: ModuleType, results: Path
) -> None:
    flashinfer = ENTRY | {"backend": "flashinfer", "skipped": {"score": "not promised"}}
    pair = flashinfer | {"backend": PAIR, "failures": ["cache: not run"]}
    (results / "proof.json").write_text(json.dumps([ENTRY, flashinfer, flashinfer, pair]))
    text = generator.gpu_proof()
    assert text.count("| 16,000 | 1 [1] |") == 2
    assert "| 16,000 | 1 [2], **1 failed** |" in text
    assert (
        "\n\n- [1] flashinfer, score: not run, not promised\n"
        f"- [2] {PAIR}, score: not run, not promised\n\n"
    ) in text


def test_backends_stand_beside_each_other_in_the_peers_units(
    generator: ModuleType, results: Path
) -> None:
    write_peers(results)
    lifted = measured("triton", "64:2048:1", 0.5, 0.5) | {"deterministic": False}
    triton = [measured("triton", "64:2048:1", 5.0, 9.0), measured("triton", "1:512:256", 9.0, 4.0)]
    pair = [measured(PAIR, "64:2048:1", 6.0, 1.0), measured(PAIR, "1:512:256", 1.0, 5.0)]
    write_lines(results / f"{STEM}-fa3-triton.jsonl", pair)
    write_lines(results / f"{STEM}.jsonl", [*triton, lifted])
    write_lines(
        results / f"{STEM}-flashinfer.jsonl",
        [
            measured("flashinfer", "1:512:256", 1.0, 4.5),
            measured("flashinfer", "64:2048:1", 4.0, 9.5),
        ],
    )
    lines = generator.gpu_backends().splitlines()
    assert lines[0].startswith(
        f"| requests x input → output | unit | `triton` | `flashinfer` | `{PAIR}` | vLLM |"
    )
    assert lines[2:] == [
        "| 64 x 2,048 → 1 | s | 5.00 | **4.00** | 6.00 | 1.00 | 2.00 | 3.00 | - |",
        "| 1 x 512 → 256 | ms a token | **4.00** | 4.50 | 5.00 | 1.00 | 2.00 | 3.00 | - |",
    ]


def test_turns_have_a_row_a_backend(generator: ModuleType, results: Path) -> None:
    write_lines(
        results / "h200-turns-flashinfer-triton.jsonl", turns("prefill=flashinfer,decode=triton")
    )
    write_lines(results / "h200-turns-triton.jsonl", turns("triton"))
    lines = generator.gpu_turns().splitlines()
    assert lines[0] == (
        "| backend | turn 1 | turn 2 | all turns | possible | first token of the last turn, ms "
        "| seconds |"
    )
    assert lines[2:] == [
        "| `triton` | 0% | 50% | 40% | 60% | 40 | 3.00 |",
        "| `prefill=flashinfer,decode=triton` | 0% | 50% | 40% | 60% | 40 | 3.00 |",
    ]


def test_what_has_no_file_is_said_not_to_be_recorded(generator: ModuleType, results: Path) -> None:
    write_peers(results)
    assert generator.gpu_turns() == generator.gpu_backends() == "Not recorded yet.\n"
    both = [measured("triton", work, 5.0, 9.0) for work in ("64:2048:1", "1:512:256")]
    write_lines(results / f"{STEM}.jsonl", both)
    assert generator.gpu_backends() == "Not recorded yet.\n"  # one is beside no other


def test_rows_in_the_wrong_file_stop_the_generator(generator: ModuleType, results: Path) -> None:
    write_peers(results)
    write_lines(results / f"{STEM}-fa3.jsonl", [measured("triton", "64:2048:1", 5.0, 9.0)])
    with pytest.raises(SystemExit, match=r"-fa3\.jsonl has rows of triton"):
        generator.gpu_backends()
    write_lines(results / "h200-turns-fa3.jsonl", turns("flashinfer"))
    with pytest.raises(SystemExit, match=r"turns-fa3\.jsonl has rows of flashinfer"):
        generator.gpu_turns()


def test_turns_of_other_conversations_stop_the_generator(
    generator: ModuleType, results: Path
) -> None:
    write_lines(results / "h200-turns-triton.jsonl", turns("triton"))
    write_lines(results / "h200-turns-fa3.jsonl", turns("fa3", prompt_tokens=200))
    with pytest.raises(SystemExit, match="triton and fa3 were given other conversations"):
        generator.gpu_turns()


def test_a_run_that_was_cut_off_stops_the_generator(generator: ModuleType, results: Path) -> None:
    write_peers(results)
    write_lines(results / f"{STEM}-fa3.jsonl", [measured("fa3", "64:2048:1", 5.0, 9.0)])
    with pytest.raises(SystemExit, match=r"fa3 lacks 1:512:256"):
        generator.gpu_backends()
    write_lines(results / "h200-turns-triton.jsonl", turns("triton")[:-1])
    with pytest.raises(SystemExit, match="turns of triton were cut off"):
        generator.gpu_turns()


def test_held_and_lifted_stand_beside_the_peers(generator: ModuleType, results: Path) -> None:
    write_peers(results)
    shares = {"share_of_limit": 0.5, "device_idle_share": 0.01}
    works = ("64:2048:1", "1:512:256")
    held = [measured("triton", work, 0.9, 1.8) | shares for work in works]
    lifted = [measured("triton", work, 2.5, 0.6) | {"deterministic": False} for work in works]
    write_lines(results / f"{STEM}.jsonl", [*held, *lifted])
    lines = generator.gpu_throughput().splitlines()
    assert lines[2:] == [
        "| 64 x 2,048 → 1 | s | **0.90** | 2.50 | 1.00 | 2.00 | 3.00 | - | 50% | 1.0% |",
        "| 1 x 512 → 256 | ms a token | 1.80 | 0.60 | **1.00** | 2.00 | 3.00 | - | 50% | 1.0% |",
    ]


def test_what_of_the_table_is_not_recorded_is_named(generator: ModuleType, results: Path) -> None:
    recorded = sys.modules["recorded"]
    first, *others = recorded._configurations()
    (results / "proof.json").write_text(json.dumps([ENTRY | {"name": first}]))
    text = generator.gpu_proof()
    assert f"{len(others)} of the table's configurations are not recorded: `{others[0]}`" in text
    assert f"`{first}`" not in text
