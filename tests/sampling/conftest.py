"""Kernels and tokenizers that the sampling tests share."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerFast

from isobit.errors import ConfigError
from isobit.kernels.dispatch import load_kernels, unavailable_reason
from isobit.kernels.kernel_set import KernelSet
from isobit.models.registry import load_tokenizer, resolve_model


@pytest.fixture(scope="session", params=["native", "torch"])
def kernels(request: pytest.FixtureRequest) -> KernelSet:
    reason = unavailable_reason(request.param)
    if reason is not None:
        pytest.skip(f"{request.param} kernels: {reason}")
    return load_kernels(request.param)


def byte_symbols() -> list[str]:
    """GPT-2's printable stand-in for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    symbols = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    return [symbols[b] for b in range(256)]


@pytest.fixture(scope="session")
def byte_tokenizer() -> Any:
    """Token i is byte i; token 256 is the special token ``<eos>``."""
    vocab = {symbol: i for i, symbol in enumerate(byte_symbols())}
    core = Tokenizer(BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


@pytest.fixture(scope="session")
def fallback_tokenizer() -> Any:
    """SentencePiece style: words with U+2581 for a space; bytes where there is no word."""
    words = ["<unk>", "▁Hello", "▁world", "ly", "▁", ","]
    vocab = {word: i for i, word in enumerate(words)}
    vocab |= {f"<0x{b:02X}>": len(words) + b for b in range(256)}
    core = Tokenizer(BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    core.add_special_tokens(["<eos>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


@pytest.fixture(scope="session")
def smollm2_tokenizer() -> Any:
    try:
        folder = resolve_model("smollm2")
    except ConfigError as error:
        pytest.skip(f"SmolLM2's tokenizer: {error}")
    return load_tokenizer(folder)
