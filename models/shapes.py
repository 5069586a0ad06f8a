"""Named model shapes for random weights (``load_format="random"``): tests and benchmarks.

Each is a ``config.json`` as its publisher wrote it, less what does not matter to the arithmetic.
The ``tiny-*`` ones are ours: small, and awkward on purpose. Mixtures of experts, such as
Qwen3-30B-A3B, are not among them, as no model class computes one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "dtype": "bfloat16",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
}
_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
}

SHAPES: Mapping[str, Mapping[str, Any]] = {
    "qwen3-8b": {
        **_QWEN3,
        "vocab_size": 151_936,
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": False,
        "bos_token_id": 151_643,
        "eos_token_id": [151_645, 151_643],
    },
    "qwen3-1.7b": {
        **_QWEN3,
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": True,
        "bos_token_id": 151_643,
        "eos_token_id": [151_645, 151_643],
    },
    "llama-3.1-8b": {
        **_LLAMA,
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": False,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "bos_token_id": 128_000,
        "eos_token_id": [128_001, 128_008, 128_009],
    },
    "llama-3.2-1b": {
        **_LLAMA,
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131_072,
        "tie_word_embeddings": True,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "bos_token_id": 128_000,
        "eos_token_id": [128_001, 128_008, 128_009],
    },
    # heads wider than hidden_size / heads, as in the smaller Qwen3 models; untied
    "tiny-qwen3": {
        **_QWEN3,
        "dtype": "float32",
        "vocab_size": 1024,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    # a vocabulary that no tile divides, three query heads a KV head, scaling felt from the start
    "tiny-llama": {
        **_LLAMA,
        "dtype": "float32",
        "vocab_size": 1000,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "rope_theta": 10_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
"""``config.json`` contents by name."""
