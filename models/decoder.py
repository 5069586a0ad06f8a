"""The decoder of the Llama and Qwen3 families, over packed rows of any mix of sequences.

Every op comes from a ``KernelSet``, so a row's bits depend on that row alone; attention and the KV
cache are the caller's. Inference only: call it under ``torch.inference_mode()``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends.base import LayerCache
from ..kernels.kernel_set import KernelSet, Linear, QkNorm
from .config import ModelConfig
from .rope import cos_sin_table
from .weights import EMBEDDING, LM_HEAD

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""``(layer, q [T, q_heads, head_dim], k [T, kv_heads, head_dim], v) -> [T, q_heads, head_dim]``."""


@dataclass(frozen=True, slots=True)
class WrittenAttention:
    """Attention that finds K and V in the cache, because the decoder writes them there.

    layers: each layer's cache, its shape ``[num_pages, page_size, kv_heads, head_dim]``
    slot_mapping: int64 ``[T]``, ``page * page_size + offset`` where each row's K and V go
    attend: ``(layer, q [T, q_heads, head_dim]) -> [T, q_heads, head_dim]``
    """

    layers: Sequence[LayerCache]
    slot_mapping: Tensor
    attend: Callable[[int, Tensor], Tensor]


Tap = Callable[[str, Tensor], None]
"""Called with an op's name and its output rows ``[T, ...]``."""


class DecoderLayer:
    """One layer's prepared weights. Q, K and V are one product, and so are gate and up."""

    def __init__(
        self, config: ModelConfig, weight: Callable[[str], Tensor], kernels: KernelSet
    ) -> None:
        def fused(*names: str) -> Linear:
            return kernels.linear(torch.cat([weight(name) for name in names]))

        self.input_layernorm = weight("input_layernorm")
        self.qkv_proj = fused("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.qk_norm = (
            QkNorm(weight("self_attn.q_norm"), weight("self_attn.k_norm"), config.rms_norm_eps)
            if config.qk_norm
            else None
        )
        self.o_proj = kernels.linear(weight("self_attn.o_proj"))
        self.post_attention_layernorm = weight("post_attention_layernorm")
        self.gate_up_proj = fused("mlp.gate_proj", "mlp.up_proj")
        self.down_proj = kernels.linear(weight("mlp.down_proj"))


class Decoder:
    """A decoder-only transformer in one dtype.

    :param weights: tensors by Hugging Face name, as ``expected_tensors(config)`` lists them
    :param dtype: of weights and activations; weights are cast to it
    :param max_model_len: positions ``0 … max_model_len - 1`` can be computed

    ``tap``, when set, is called after every op with the op's name, for example
    ``"layers.3.self_attn.o_proj"``, and its output. The linears may be replaced one by one
    (``decoder.layers[3].down_proj = ...``).
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        kernels: KernelSet,
        dtype: torch.dtype,
        max_model_len: int,
    ) -> None:
        def weight(name: str) -> Tensor:
            return weights[name].to(dtype).contiguous()

        def layer_weight(index: int) -> Callable[[str], Tensor]:
            return lambda name: weight(f"model.layers.{index}.{name}.weight")

        self.config = config
        self.kernels = kernels
        self.dtype = dtype
        self.max_model_len = max_model_len
        self.tap: Tap | None = None
        self.embed_tokens = weight(EMBEDDING)
        self.layers = [
            DecoderLayer(config, layer_weight(index), kernels) for index in range(config.num_layers)
        ]
        self.norm = weight("model.norm.weight")
        tied = config.tie_word_embeddings
        self.lm_head = kernels.linear(self.embed_tokens if tied else weight(LM_HEAD))
        self.cos_sin = cos_sin_table(
            config.head_dim, config.rope_theta, config.rope_scaling, max_model_len
        ).to(self.embed_tokens.device)

    def forward(
        self, token_ids: Tensor, positions: Tensor, attention: Attend | WrittenAttention
    ) -> Tensor:
        """Hidden states after the final norm, ``[T, hidden_size]``.

        token_ids: int64 ``[T]`` in ``0 … vocab_size - 1``
        positions: int64 ``[T]``, absolute, below ``max_model_len``
        attention: gives each layer's; it sees contiguous q, k and v, or q and what is written
        """
        eps = self.config.rms_norm_eps
        residual = self.embed_tokens[token_ids]
        self._emit("embed_tokens", residual)
        hidden = self.kernels.rms_norm(residual, self.layers[0].input_layernorm, eps)
        for index, layer in enumerate(self.layers):
            op = f"layers.{index}"
            if index:  # the first layer has nothing to add to the embedding
                hidden, residual = self._add_norm(hidden, residual, layer.input_layernorm)
            self._emit(f"{op}.input_layernorm", hidden)
            hidden = self._attention(index, layer, hidden, positions, attention)
            hidden, residual = self._add_norm(hidden, residual, layer.post_attention_layernorm)
            self._emit(f"{op}.post_attention_layernorm", hidden)
            hidden = self._mlp(f"{op}.mlp", layer, hidden)
        hidden, _ = self._add_norm(hidden, residual, self.norm)
        self._emit("norm", hidden)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """``[R, hidden_size]`` -> fp32 ``[R, vocab_size]``, straight from the accumulators."""
        logits = self.lm_head.accumulators(hidden)
        self._emit("lm_head", logits)
        return logits

    def linears(self) -> dict[str, Linear]:
        """Every linear in use now, by op name."""
        return dict(self._named_linears())

    def _named_linears(self) -> Iterator[tuple[str, Linear]]:
        for index, layer in enumerate(self.layers):
            yield f"layers.{index}.self_attn.qkv_proj", layer.qkv_proj
            yield f"layers.{index}.self_attn.o_proj", layer.o_proj
            yield f"layers.{index}.mlp.gate_up_proj", layer.gate_up_proj
            yield f"layers.{index}.mlp.down_proj", layer.down_proj
        yield "lm_head", self.lm_head

    def _attention(
        self,
        index: int,
        layer: DecoderLayer,
        hidden: Tensor,
        positions: Tensor,
        attention: Attend | WrittenAttention,
    ) -> Tensor:
        c, op = self.config, f"layers.{index}.self_attn"
        qkv = layer.qkv_proj(hidden)
        self._emit(f"{op}.qkv_proj", qkv)
        heads = (qkv, c.num_q_heads, c.num_kv_heads, layer.qk_norm, self.cos_sin, positions)
        if isinstance(attention, WrittenAttention):
            cache, slots = attention.layers[index], attention.slot_mapping
            q = self.kernels.rope_qkv_write(*heads, cache.k, cache.v, slots)
            if self.tap is not None:
                self._emit(f"{op}.rope", q, cache.k.flatten(0, 1)[slots])
            mixed = attention.attend(index, q)
        else:
            q, k, v = self.kernels.rope_qkv(*heads)
            self._emit(f"{op}.rope", q, k)
            mixed = attention(index, q, k, v)
        mixed = mixed.reshape(len(qkv), c.q_size)
        self._emit(f"{op}.attention", mixed)
        out = layer.o_proj(mixed)
        self._emit(f"{op}.o_proj", out)
        return out

    def _mlp(self, op: str, layer: DecoderLayer, hidden: Tensor) -> Tensor:
        gate_up = layer.gate_up_proj(hidden)
        self._emit(f"{op}.gate_up_proj", gate_up)
        act = self.kernels.silu_mul(gate_up)
        self._emit(f"{op}.act", act)
        out = layer.down_proj(act)
        self._emit(f"{op}.down_proj", out)
        return out

    def _add_norm(self, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return self.kernels.add_rms_norm(x, residual, weight, self.config.rms_norm_eps)

    def _emit(self, op: str, *parts: Tensor) -> None:
        """Hand an op's output rows to the tap; several parts become one row side by side."""
        if self.tap is not None:
            rows = parts[0] if len(parts) == 1 else torch.cat([p.flatten(1) for p in parts], dim=-1)
            self.tap(op, rows)
