"""FlashInfer's wrappers, one a kind of plan, with what their host memory and first use need."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Timer
from typing import Any

import flashinfer
import torch
from torch import Tensor

from ..errors import BackendError, ConfigError
from .base import AttentionConfig, LayerCache
from .flashinfer import INSTALL

_SILENT_SECONDS = 2.0
_NO_FLOATS = 16  # bytes: what never splits uses no float workspace, and the wrapper asks for one


class Wrapper:
    """One wrapper of FlashInfer, planned again and again.

    Planning writes a host buffer and starts a copy of it, which torch does not know of. The buffer
    is written again, or freed with the wrapper, only when that copy is done: freed earlier, the
    next one who asks for pinned memory would write over it.

    :param made: the wrapper, not planned yet
    :param float_workspace: uint8, where the partial results of splits go
    :param int_bytes: size of its int workspace, which grows as plans need it
    """

    def __init__(self, made: Any, float_workspace: Tensor, int_bytes: int) -> None:
        self._made = made
        self._float_workspace = float_workspace
        self._copied = HostCopies(float_workspace.device)
        weakref.finalize(self, _wait_for, self._copied).atexit = False
        self._int_bytes = 0
        self._reserve(int_bytes)

    def plan(self, *arguments: Any, int_bytes: int = 0, **options: Any) -> None:
        """Plan a step.

        :param int_bytes: the int workspace that this plan may need.
        :raises BackendError: FlashInfer refused; with its reason.
        """
        self._copied.wait()
        self._reserve(int_bytes)
        try:
            self._made.plan(*arguments, **options)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            raise BackendError(
                f"flashinfer could not plan the step: {error}. If its workspace is too small, "
                "lower max_num_seqs or cuda_graph_max_bs for decodes, max_num_batched_tokens for "
                "prefills"
            ) from error
        finally:
            self._copied.mark()

    def read_lengths_from(self, indptr: Tensor, last_page_len: Tensor) -> None:
        """Let every launch read ``indptr`` and ``last_page_len`` from these tensors on the device.

        The plan, which got them from the host, made copies for itself. FlashInfer has no call for
        this: the names are those of the one version that is admitted.

        :raises BackendError: it has not.
        """
        given = {"_paged_kv_indptr_buf": indptr, "_paged_kv_last_page_len_buf": last_page_len}
        for name, tensor in given.items():
            if not hasattr(self._made, name):
                raise BackendError(f"flashinfer's decode wrapper has no {name}; {INSTALL}")
            setattr(self._made, name, tensor)

    def run(self, q: Tensor, layer: LayerCache, out: Tensor) -> None:
        """Attend for the planned rows.

        No programmatic launch: such a kernel reads its lengths before it waits for the kernels
        that write them.
        """
        self._made.run(q, (layer.k, layer.v), out=out, enable_pdl=False)

    def _reserve(self, int_bytes: int) -> None:
        if int_bytes > self._int_bytes:
            device = self._float_workspace.device
            room = torch.empty(int_bytes, dtype=torch.uint8, device=device)
            self._made.reset_workspace_buffer(self._float_workspace, room)
            self._int_bytes = int_bytes


class HostCopies:
    """Copies to the device that read host memory; off a CUDA device there are none."""

    def __init__(self, device: torch.device) -> None:
        self._done = _event() if device.type == "cuda" else None

    def mark(self) -> None:
        """All copies so far are those meant."""
        if self._done is not None:
            self._done.record()

    def wait(self) -> None:
        """Wait for the marked copies; at once where none was marked."""
        if self._done is not None:
            self._done.synchronize()


def _wait_for(copies: HostCopies) -> None:
    """On a device that is lost nothing is copied any more."""
    with suppress(RuntimeError):
        copies.wait()


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def float_workspace(num_bytes: int, device: torch.device) -> Tensor:
    """Room for the partial results of splits; hardly any where nothing is split."""
    return torch.empty(max(num_bytes, _NO_FLOATS), dtype=torch.uint8, device=device)


def decode_wrapper(floats: Tensor, int_bytes: int, **buffers: Any) -> Wrapper:
    """Tensor-core decode by the ``fa2`` kernels."""
    made = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        floats, "NHD", use_tensor_cores=True, backend="fa2", **buffers
    )
    return Wrapper(made, floats, int_bytes)


def prefill_wrapper(floats: Tensor, int_bytes: int, backend: str) -> Wrapper:
    """Causal prefill by the kernels ``backend``."""
    made = flashinfer.BatchPrefillWithPagedKVCacheWrapper(floats, "NHD", backend=backend)
    return Wrapper(made, floats, int_bytes)


def windows(config: AttentionConfig) -> list[int]:
    """The layers' windows, each once, as FlashInfer counts them: tokens before the row's own."""
    return sorted({window_left(config, layer) for layer in range(config.num_layers)})


def window_left(config: AttentionConfig, layer: int) -> int:
    """A layer's window without the row's own token; -1 for none."""
    window = config.sliding_window(layer)
    return -1 if window is None else window - 1


def scoring(config: AttentionConfig, window: int) -> dict[str, Any]:
    """What every plan says of the scores."""
    return {
        "sm_scale": config.scale,
        "window_left": window,
        "logits_soft_cap": config.logit_soft_cap,
        "q_data_type": config.dtype,
        "kv_data_type": config.dtype,
    }


@contextmanager
def building() -> Iterator[None]:
    """A line on stderr if the block takes long: FlashInfer builds kernels when they are first used.

    :raises ConfigError: they could not be built or loaded; with what to install.
    """
    line = (
        "flashinfer: building its attention kernels for this model; this takes minutes, once: "
        "FlashInfer keeps them in ~/.cache/flashinfer"
    )
    timer = Timer(_SILENT_SECONDS, print, (line,), {"file": sys.stderr, "flush": True})
    timer.daemon = True
    timer.start()
    try:
        yield
    except (torch.OutOfMemoryError, BackendError):
        raise
    except Exception as error:
        raise ConfigError(
            f"flashinfer's kernels cannot be built or loaded here: {type(error).__name__}: "
            f"{error}. They need nvcc and ninja, of the CUDA that torch was built with "
            f"({torch.version.cuda}). Install both, or the kernels ready made: {INSTALL} "
            f"flashinfer-jit-cache==0.6.14 --extra-index-url {_index()}"
        ) from error
    finally:
        timer.cancel()


def _index() -> str:
    """Where FlashInfer's ready-made kernels for torch's CUDA are."""
    return f"https://flashinfer.ai/whl/cu{(torch.version.cuda or '').replace('.', '')}"
