"""A ``flashinfer`` of plain torch, with the wrappers' signatures and what goes wrong with theirs.

Its kernels are ``RightAttention``, which walks positions in tiles; the size of a tile stands for
the kernel and for FlashInfer's choices, so that another choice gives other bits.
"""

from __future__ import annotations

import sys
import weakref
from types import ModuleType, SimpleNamespace

import pytest
import torch

from isobit.backends.base import AttentionConfig, LayerCache
from isobit.backends.flashinfer import isobit_attention_backends
from isobit.plugins.conformance.judge import Judge
from isobit.plugins.conformance.mutants.right import Plan, RightAttention
from isobit.plugins.conformance.scenario import Geometry

OURS = ("wrappers", "decode", "prefill", "attention")
DECODE_TILE, FA3_TILE, UNSPLIT = 16, 64, 1024
WIDEST = 20  # pages of a sequence that a decode walks, masked where there are fewer


class Kernel(RightAttention):
    """Attention in tiles and splits of a size given by who launches it."""

    def __init__(self, config: AttentionConfig, tile: int, split: int) -> None:
        super().__init__(config)
        self.TILE, self.SPLIT = tile, split


class FakeWrapper:
    """What both wrappers share: buffers, a plan with its copy under way, a run.

    freed_early: a list that gets the kind of each that went while a copy read its host buffer
    """

    def __del__(self) -> None:
        if self.copy_under_way:
            self.freed_early.append(type(self).__name__)

    def __init__(self, log: list, float_workspace_buffer, kv_layout) -> None:
        assert kv_layout == "NHD"
        assert float_workspace_buffer.dtype == torch.uint8
        self.log, self.device = log, float_workspace_buffer.device
        self.copy_under_way = False
        self.freed_early: list[str] = []
        self.planned = None
        self.int_bytes = 8 * 2**20

    def reset_workspace_buffer(self, float_workspace_buffer, int_workspace_buffer) -> None:
        assert not self.copy_under_way, "freed while a copy reads it"
        self.int_bytes = int_workspace_buffer.numel()
        self.planned = None

    def _plan(
        self, q, indptr, indices, last, seq_lens, sizes, tile, split, scores, *, widest
    ) -> None:
        if self.copy_under_way:
            raise AssertionError("the host buffer is written while a copy reads it")
        self.copy_under_way = True
        heads, kv_heads, head_dim, page_size = sizes
        lengths = (indptr.diff() - 1) * page_size + last
        assert torch.equal(lengths.int(), seq_lens)
        assert int(seq_lens.max()) <= max(widest, WIDEST) * page_size, "the fake walks no further"
        self.log.append((type(self).__name__, len(last)))
        config = AttentionConfig(
            num_layers=1,
            num_q_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            scale=scores["sm_scale"],
            page_size=page_size,
            dtype=scores["q_data_type"],
            device=self.device,
            max_model_len=1,
            sliding_windows=() if scores["window_left"] < 0 else (scores["window_left"] + 1,),
            logit_soft_cap=scores["logits_soft_cap"],
        )
        self.planned = SimpleNamespace(
            starts=q.long(),
            rows=int(q[-1]),
            kernel=Kernel(config, tile, split),
            page_size=page_size,
            widest=widest,
        )
        self._paged_kv_indptr_buf, self._paged_kv_last_page_len_buf = indptr, last
        self.indices = indices

    @property
    def buffers(self) -> SimpleNamespace:
        """What launches read."""
        return SimpleNamespace(
            indptr=self._paged_kv_indptr_buf,
            indices=self.indices,
            last=self._paged_kv_last_page_len_buf,
        )

    def run(self, q, paged_kv_cache, *, out, enable_pdl) -> None:
        """Reads lengths and pages from the buffers alone, as a recorded kernel does."""
        assert self.planned is not None, "run without a plan"
        assert enable_pdl is False
        assert out.is_contiguous()
        b, page_size = self.buffers, self.planned.page_size
        starts = self.planned.starts
        assert len(q) == self.planned.rows, "q has other rows than the plan"
        row = torch.arange(len(q))
        owners = torch.searchsorted(starts, row, right=True) - 1
        begin, end = b.indptr[owners].long(), b.indptr[owners + 1].long()
        kv_lens = (end - begin - 1) * page_size + b.last[owners]
        positions = kv_lens - (starts[owners + 1] - row)
        columns = begin[:, None] + torch.arange(self.planned.widest)
        table = b.indices[columns.clamp(max=len(b.indices) - 1)].long()
        k, v = paged_kv_cache
        table = torch.where(columns < end[:, None], table, 0)
        walked = [self.planned.widest * page_size] * len(q)
        batch = SimpleNamespace(num_decodes=0, num_tokens=len(q))
        plan = Plan(batch, owners, positions, table, walked)
        self.planned.kernel.run_written(q, LayerCache(0, k, v), plan, out)


class BatchPrefillWithPagedKVCacheWrapper(FakeWrapper):
    def __init__(self, log, float_workspace_buffer, kv_layout="NHD", *, backend="auto") -> None:
        super().__init__(log, float_workspace_buffer, kv_layout)
        self.backend = backend

    def plan(
        self,
        qo_indptr,
        paged_kv_indptr,
        paged_kv_indices,
        paged_kv_last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim_qk,
        page_size,
        *,
        causal,
        seq_lens,
        max_token_per_sequence,
        **scores,
    ) -> None:
        assert causal
        assert qo_indptr.diff().max() == max_token_per_sequence
        tile = FA3_TILE
        if self.backend == "fa2":  # its tile follows the batch
            tile = 16 if qo_indptr.diff().float().mean() <= 20 else 32
        sizes = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        self._plan(
            qo_indptr,
            paged_kv_indptr,
            paged_kv_indices,
            paged_kv_last_page_len,
            seq_lens,
            sizes,
            tile,
            UNSPLIT * tile,
            scores,
            widest=int(paged_kv_indptr.diff().max()),
        )


class BatchDecodeWithPagedKVCacheWrapper(FakeWrapper):
    def __init__(
        self,
        log,
        float_workspace_buffer,
        kv_layout="NHD",
        *,
        use_cuda_graph=False,
        use_tensor_cores=False,
        backend="auto",
        paged_kv_indptr_buffer=None,
        paged_kv_indices_buffer=None,
        paged_kv_last_page_len_buffer=None,
    ) -> None:
        super().__init__(log, float_workspace_buffer, kv_layout)
        assert use_tensor_cores
        assert backend == "fa2"
        self.graph = use_cuda_graph
        self.fixed = (
            paged_kv_indptr_buffer,
            paged_kv_indices_buffer,
            paged_kv_last_page_len_buffer,
        )

    def plan(
        self,
        indptr,
        indices,
        last_page_len,
        num_qo_heads,
        num_kv_heads,
        head_dim,
        page_size,
        *,
        seq_lens,
        disable_split_kv=False,
        fixed_split_size=None,
        **scores,
    ) -> None:
        n = len(last_page_len)
        if self.graph:
            if n != len(self.fixed[2]) or len(indices) > len(self.fixed[1]):
                raise ValueError("the batch size is fixed in cudagraph mode")
            given = (indptr, indices, last_page_len)
            for buffer, new in zip(self.fixed, given, strict=True):
                buffer[: len(new)].copy_(new)
            indptr, indices, last_page_len = self.fixed
        else:
            for given in (indptr, last_page_len):  # a slice of a room, on the device, is waited for
                assert given.untyped_storage().nbytes() == given.nbytes, "the host waits for this"
            indptr, last_page_len = indptr.clone(), last_page_len.clone()  # as copied to a device
        # Automatic splits follow the batch: fewer sequences, more splits.
        split = DECODE_TILE * (UNSPLIT if disable_split_kv else min(n, 8))
        sizes = (num_qo_heads, num_kv_heads, head_dim, page_size)
        self._plan(
            torch.arange(n + 1),
            indptr,
            indices,
            last_page_len,
            seq_lens,
            sizes,
            DECODE_TILE,
            split,
            scores,
            widest=WIDEST,
        )


FAKES = {
    cls.__name__: cls
    for cls in (BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper)
}


@pytest.fixture
def fakes() -> dict[str, type[FakeWrapper]]:
    """The fake's wrappers by name."""
    return FAKES


@pytest.fixture
def log() -> list:
    """Every plan: the wrapper's name and how many sequences."""
    return []


@pytest.fixture
def ours(log, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Our modules, imported afresh over the fake, whose copies end when they are waited for."""
    fake = ModuleType("flashinfer")
    made, freed_early = [], []

    def maker(cls):
        def make(*arguments, **options):
            made.append(cls(log, *arguments, **options))
            made[-1].freed_early = freed_early
            return made[-1]

        return make

    for name, cls in FAKES.items():
        setattr(fake, name, maker(cls))
    monkeypatch.setitem(sys.modules, "flashinfer", fake)
    names = [f"isobit.backends.flashinfer_{name}" for name in OURS]
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    import isobit.backends.flashinfer_attention as attention

    modules = {short: sys.modules[name] for short, name in zip(OURS, names, strict=True)}
    wait = modules["wrappers"].HostCopies.wait

    class Copies(modules["wrappers"].HostCopies):
        def __init__(self, device) -> None:
            super().__init__(device)
            self.own = weakref.ref(made[-1])

        def wait(self) -> None:
            wait(self)
            self.own().copy_under_way = False

    monkeypatch.setattr(modules["wrappers"], "HostCopies", Copies)
    yield SimpleNamespace(
        **modules, backend=attention.FlashInferAttention, made=made, freed_early=freed_early
    )
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def judge(ours) -> Judge:
    """Of the backend over the fake, on a CPU."""
    return Judge(ours.backend)


@pytest.fixture
def geometry() -> Geometry:
    """In fp32, which FlashInfer has not: a rounding to 16 bits would hide most differences."""
    return Geometry(head_dim=64, page_size=16, dtype="float32", engine_writes_kv=True)


@pytest.fixture
def spec():
    (declared,) = isobit_attention_backends()
    return declared
