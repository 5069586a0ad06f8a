"""What a model is, read from a Hugging Face config and checked once.

Everything above this file trusts ``ModelConfig``: what cannot be served exactly is refused here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError
from ..generators import kept_generators
from .rope import ROPE_TYPES, RopeScaling

with kept_generators():
    from transformers import AutoConfig


@dataclass(frozen=True, slots=True)
class Architecture:
    """What sets a decoder-only family apart from Llama.

    ``qk_norm``: an RMS norm over each head of Q and of K before the rotation.
    """

    qk_norm: bool = False


ARCHITECTURES: Mapping[str, Architecture] = {
    "LlamaForCausalLM": Architecture(),
    "Qwen3ForCausalLM": Architecture(qk_norm=True),
}
"""Every architecture that can be served, as ``config.json`` spells it."""

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The facts of a decoder-only model. Sizes are counts of elements.

    ``dtype`` is the checkpoint's, ``torch.float32`` where the config does not say.
    ``rope_scaling`` is ``None`` for plain RoPE, ``sliding_window`` for full attention, and
    ``logit_soft_cap`` where attention scores are not capped.
    """

    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    qk_norm: bool
    dtype: torch.dtype
    sliding_window: int | None
    logit_soft_cap: float | None
    eos_token_ids: tuple[int, ...]
    bos_token_id: int | None

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_q_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together; the values' is the same."""
        return self.num_kv_heads * self.head_dim

    @classmethod
    def from_hf(cls, hf_config: Any) -> ModelConfig:
        """Read a ``transformers`` config (5.x, where RoPE lives in ``rope_parameters``).

        Raises :class:`ConfigError` for an architecture or a setting that is not served.
        """
        architecture = _architecture(getattr(hf_config, "architectures", None))
        _refuse_unsupported(hf_config)
        theta, scaling = _rope(hf_config)
        return cls(
            architecture=architecture,
            model_type=hf_config.model_type,
            vocab_size=hf_config.vocab_size,
            hidden_size=hf_config.hidden_size,
            intermediate_size=hf_config.intermediate_size,
            num_layers=hf_config.num_hidden_layers,
            num_q_heads=hf_config.num_attention_heads,
            num_kv_heads=hf_config.num_key_value_heads,
            head_dim=hf_config.head_dim,
            rms_norm_eps=hf_config.rms_norm_eps,
            rope_theta=theta,
            rope_scaling=scaling,
            max_position_embeddings=hf_config.max_position_embeddings,
            tie_word_embeddings=bool(hf_config.tie_word_embeddings),
            qk_norm=ARCHITECTURES[architecture].qk_norm,
            dtype=_dtype(hf_config.dtype),
            sliding_window=_sliding_window(hf_config),
            logit_soft_cap=None,
            eos_token_ids=_token_ids(hf_config.eos_token_id, hf_config.vocab_size),
            bos_token_id=hf_config.bos_token_id,
        )


def load_config(folder: Path) -> ModelConfig:
    """Read ``config.json`` of a model folder; end tokens from ``generation_config.json`` if there.

    Raises :class:`ConfigError` for a missing or unreadable file, and as ``from_hf`` does.
    """
    if not folder.is_dir():
        raise ConfigError(f"wanted a model folder, but there is none at {folder}")
    raw = _read_json(folder / "config.json")
    _architecture(raw.get("architectures"))  # before transformers, which may not know it
    try:
        hf_config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # any of transformers' validators may object, each in its own type
        raise ConfigError(f"transformers cannot read {folder / 'config.json'}: {error}") from error
    config = ModelConfig.from_hf(hf_config)
    generation = folder / "generation_config.json"
    if generation.exists():
        eos = _read_json(generation).get("eos_token_id")
        if eos is not None:
            config = replace(config, eos_token_ids=_token_ids(eos, config.vocab_size))
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"wanted {path.name} in {path.parent}, but it is not there") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path} as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"wanted a JSON object in {path}, got {type(content).__name__}")
    return content


def _architecture(names: Any) -> str:
    given = [str(name) for name in names or ()]
    if len(given) == 1 and given[0] in ARCHITECTURES:
        return given[0]
    raise ConfigError(
        f"unsupported architecture: config.json says {', '.join(given) or 'none'}; "
        f"supported are {', '.join(sorted(ARCHITECTURES))}"
    )


def _refuse_unsupported(hf: Any) -> None:
    """Raise one error that names every setting the decoder would compute wrongly."""
    reasons = [
        f"{name}={given!r} (wanted {wanted!r})"
        for name, given, wanted in (
            ("hidden_act", hf.hidden_act, "silu"),
            ("attention_bias", hf.attention_bias, False),
            ("mlp_bias", getattr(hf, "mlp_bias", False), False),
            ("quantization_config", getattr(hf, "quantization_config", None), None),
        )
        if given != wanted
    ]
    sizes = {name: getattr(hf, name) for name in _SIZES}
    wrong = [f"{name}={size!r} (wanted at least 1)" for name, size in sizes.items() if size < 1]
    reasons += wrong
    if not 0 <= hf.rms_norm_eps < math.inf:
        reasons.append(f"rms_norm_eps={hf.rms_norm_eps} (wanted a finite number of at least 0)")
    if hf.head_dim % 2:
        reasons.append(f"head_dim={hf.head_dim} (wanted an even number)")
    if not wrong and hf.num_attention_heads % hf.num_key_value_heads:
        reasons.append(
            f"num_attention_heads={hf.num_attention_heads} "
            f"(wanted a multiple of num_key_value_heads={hf.num_key_value_heads})"
        )
    if reasons:
        raise ConfigError(f"unsupported settings in config.json: {'; '.join(reasons)}")


def _rope(hf: Any) -> tuple[float, RopeScaling | None]:
    rope: dict[str, Any] = dict(hf.rope_parameters or {})
    rope_type = rope.get("rope_type", "default")
    if "rope_theta" not in rope or rope_type not in ROPE_TYPES:
        raise ConfigError(
            f"unsupported RoPE in config.json: {rope}; wanted one rope_theta for all layers and "
            f"a rope_type out of {', '.join(ROPE_TYPES)}"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError(
            f"unsupported partial_rotary_factor={rope['partial_rotary_factor']} in config.json: "
            "wanted 1.0, the whole head rotated"
        )
    theta = rope["rope_theta"]
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta < math.inf:
        raise ConfigError(
            f"unsupported rope_theta={theta!r} in config.json: wanted a finite number above 0"
        )
    theta = float(theta)
    if rope_type == "default":
        return theta, None
    names = {"linear": ("factor",), "llama3": RopeScaling.__slots__[1:]}[rope_type]
    missing = [name for name in names if not isinstance(rope.get(name), int | float)]
    if missing:
        raise ConfigError(
            f"rope_type {rope_type!r} wants a number for {', '.join(missing)}, got {rope}"
        )
    scaling = RopeScaling(rope_type=rope_type, **{name: rope[name] for name in names})
    if scaling.factor <= 0 or not 0 < scaling.low_freq_factor < scaling.high_freq_factor:
        raise ConfigError(
            f"RoPE scaling wants factor > 0 and 0 < low_freq_factor < high_freq_factor, got {rope}"
        )
    return theta, scaling


def _sliding_window(hf: Any) -> int | None:
    """The window that every layer uses, or ``None`` where every layer sees everything."""
    kinds = set(getattr(hf, "layer_types", None) or ["full_attention"])
    if kinds == {"full_attention"}:
        return None
    window = getattr(hf, "sliding_window", None)
    if kinds == {"sliding_attention"} and window is not None:
        return int(window)
    raise ConfigError(
        f"unsupported layer_types {sorted(kinds)} with sliding_window={window} in config.json: "
        "wanted all layers full_attention, or all sliding_attention"
    )


def _dtype(given: Any) -> torch.dtype:
    if given is None:
        return torch.float32
    dtype = getattr(torch, given, None) if isinstance(given, str) else given
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ConfigError(
            f"unsupported dtype {given} in config.json: wanted float32, bfloat16 or float16"
        )
    return dtype  # type: ignore[no-any-return]


def _token_ids(given: Any, vocab_size: int) -> tuple[int, ...]:
    """The end tokens, of which there may be none, one or several."""
    ids = () if given is None else tuple(given) if isinstance(given, list) else (given,)
    if any(type(token) is not int or not 0 <= token < vocab_size for token in ids):
        raise ConfigError(
            f"eos_token_id={given!r} in config.json or generation_config.json: wanted token ids "
            f"from 0 to {vocab_size - 1}. Correct it to the model's end-of-sequence token."
        )
    return ids
