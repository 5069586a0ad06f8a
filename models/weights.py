"""A model's tensors by Hugging Face name: which there are, seeded random ones, and their digest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from .config import ModelConfig

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
_CPU = torch.device("cpu")


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint; matrices are ``[out, in]``.

    A tied model has no ``lm_head.weight``: its logits use the embedding.
    """
    c = config
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (c.vocab_size, c.hidden_size)}
    for layer in range(c.num_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + name: shape for name, shape in _layer_tensors(c).items()}
    shapes["model.norm.weight"] = (c.hidden_size,)
    if not c.tie_word_embeddings:
        shapes[LM_HEAD] = (c.vocab_size, c.hidden_size)
    return shapes


def _layer_tensors(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (c.hidden_size,),
        "self_attn.q_proj.weight": (c.q_size, c.hidden_size),
        "self_attn.k_proj.weight": (c.kv_size, c.hidden_size),
        "self_attn.v_proj.weight": (c.kv_size, c.hidden_size),
        "self_attn.o_proj.weight": (c.hidden_size, c.q_size),
        "post_attention_layernorm.weight": (c.hidden_size,),
        "mlp.gate_proj.weight": (c.intermediate_size, c.hidden_size),
        "mlp.up_proj.weight": (c.intermediate_size, c.hidden_size),
        "mlp.down_proj.weight": (c.hidden_size, c.intermediate_size),
    }
    if c.qk_norm:
        shapes["self_attn.q_norm.weight"] = (c.head_dim,)
        shapes["self_attn.k_norm.weight"] = (c.head_dim,)
    return shapes


def random_weights(
    config: ModelConfig,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device = _CPU,
) -> dict[str, Tensor]:
    """Seeded stand-in weights: matrices N(0, 0.02²), norms N(1, 0.05²).

    Each tensor has a generator of its own, seeded from ``seed`` and its name, and is drawn in fp32
    and then cast: a tensor's values depend neither on the other tensors nor on ``dtype``. They are
    drawn on ``device``, whose generator decides the values. The global generators are not touched.
    """
    weights = {}
    for name, shape in expected_tensors(config).items():
        key = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(key, "little") >> 1)
        noise = torch.randn(shape, generator=generator, device=device)
        values = noise.mul_(0.02) if len(shape) == 2 else noise.mul_(0.05).add_(1.0)
        weights[name] = values.to(dtype)
    return weights


def random_weights_digest(
    config: ModelConfig, seed: int, dtype: torch.dtype, device: torch.device
) -> str:
    """A short digest of what determines ``random_weights`` on a CUDA device, which is not read.

    It names the device too: torch's Philox there hands its numbers out by the launch grid, and
    that follows the number of multiprocessors.
    """
    parts = (
        *(repr(config), str(seed), str(dtype), device.type),
        *(torch.cuda.get_device_name(device), "Philox", torch.__version__),
    )
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()


_BLOCK = 1 << 16
_GROUP = 16
_BASE = 0x9E3779B97F4A7C13 - (1 << 64)  # 3 mod 8, the residue that the bound below needs


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """A short digest of names, dtypes, shapes and every bit; the order of the names is free.

    Each block of 65,536 32-bit words becomes one polynomial in an odd base modulo 2^64, and the
    polynomials are hashed. Changing any one word always shows (an odd coefficient is invertible);
    so does swapping any two of a block (``base^i - base^j`` has at most 17 factors of two and
    their difference at most 31, together under 64). It is a fingerprint, not a defence against
    someone who searches for collisions.
    """
    powers = torch.full((_BLOCK,), _BASE, dtype=torch.int64)
    powers[0] = 1
    powers = powers.cumprod(0)
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        tensor = weights[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for sums in _block_sums(_words(tensor), powers):
            digest.update(sums.numpy().tobytes())
    return digest.hexdigest()


def _words(tensor: Tensor) -> Tensor:
    """The tensor's bytes in logical order as int32 words, the last one padded with zeros."""
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    padding = -data.numel() % 4
    if padding:
        data = torch.cat((data, data.new_zeros(padding)))
    return data.view(torch.int32)


def _block_sums(words: Tensor, powers: Tensor) -> list[Tensor]:
    """One int64 per block; a few blocks at a time, so that the products stay in cache."""
    whole = words.numel() // _BLOCK * _BLOCK
    sums = [
        (group * powers).sum(-1)  # int32 times int64 is int64; both wrap
        for group in torch.split(words[:whole].view(-1, _BLOCK), _GROUP)
        if group.numel()
    ]
    rest = words[whole:]
    if rest.numel():
        sums.append((rest * powers[: rest.numel()]).sum(-1, keepdim=True))
    return sums
