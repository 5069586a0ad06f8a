"""The ways to compute a linear that ``gpu_decode_step.py`` tries: those in use, and others."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import replace
from typing import Any

import torch
from gpu_decode_model import DEVICE, DTYPE, Model, chosen, overlap
from torch import Tensor
from triton.runtime.errors import OutOfResources

from isobit.kernels.triton.candidates import (
    Candidate,
    CublasLt,
    SwappedCandidate,
    TileCandidate,
    TmaCandidate,
    UnfitError,
    canonical,
)
from isobit.kernels.triton.matmul import CANONICAL, HALF_TILES, SWAPPED_TILES, Tile
from isobit.kernels.triton.matmul_tma import TMA_TILES
from isobit.models.config import ModelConfig

COMPILING_S = 100

_PLAIN = [
    (16, 16, 512, 4, 4),
    (16, 16, 1024, 4, 3),
    (16, 32, 128, 4, 6),
    (16, 32, 512, 4, 4),
    (16, 64, 256, 4, 3),
    (16, 64, 256, 8, 4),
    (32, 32, 512, 4, 3),
    (32, 64, 128, 4, 4),
    (64, 32, 256, 4, 3),
    (64, 64, 128, 4, 4),
    (64, 128, 64, 4, 4),
    (128, 64, 128, 4, 3),
    (128, 128, 64, 4, 4),
    (128, 128, 64, 8, 4),
    (128, 256, 64, 8, 4),
    (256, 64, 64, 8, 4),
    (256, 128, 64, 8, 4),
]
_SWAPPED = [
    (16, 64, 64, 4, 8),
    (16, 64, 256, 4, 3),
    (16, 64, 256, 4, 5),
    (16, 128, 128, 4, 3),
    (16, 128, 64, 8, 5),
    (16, 128, 128, 8, 4),
    (32, 64, 256, 4, 3),
    (32, 128, 64, 4, 5),
    (32, 128, 128, 4, 3),
    (64, 64, 128, 4, 4),
    (64, 128, 128, 4, 3),
    (64, 256, 64, 8, 4),
    (128, 128, 64, 8, 4),
]
_TMA = [
    (16, 16, 512, 4, 4),
    (16, 32, 128, 4, 6),
    (16, 32, 512, 4, 3),
    (32, 32, 256, 4, 4),
    (64, 64, 128, 4, 4),
    (64, 128, 64, 4, 5),
    (64, 256, 64, 4, 4),
    (128, 64, 128, 4, 4),
    (128, 64, 64, 4, 6),
    (128, 128, 128, 8, 3),
    (256, 64, 64, 8, 4),
]
_TMA_SWAPPED = [
    (16, 64, 128, 4, 4),
    (16, 64, 128, 4, 6),
    (16, 64, 512, 4, 3),
    (16, 128, 128, 4, 3),
    (16, 128, 64, 4, 6),
    (16, 128, 128, 8, 5),
    (32, 64, 256, 4, 4),
    (32, 128, 64, 4, 5),
    (64, 64, 128, 4, 4),
    (64, 128, 128, 4, 3),
    (64, 256, 64, 8, 4),
]
_SPECIALISED = [
    (64, 128, 64, 4, 4),
    (128, 128, 64, 4, 4),
    (128, 128, 128, 4, 3),
    (128, 256, 64, 4, 3),
    (256, 128, 64, 4, 3),
]

OLD: list[Candidate] = [
    *(TileCandidate(tile) for tile in (CANONICAL, *HALF_TILES)),
    CublasLt(),
]
NEW: list[Candidate] = [
    *(TileCandidate(Tile(*size)) for size in _PLAIN),
    *(SwappedCandidate(tile) for tile in SWAPPED_TILES),
    *(SwappedCandidate(Tile(*size, swapped=True)) for size in _SWAPPED),
    *(TmaCandidate(tile) for tile in TMA_TILES),
    *(TmaCandidate(Tile(*size)) for size in _TMA),
    *(TmaCandidate(Tile(*size, swapped=True)) for size in _TMA_SWAPPED),
]
SPECIALISED: list[Candidate] = [TmaCandidate(Tile(*size), specialise=True) for size in _SPECIALISED]


def fitting(ways: Sequence[Candidate], rows: int) -> list[Candidate]:
    """Those whose tile is neither far taller nor far lower than ``rows``."""
    low, high = min(rows, 1024) // 8, max(16, rows)
    return [
        way
        for way in ways
        if not isinstance(way, TileCandidate | TmaCandidate) or low <= way.tile.rows <= high
    ]


class Canonical:
    name = "canonical"

    def __call__(self, x: Tensor, weight: Tensor, out_dtype: torch.dtype, bucket: int) -> Tensor:
        return canonical(x, weight, out_dtype)


def compile_way(way: Candidate) -> str | None:
    """In a process of its own: run a way once in each form; why if it cannot be run."""
    x = torch.zeros(16, 1024, dtype=DTYPE, device=DEVICE)
    weight = torch.zeros(256, 1024, dtype=DTYPE, device=DEVICE)
    try:
        for enabled in (True, False):
            with overlap(enabled):
                for out_dtype in (DTYPE, torch.float32):
                    way(x, weight, out_dtype, 16)
        torch.cuda.synchronize()
    except (OutOfResources, UnfitError, RuntimeError) as error:
        return f"{type(error).__name__}: {str(error)[:80]}"
    return None


def compile_step(config: ModelConfig, enabled: bool) -> None:
    """In a process of its own: one layer."""
    model = Model(replace(config, num_layers=1, vocab_size=256), 2, 512)
    columns = {(k.out_features, k.in_features) for ks in model.linears().values() for k in ks}
    with overlap(enabled), chosen({(*size, 2): Canonical() for size in columns}):
        model.step(model.batch(2))()
    torch.cuda.synchronize()


def compiled(ways: Sequence[Candidate], config: ModelConfig) -> list[Candidate]:
    """The ways that run; those that do not come back are given up."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(14, os.cpu_count() or 1), mp_context=context)
    steps = [pool.submit(compile_step, config, enabled) for enabled in (True, False)]
    tried = {pool.submit(compile_way, way): way for way in ways}
    everything: list[Future[Any]] = [*steps, *tried]
    done, hanging = wait(everything, timeout=COMPILING_S)
    for process in list(pool._processes.values()) if hanging else []:
        process.kill()
    pool.shutdown(wait=True, cancel_futures=True)
    sound = []
    for future in everything:
        name = tried[future].name if future in tried else "a step of one layer"
        why = "did not come back"
        if future in done:
            why = repr(future.exception()) if future.exception() else future.result()
        if why:
            print(f"cannot be run: {name}: {why}", flush=True)
        elif future in tried:
            sound.append(tried[future])
    return sound
