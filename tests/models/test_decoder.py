"""The decoder against transformers with the same weights, in fp32; its tap and its linears."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from isobit.backends.base import LayerCache
from isobit.kernels.kernel_set import KernelSet
from isobit.models.config import ARCHITECTURES, ModelConfig
from isobit.models.decoder import Attend, Decoder, WrittenAttention
from isobit.models.registry import BUILDERS, build_model, load_model_config
from isobit.models.weights import random_weights

LENGTH = 150


def random_decoder(shape: str, kernels: KernelSet, dtype: torch.dtype = torch.float32) -> Decoder:
    config = load_model_config(shape, random=True)[1]
    return build_model(config, random_weights(config, 0), kernels, dtype, 512)


def tokens(config: ModelConfig, length: int = LENGTH) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(config.vocab_size, (length,), generator=generator)


@torch.inference_mode()
def run(decoder: Decoder, ids: Tensor, attention: Attend | WrittenAttention) -> Tensor:
    return decoder.logits(decoder.forward(ids, torch.arange(len(ids)), attention))


@pytest.mark.parametrize("shape", ["tiny-qwen3", "tiny-llama"])
def test_same_logits_as_transformers(
    shape: str, kernels: KernelSet, dense_attend: Attend, reference_model: Callable[..., Any]
) -> None:
    decoder = random_decoder(shape, kernels)
    ids = tokens(decoder.config)
    reference = reference_model(shape, random_weights(decoder.config, 0))
    with torch.inference_mode():
        theirs = reference(ids[None]).logits[0]
    ours = run(decoder, ids, dense_attend)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert theirs.abs().max() > 0.1  # the tolerance is far below the signal


def test_the_comparison_can_fail(
    torch_kernels: KernelSet, dense_attend: Attend, reference_model: Callable[..., Any]
) -> None:
    """Without RoPE scaling the logits part by far more than the tolerance."""
    decoder = random_decoder("tiny-llama", torch_kernels)
    ids = tokens(decoder.config)
    weights = random_weights(decoder.config, 0)
    unscaled = reference_model("tiny-llama", weights, rope_scaling=None)
    with torch.inference_mode():
        theirs = unscaled(ids[None]).logits[0]
    assert (run(decoder, ids, dense_attend) - theirs).abs().max() > 1e-3


@pytest.mark.parametrize("shape", ["tiny-qwen3", "tiny-llama"])
def test_bfloat16_stays_near_float32(shape: str, kernels: KernelSet, dense_attend: Attend) -> None:
    wide = random_decoder(shape, kernels)
    narrow = random_decoder(shape, kernels, torch.bfloat16)
    ids = tokens(wide.config, 40)
    exact, rounded = run(wide, ids, dense_attend), run(narrow, ids, dense_attend)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().max() < 0.05 * exact.abs().max()


def test_tap_sees_every_op_in_order(torch_kernels: KernelSet, dense_attend: Attend) -> None:
    decoder = random_decoder("tiny-qwen3", torch_kernels)
    seen: list[tuple[str, tuple[int, ...]]] = []
    decoder.tap = lambda name, rows: seen.append((name, tuple(rows.shape)))
    run(decoder, tokens(decoder.config, 5), dense_attend)
    layer = [
        ("input_layernorm", 128),
        ("self_attn.qkv_proj", 512),
        ("self_attn.rope", 384),
        ("self_attn.attention", 256),
        ("self_attn.o_proj", 128),
        ("post_attention_layernorm", 128),
        ("mlp.gate_up_proj", 768),
        ("mlp.act", 384),
        ("mlp.down_proj", 128),
    ]
    expected = [("embed_tokens", (5, 128))]
    expected += [(f"layers.{i}.{name}", (5, width)) for i in range(4) for name, width in layer]
    assert seen == [*expected, ("norm", (5, 128)), ("lm_head", (5, 1024))]


def test_only_qwen3_has_a_qk_norm(torch_kernels: KernelSet) -> None:
    assert random_decoder("tiny-llama", torch_kernels).layers[0].qk_norm is None
    assert random_decoder("tiny-qwen3", torch_kernels).layers[0].qk_norm is not None


def test_the_tap_changes_no_bit(kernels: KernelSet, dense_attend: Attend) -> None:
    decoder = random_decoder("tiny-qwen3", kernels)
    ids = tokens(decoder.config, 20)
    untapped = run(decoder, ids, dense_attend)
    decoder.tap = lambda _name, _rows: None
    assert torch.equal(run(decoder, ids, dense_attend), untapped)


class Doubled:
    """A linear whose outputs are twice those of another."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.in_features, self.out_features = inner.in_features, inner.out_features

    def __call__(self, x: Tensor) -> Tensor:
        return self.inner(x) * 2

    def accumulators(self, x: Tensor) -> Tensor:
        return self.inner.accumulators(x) * 2


def test_linears_can_be_listed_and_replaced(torch_kernels: KernelSet, dense_attend: Attend) -> None:
    decoder = random_decoder("tiny-llama", torch_kernels)
    linears = decoder.linears()
    assert len(linears) == 3 * 4 + 1
    assert linears["layers.2.mlp.down_proj"] is decoder.layers[2].down_proj
    assert (linears["lm_head"].in_features, linears["lm_head"].out_features) == (192, 1000)
    ids = tokens(decoder.config, 9)
    before = run(decoder, ids, dense_attend)
    decoder.layers[1].down_proj = Doubled(decoder.layers[1].down_proj)
    assert isinstance(decoder.linears()["layers.1.mlp.down_proj"], Doubled)
    assert not torch.equal(run(decoder, ids, dense_attend), before)


def test_attend_gets_contiguous_heads(torch_kernels: KernelSet, dense_attend: Attend) -> None:
    decoder = random_decoder("tiny-llama", torch_kernels)
    layers = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layers.append(layer)
        assert [tuple(x.shape) for x in (q, k, v)] == [(5, 6, 32), (5, 2, 32), (5, 2, 32)]
        assert all(x.is_contiguous() for x in (q, k, v))
        return dense_attend(layer, q, k, v)

    run(decoder, tokens(decoder.config, 5), attend)
    assert layers == [0, 1, 2]


def written(decoder: Decoder, dense_attend: Attend, off: int = 0) -> WrittenAttention:
    """Attention that reads 20 rows from pages of 4, in an order of their own; ``off`` is a slip."""
    c = decoder.config
    shape = (7, 4, c.num_kv_heads, c.head_dim)
    caches = [LayerCache(i, torch.zeros(shape), torch.zeros(shape)) for i in range(c.num_layers)]
    slots = (torch.tensor([3, 1, 5, 6, 2])[:, None] * 4 + torch.arange(4)).flatten()

    def attend(layer: int, q: Tensor) -> Tensor:
        k, v = (x.flatten(0, 1)[slots] for x in (caches[layer].k, caches[layer].v))
        return dense_attend(layer, q, k, v)

    return WrittenAttention(caches, slots - off, attend)


def test_k_and_v_through_the_cache_are_the_same_bits(
    kernels: KernelSet, dense_attend: Attend
) -> None:
    decoder = random_decoder("tiny-qwen3", kernels)
    ids = tokens(decoder.config, 20)
    seen: list[dict[str, Tensor]] = [{}, {}]
    logits = []
    for rows, attention in zip(seen, (dense_attend, written(decoder, dense_attend)), strict=True):
        decoder.tap = rows.__setitem__
        logits.append(run(decoder, ids, attention))
    assert seen[0].keys() == seen[1].keys()
    assert all(torch.equal(seen[0][op], seen[1][op]) for op in seen[0])
    assert torch.equal(*logits)
    decoder.tap = None
    assert torch.equal(run(decoder, ids, written(decoder, dense_attend)), logits[0])
    assert not torch.equal(run(decoder, ids, written(decoder, dense_attend, off=1)), logits[0])


def test_packed_rows_do_not_touch_each_other(kernels: KernelSet, dense_attend: Attend) -> None:
    """Two sequences packed into one forward give the bits that each gives alone."""
    decoder = random_decoder("tiny-qwen3", kernels)
    ids = tokens(decoder.config, 60)
    first, second = ids[:23], ids[23:]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = [slice(0, 23), slice(23, 60)]
        return torch.cat([dense_attend(layer, q[p], k[p], v[p]) for p in parts])

    positions = torch.cat((torch.arange(23), torch.arange(37)))
    with torch.inference_mode():
        together = decoder.logits(decoder.forward(ids, positions, attend))
    assert torch.equal(together[:23], run(decoder, first, dense_attend))
    assert torch.equal(together[23:], run(decoder, second, dense_attend))
    assert not torch.equal(together[23:46], run(decoder, first, dense_attend))


def test_every_supported_architecture_has_a_builder() -> None:
    assert BUILDERS.keys() == ARCHITECTURES.keys()
