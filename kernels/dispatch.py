"""Which providers there are, and which of them can run here."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch

from ..errors import ConfigError
from . import activation, attention, library_defaults, linear, logits, norm, philox, rope
from .kernel_set import KernelSet
from .native import library
from .triton import launch

PROVIDERS = ("native", "torch")
"""Those that keep the contracts, in the order of preference."""

UNCONSTRAINED = "library"
"""torch's own defaults, which keep none; never taken unless asked for by name. On CUDA they are
its products alone, among the row-wise kernels of "triton": the fastest mix that there is."""

_ROPE_NATIVE = rope.split_norm_rope(norm.rms_norm_native, rope.rope_native)
_ROPE_TORCH = rope.split_norm_rope(norm.rms_norm_torch, rope.rope_torch)
_ROPE_LIBRARY = rope.split_norm_rope(library_defaults.rms_norm_library, rope.rope_torch)

_NATIVE = KernelSet(
    name="native",
    linear=linear.NativeLinear,
    rms_norm=norm.rms_norm_native,
    add_rms_norm=norm.add_rms_norm_native,
    rope=rope.rope_native,
    rope_qkv=_ROPE_NATIVE,
    rope_qkv_write=rope.rope_then_write(_ROPE_NATIVE),
    silu_mul=activation.silu_mul_native,
    log_softmax=logits.log_softmax_native,
    log_normalisers=None,
    gumbel=philox.gumbel_native,
    choose=None,
    paged_attention=attention.paged_attention_native,
)

_TORCH = KernelSet(
    name="torch",
    linear=linear.TorchLinear,
    rms_norm=norm.rms_norm_torch,
    add_rms_norm=norm.add_rms_norm_torch,
    rope=rope.rope_torch,
    rope_qkv=_ROPE_TORCH,
    rope_qkv_write=rope.rope_then_write(_ROPE_TORCH),
    silu_mul=activation.silu_mul_torch,
    log_softmax=logits.log_softmax_torch,
    log_normalisers=None,
    gumbel=philox.gumbel_torch,
    choose=None,
    paged_attention=attention.paged_attention_torch,
)

_LIBRARY = KernelSet(
    name=UNCONSTRAINED,
    linear=library_defaults.LibraryLinear,
    rms_norm=library_defaults.rms_norm_library,
    add_rms_norm=library_defaults.add_rms_norm_library,
    rope=rope.rope_torch,
    rope_qkv=_ROPE_LIBRARY,
    rope_qkv_write=rope.rope_then_write(_ROPE_LIBRARY),
    silu_mul=library_defaults.silu_mul_library,
    log_softmax=library_defaults.log_softmax_library,
    log_normalisers=None,
    gumbel=philox.gumbel_torch,
    choose=None,
    paged_attention=library_defaults.paged_attention_library,
)

_SETS = {kernels.name: kernels for kernels in (_NATIVE, _TORCH, _LIBRARY)}


@functools.cache
def _triton() -> KernelSet:
    """Made when it is first asked for: its modules import Triton."""
    from .triton import activation as activation_
    from .triton import choose, linear, logits, norm, philox, rope_qk

    return KernelSet(
        name="triton",
        linear=linear.TritonLinear,
        rms_norm=norm.rms_norm,
        add_rms_norm=norm.add_rms_norm,
        rope=rope_qk.rope,
        rope_qkv=rope_qk.rope_qkv,
        rope_qkv_write=rope_qk.rope_qkv_write,
        silu_mul=activation_.silu_mul,
        log_softmax=logits.log_softmax,
        log_normalisers=logits.log_normalisers,
        gumbel=philox.gumbel,
        choose=choose.choose,
        paged_attention=attention.paged_attention_torch,
        prepare=linear.prepare,
        demoted=linear.demoted,
    )


@functools.cache
def _library_on_cuda() -> KernelSet:
    return replace(
        _triton(),
        name=UNCONSTRAINED,
        linear=library_defaults.LibraryLinear,
        prepare=_LIBRARY.prepare,
        demoted=_LIBRARY.demoted,
    )


def load_kernels(name: str = "auto", device: torch.device | None = None) -> KernelSet:
    """The provider ``name`` ("native", "torch", "triton", "library"), or for "auto" the first that
    can run: of ``PROVIDERS`` on the CPU, of "triton" and "torch" on a CUDA device.

    :param device: where the tensors live; the CPU if None
    :raises ConfigError: an unknown provider, or one that cannot run here
    """
    device = device or torch.device("cpu")
    if name == "auto":
        preferred = {"cpu": PROVIDERS, "cuda": ("triton", "torch")}.get(device.type, ("torch",))
        name = next(p for p in preferred if unavailable_reason(p, device) is None)
    reason = unavailable_reason(name, device)
    if reason is not None:
        raise ConfigError(
            f"kernels={name!r} cannot be used: {reason}. Use kernels='auto' to take the best that "
            f"can run here."
        )
    if name == UNCONSTRAINED and device.type == "cuda" and not launch.unavailable_reason(device):
        return _library_on_cuda()
    return _triton() if name == "triton" else _SETS[name]


def unavailable_reason(name: str, device: torch.device | None = None) -> str | None:
    """Why the provider ``name`` cannot run on ``device``, the CPU if None; None if it can."""
    device = device or torch.device("cpu")
    if name == "triton":
        return launch.unavailable_reason(device)
    if name not in _SETS:
        known = ", ".join(map(repr, (*_SETS, "triton")))
        return f"unknown provider; there are {known} and 'auto'"
    if name == "native" and device.type != "cpu":
        return f"it runs on the CPU only, and the device is {device}"
    return library.unavailable_reason() if name == "native" else None
