"""A FlashAttention 3 in plain torch, with the arguments of each build that there is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from isobit.backends import fa3_attention
from isobit.backends.base import AttentionConfig, Batch, LayerCache
from isobit.backends.fa3_providers import Kernel, bind, load_kernel
from isobit.plugins.conformance.mutants.right import Plan, RightAttention

_FIRST = (
    "Tensor q, Tensor k, Tensor v, Tensor? k_new, Tensor? v_new, Tensor? q_v, Tensor(a!)? out, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? cu_seqlens_k_new, Tensor? seqused_q, "
    "Tensor? seqused_k, int? max_seqlen_q, int? max_seqlen_k, Tensor? page_table, "
    "Tensor? kv_batch_idx, Tensor? leftpad_k, Tensor? rotary_cos, Tensor? rotary_sin, "
    "Tensor? seqlens_rotary, Tensor? q_descale, Tensor? k_descale, Tensor? v_descale, "
)
SCHEMAS = {
    "vllm": f"({_FIRST}float softmax_scale, bool is_causal, int window_size_left, "
    "int window_size_right, float softcap, bool is_rotary_interleaved, "
    "Tensor? scheduler_metadata, int num_splits, bool? pack_gqa, int sm_margin, Tensor? s_aux, "
    "int cp_world_size, int cp_rank, Tensor? cp_tot_seqused_k) -> ()",
    "sgl": f"({_FIRST}float? softmax_scale, bool is_causal, int window_size_left, "
    "int window_size_right, int attention_chunk, float softcap, bool is_rotary_interleaved, "
    "Tensor? scheduler_metadata, int num_splits, bool? pack_gqa, int sm_margin, Tensor? sinks, "
    "Tensor? sparse_mask_fine, bool only_qv) -> ()",
    "upstream": f"({_FIRST}float? softmax_scale = None, bool is_causal = False, "
    "int window_size_left = -1, int window_size_right = -1, int attention_chunk = 0, "
    "float softcap = 0.0, bool is_rotary_interleaved = False, Tensor? scheduler_metadata = None, "
    "int num_splits = 0, bool? pack_gqa = None, int sm_margin = 0) -> ()",
}
"""By what the builds' own schemas say, but for the results, which are not used."""


BOMB = "raise SystemExit('this package was imported')\n"
FILES = {
    "flash_attn_3": "_C.abi3.so",
    "vllm": "vllm_flash_attn/_vllm_fa3_C.abi3.so",
    "sgl_kernel": "flash_ops.abi3.so",
}


class RoundedWeights(RightAttention):
    """Weights are rounded to the dtype of V before they are multiplied, as the real ones are.

    So the maximum that they are relative to shows, and with it the length of a tile.
    """

    def weights(self, scores: Tensor, maximum: Tensor) -> Tensor:
        return super().weights(scores, maximum).to(self.config.dtype).float()


@dataclass
class FakeFlash:
    """Paged causal attention over the given page table, by what an operator is called with.

    As the real one does, it takes other tiles for other ``max_seqlen_q`` at head_dim 64, and for
    ``num_splits`` of 0 splits that follow the batch. ``calls`` has the arguments of every call.
    """

    splits_by_batch: bool = False
    """Whether it splits by the batch even if it is told not to."""
    calls: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, **given: Any) -> None:
        self.calls.append(given)
        q, k = given["q"], given["k"]
        assert given["is_causal"]
        windows = given["window_size_left"], given["window_size_right"]
        assert (*windows, given["softcap"]) == (-1, 0, 0.0)
        for name in ("cu_seqlens_q", "seqused_k", "page_table"):
            assert given[name].dtype == torch.int32, name
        config = AttentionConfig(
            num_layers=1,
            num_q_heads=q.shape[1],
            num_kv_heads=k.shape[2],
            head_dim=q.shape[2],
            scale=given["softmax_scale"],
            page_size=k.shape[1],
            dtype=q.dtype,
            device=q.device,
            max_model_len=given["max_seqlen_k"],
        )
        backend = RoundedWeights(config)
        batch = _batch(given)
        short = given["max_seqlen_q"] * (q.shape[1] // k.shape[2]) <= 64
        if q.shape[2] == 64:
            backend.TILE = 16 if short else 32  # type: ignore[misc]
        if given["num_splits"] != 1 or self.splits_by_batch:
            backend.SPLIT = 128 if batch.num_seqs > 3 else 64  # type: ignore[misc]
        plan: Plan = backend.plan(batch)
        backend.run_written(q, LayerCache(0, k, given["v"]), plan, given["out"])


def _batch(given: dict[str, Any]) -> Batch:
    """The step that the arguments describe; every sequence as a prefill."""
    starts, kv_lens = given["cu_seqlens_q"].tolist(), given["seqused_k"].tolist()
    query_lens = [b - a for a, b in pairwise(starts)]
    assert max(query_lens) <= given["max_seqlen_q"]
    assert max(kv_lens) <= given["max_seqlen_k"]
    spans = zip(query_lens, kv_lens, strict=True)
    positions = torch.cat([torch.arange(kv - new, kv) for new, kv in spans])
    return Batch(
        token_ids=torch.zeros_like(positions),
        positions=positions,
        slot_mapping=torch.zeros_like(positions),
        cu_seqlens_q=given["cu_seqlens_q"],
        seq_lens=given["seqused_k"],
        block_table=given["page_table"],
        query_lens=query_lens,
        kv_lens=kv_lens,
        num_decodes=0,
    )


@pytest.fixture
def make_kernel() -> Iterator[Callable[..., Kernel]]:
    """Registers an operator of a build's schema with torch, and binds it as a library's."""
    libraries = []

    def make(build: str, run: Callable[..., None], schema: str = "") -> Kernel:
        namespace = f"isobit_fake_{build}"
        library = torch.library.Library(namespace, "DEF")
        libraries.append(library)
        library.define("fwd" + (schema or SCHEMAS[build]))
        operator = getattr(torch.ops, namespace).fwd.default
        names = [argument.name for argument in operator._schema.arguments]

        def implementation(*arguments: Tensor) -> None:
            run(**dict(zip(names, arguments, strict=False)))

        library.impl("fwd", implementation, "CPU")
        return bind(operator, f"{build} 1.0 (fake.so)")

    yield make
    for library in libraries:
        library._destroy()


@pytest.fixture
def fake(make_kernel: Any, monkeypatch: pytest.MonkeyPatch) -> FakeFlash:
    """The library that is found, of SGLang's arguments."""
    return install(FakeFlash(), make_kernel, monkeypatch)


def install(flash: FakeFlash, make_kernel: Any, monkeypatch: pytest.MonkeyPatch) -> FakeFlash:
    kernel = make_kernel("sgl", flash)
    monkeypatch.setattr(fa3_attention, "load_kernel", lambda: kernel)
    return flash


@pytest.fixture
def broken(make_kernel: Any, monkeypatch: pytest.MonkeyPatch) -> FakeFlash:
    """One that splits by the batch, whatever it is told."""
    return install(FakeFlash(splits_by_batch=True), make_kernel, monkeypatch)


@pytest.fixture
def put(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Puts a package on the path that must not be imported, with its extension's file."""
    monkeypatch.syspath_prepend(str(tmp_path))
    load_kernel.cache_clear()

    def make(package: str, file: str | None = None) -> Path:
        found = tmp_path / package / (file or FILES[package])
        found.parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / package / "__init__.py").write_text(BOMB)
        found.write_bytes(b"no library")
        return found

    return make
