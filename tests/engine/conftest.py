from __future__ import annotations

from collections.abc import Iterator

import pytest

from isobit import LLM


@pytest.fixture(scope="session")
def tiny() -> Iterator[LLM]:
    """A small random Qwen3 in fp32: no tokenizer, so prompts are token ids."""
    with LLM("tiny-qwen3", load_format="random", max_model_len=512) as llm:
        yield llm


@pytest.fixture(scope="session")
def smollm2() -> Iterator[LLM]:
    """The real model, in fp32."""
    with LLM("smollm2", max_model_len=4096) as llm:
        yield llm
