"""The fake has FlashInfer's own signatures; needs ``flashinfer-python``, and no GPU."""

from __future__ import annotations

import inspect

import pytest


@pytest.mark.parametrize("method", ["__init__", "plan", "run", "reset_workspace_buffer"])
@pytest.mark.parametrize(
    "name", ["BatchDecodeWithPagedKVCacheWrapper", "BatchPrefillWithPagedKVCacheWrapper"]
)
def test_the_fake_takes_what_flashinfer_takes(fakes, name, method) -> None:
    flashinfer = pytest.importorskip("flashinfer")
    real = inspect.signature(getattr(getattr(flashinfer, name), method)).parameters
    fake = inspect.signature(getattr(fakes[name], method)).parameters
    ours = [parameter for parameter in fake if parameter not in ("log", "scores")]
    assert set(ours) <= set(real)
    by_place = [p for p in ours if fake[p].kind is not inspect.Parameter.KEYWORD_ONLY]
    assert by_place == list(real)[: len(by_place)]
