"""Workspace sizes against plans worked out by hand from FlashInfer 0.6.14's planner."""

from __future__ import annotations

import torch

from isobit.backends.flashinfer_workspace import Workspace, workspace

QWEN3_8B = Workspace(num_q_heads=32, num_kv_heads=8, head_dim=128, num_sms=132)


def test_tiles() -> None:
    assert [QWEN3_8B.tile(n) for n in (1, 16, 17, 64, 65)] == [16, 16, 64, 64, 128]
    wide = Workspace(num_q_heads=8, num_kv_heads=4, head_dim=256, num_sms=132)
    assert [wide.tile(n) for n in (16, 17, 65)] == [16, 64, 64]


def test_a_split_decode() -> None:
    assert QWEN3_8B.most_split == 264 // 8
    # 33 tiles of 16 packed rows of 32 heads: 128 values and a log-sum-exp each, in fp32
    values, sums = 32 * 33 * 16 * 128 * 4, 32 * 33 * 16 * 4
    assert values + sums <= QWEN3_8B.split_bytes(33, 16) <= values + sums + 32


def test_a_captured_decode_of_many() -> None:
    # 256 sequences of 4 packed rows: ceil(1024 / 16) + 256 - 1 tiles, more than 33
    assert QWEN3_8B.decode_tiles(256) == 319
    assert QWEN3_8B.decode_tiles(1) == 33
    lists = 3 * 4 * 319 + 319 + 2 * 4 * 257 + 4 + 4
    assert lists <= QWEN3_8B.decode_int_bytes(256) <= lists + 300


def test_a_prefill_of_many_rows() -> None:
    # fa3: 8192 rows of one sequence are 64 tiles a head, seven numbers each
    assert QWEN3_8B.prefill_int_bytes(8192, 1) >= 7 * 4 * 64 * 32 + 4 * 133
    # fa2: 64 sequences of 4 rows are 64 tiles of 16 packed rows, of which 33 may be of splits
    assert QWEN3_8B.prefill_int_bytes(256, 64) >= 13 * 64 + 4 * (65 + 257 + 1)
    # one list for all heads above 4096 tiles a head
    many = Workspace(num_q_heads=64, num_kv_heads=64, head_dim=128, num_sms=132)
    assert many.prefill_int_bytes(128 * 5000, 1) < 7 * 4 * 5001 * 64


def test_off_a_gpu_the_sizes_are_those_of_an_h200() -> None:
    assert workspace(32, 8, 128, torch.device("cpu")) == QWEN3_8B
