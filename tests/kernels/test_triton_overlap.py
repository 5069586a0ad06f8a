"""What lets the kernels of a step overlap: each waits for the one before, and asks for W ahead.

Triton's interpreter runs one program after the other. Here it also writes down in which order each
program waits, loads and stores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs the package triton")

import triton
import triton.language as tl
from triton.runtime import interpreter

from isobit.kernels.kernel_set import QkNorm
from isobit.kernels.triton import (
    activation,
    decode,
    launch,
    matmul,
    matmul_tma,
    norm,
    rope_qk,
)
from isobit.kernels.triton.choices import code_digest
from isobit.kernels.triton.decode import Partials
from isobit.kernels.triton.matmul import AHEAD, CANONICAL, depth_ahead
from isobit.kernels.triton.pdl import overlapping, wait_for_inputs
from isobit.kernels.triton.tiling import Launch, Scoring, Tiling
from isobit.kernels.triton.trials import same_bits

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter")
MODULES = (activation, decode, matmul, matmul_tma, norm, rope_qk)
Event = tuple[str, np.ndarray]


@dataclass
class Diary:
    """``programs``: what each did, a kind and the addresses; ``asked``: addresses of W, ahead."""

    programs: list[list[Event]] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)

    def note(self, kind: str, at: Any = (), mask: Any = True) -> None:
        at = np.asarray(at)
        self.programs[-1].append((kind, at[np.broadcast_to(mask, at.shape)]))

    def faults(self, early: list[Tensor]) -> set[str]:
        """What programs did before they waited, but for loads of ``early``."""
        found = set()
        for events in self.programs:
            kinds = [kind for kind, _ in events]
            waits = "wait" in kinds
            for kind, at in events[: kinds.index("wait")] if waits else events:
                if kind == "store" or not any(inside(at, tensor) for tensor in early):
                    found.add(f"{kind} too early" if waits else "never waits")
        if all(kind != "wait" for events in self.programs for kind, _ in events):
            found.add("never waits")  # not even where there is nothing to do
        return found


def inside(addresses: np.ndarray, tensor: Tensor) -> bool:
    first = tensor.data_ptr()
    return bool((addresses >= first).all() and (addresses < first + tensor.nbytes).all())


@pytest.fixture
def diary(monkeypatch: pytest.MonkeyPatch) -> Diary:
    """What the interpreter did, with the overlap on."""
    kept = Diary()
    builder = interpreter.InterpreterBuilder
    set_grid_idx = builder.set_grid_idx
    load, store = builder.create_masked_load, builder.create_masked_store

    def start_program(self: Any, *index: int) -> None:
        kept.programs.append([])
        set_grid_idx(self, *index)

    def noted_load(self: Any, at: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        kept.note("load", at.data, mask.data)
        return load(self, at, mask, *rest, **options)

    def noted_store(self: Any, at: Any, value: Any, mask: Any, *rest: Any) -> Any:
        kept.note("store", at.data, mask.data)
        return store(self, at, value, mask, *rest)

    def assembly(asm: str, constraints: str, operands: list[Any], *rest: Any) -> None:
        if "griddepcontrol.wait" in asm:
            kept.note("wait")
        if "prefetch" in asm:
            kept.asked += operands[0].handle.data.flatten().tolist()

    monkeypatch.setattr(builder, "set_grid_idx", start_program)
    monkeypatch.setattr(builder, "create_masked_load", noted_load)
    monkeypatch.setattr(builder, "create_masked_store", noted_store)
    monkeypatch.setattr(tl, "inline_asm_elementwise", assembly)
    for module in MODULES:
        monkeypatch.setattr(module, "overlapping", lambda device: {"PDL": True})
    return kept


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def attend(slots: int) -> Tensor:
    """Of four splits the first is walked by one program, each later one by another."""
    kv_len, serial = LENS.item(), 1
    tiling = Tiling(near_split=64, near_end=128, split=128, decode=Launch(16, 4, 1))
    pages = kv_len // 16
    k_cache, v_cache = random(pages, 16, 1, 16), random(pages, 16, 1, 16)
    q, out = random(1, 2, 16), torch.empty(1, 2, 16)
    room = decode.allocate_room(slots, 2, 16, torch.device("cpu"))
    partials = Partials.within(room, 1, slots, 2, 16, serial)
    table = torch.arange(pages, dtype=torch.int32)[None]
    decode.attend_decode(
        q, k_cache, v_cache, 1, LENS, table, Scoring(scale=0.25), tiling, partials, out
    )
    return out


WEIGHT = random(40, 512)
NORM, HEAD_NORM = random(64), QkNorm(random(16), random(16), 1e-6)
LENS = torch.tensor([208], dtype=torch.int32)
SLOTS = torch.tensor([3, 1])
IDS = torch.arange(2)


ANGLES = random(4, 16)


def rope() -> Tensor:
    return torch.cat(rope_qk.rope_qkv(random(2, 64), 2, 1, HEAD_NORM, ANGLES, IDS), 1)


def rope_and_write() -> Tensor:
    k_cache, v_cache = torch.zeros(2, 2, 1, 16), torch.zeros(2, 2, 1, 16)
    q = rope_qk.rope_qkv_write(random(2, 64), 2, 1, HEAD_NORM, ANGLES, IDS, k_cache, v_cache, SLOTS)
    return torch.cat([q, k_cache.flatten(0, 1).view(2, 2, 16), v_cache.view(2, 2, 16)])


OPS: dict[str, Callable[[], Tensor]] = {
    "matmul": lambda: matmul.matmul(random(3, 512), WEIGHT, torch.float32),
    "matmul_tma": lambda: matmul_tma.matmul_tma(random(3, 512), WEIGHT, torch.float32, CANONICAL),
    "rms_norm": lambda: norm.rms_norm(random(2, 64), NORM, 1e-6),
    "add_rms_norm": lambda: torch.cat(
        norm.add_rms_norm(random(2, 64), random(1, 2, 64)[0], NORM, 1e-6)
    ),
    "silu_mul": lambda: activation.silu_mul(random(2, 64)),
    "rope_qkv": rope,
    "rope_qkv_write": rope_and_write,
    "attention": lambda: attend(4),
    "attention, more programs than splits": lambda: attend(9),
}


@pytest.mark.parametrize("op", OPS)
def test_every_program_waits_before_it_reads_or_writes(op: str, diary: Diary) -> None:
    overlapped = OPS[op]()
    assert diary.programs
    assert not diary.faults([NORM, SLOTS, LENS, IDS, ANGLES])
    with pytest.MonkeyPatch.context() as off:
        for module in MODULES:
            off.setattr(module, "overlapping", overlapping)
        assert same_bits(overlapped, OPS[op]())


@triton.jit
def _hasty(x, out, PDL: tl.constexpr):
    value = tl.load(x)
    wait_for_inputs(PDL)
    tl.store(out, value)


@triton.jit
def _rash(x, out, PDL: tl.constexpr):
    tl.store(out, 0.0)
    wait_for_inputs(PDL)


@triton.jit
def _careless(x, out):
    tl.store(out, tl.load(x))


def test_a_kernel_that_does_not_wait_is_caught(diary: Diary) -> None:
    x, out = random(1), random(1)
    _hasty[(1,)](x, out, PDL=True)
    assert diary.faults([]) == {"load too early"}
    assert not diary.faults([x])
    diary.programs.clear()
    _rash[(1,)](x, out, PDL=True)
    assert diary.faults([]) == {"store too early"}
    diary.programs.clear()
    _careless[(1,)](x, out)
    assert diary.faults([]) == {"never waits"}


@pytest.mark.parametrize("product", [matmul.matmul, matmul_tma.matmul_tma])
def test_what_is_asked_for_ahead_is_the_start_of_each_row(
    product: Callable[..., Tensor], diary: Diary
) -> None:
    weight = random(40, 1100)
    product(random(20, 1100), weight, torch.float32, CANONICAL)  # two tiles of rows
    ahead = depth_ahead(weight, CANONICAL.columns)
    assert ahead == 1024
    at = (np.array(diary.asked) - weight.data_ptr()) // 4
    expected = [n * 1100 + k for n in range(40) for k in range(0, ahead, 64)]
    assert sorted(set(at.tolist())) == expected
    assert len(at) == 64 * ahead // 64  # once a tile of columns; the last row again past the end
    assert inside(np.array(diary.asked) + 255, weight)


def test_how_much_is_asked_for_ahead() -> None:
    large = torch.empty(24576, 4096, dtype=torch.bfloat16, device="meta")
    assert depth_ahead(large, 32) == 1024
    assert AHEAD == 256 * 32 * 1024 * 2
    assert depth_ahead(large[:512], 32) == 4096
    assert depth_ahead(torch.empty(64, 500, dtype=torch.bfloat16), 32) == 0
    assert depth_ahead(torch.empty(64, 4100, dtype=torch.bfloat16), 32) == 0  # no aligned rows


def test_without_a_gpu_nothing_overlaps(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(launch, "OVERLAP", True)
    assert overlapping(cpu) == {"PDL": False}
    monkeypatch.setattr(launch, "hopper", lambda device: True)
    assert overlapping(cpu) == {"PDL": True, "launch_pdl": True}
    before = code_digest()
    monkeypatch.setattr(launch, "OVERLAP", False)
    assert overlapping(cpu) == {"PDL": False}
    assert code_digest() != before  # other times, so other choices
