"""Which providers there are, and which of them can run here."""

from __future__ import annotations

import torch

from ..errors import ConfigError
from . import activation, attention, library_defaults, linear, logits, norm, philox, rope
from .kernel_set import KernelSet
from .native import library

PROVIDERS = ("native", "torch")
"""Those that keep the contracts, in the order of preference."""

UNCONSTRAINED = "library"
"""torch's own defaults, which keep none; never taken unless asked for by name."""

_NATIVE = KernelSet(
    name="native",
    linear=linear.NativeLinear,
    rms_norm=norm.rms_norm_native,
    add_rms_norm=norm.add_rms_norm_native,
    rope=rope.rope_native,
    silu_mul=activation.silu_mul_native,
    log_softmax=logits.log_softmax_native,
    gumbel=philox.gumbel_native,
    write_kv=attention.write_kv,
    paged_attention=attention.paged_attention_native,
)

_TORCH = KernelSet(
    name="torch",
    linear=linear.TorchLinear,
    rms_norm=norm.rms_norm_torch,
    add_rms_norm=norm.add_rms_norm_torch,
    rope=rope.rope_torch,
    silu_mul=activation.silu_mul_torch,
    log_softmax=logits.log_softmax_torch,
    gumbel=philox.gumbel_torch,
    write_kv=attention.write_kv,
    paged_attention=attention.paged_attention_torch,
)

_LIBRARY = KernelSet(
    name=UNCONSTRAINED,
    linear=library_defaults.LibraryLinear,
    rms_norm=library_defaults.rms_norm_library,
    add_rms_norm=library_defaults.add_rms_norm_library,
    rope=rope.rope_torch,
    silu_mul=library_defaults.silu_mul_library,
    log_softmax=library_defaults.log_softmax_library,
    gumbel=philox.gumbel_torch,
    write_kv=attention.write_kv,
    paged_attention=library_defaults.paged_attention_library,
)

_SETS = {kernels.name: kernels for kernels in (_NATIVE, _TORCH, _LIBRARY)}


def load_kernels(name: str = "auto", device: torch.device | None = None) -> KernelSet:
    """The provider ``name`` ("native", "torch", "library"), or for "auto" the first of
    ``PROVIDERS`` that can run.

    :param device: where the tensors live; the CPU if None
    :raises ConfigError: an unknown provider, or one that cannot run here
    """
    on_cpu = device is None or device.type == "cpu"
    if name == "auto":
        return _NATIVE if on_cpu and unavailable_reason("native") is None else _TORCH
    reason = unavailable_reason(name)
    if reason is None and name == "native" and not on_cpu:
        reason = f"it runs on the CPU only, and the device is {device}"
    if reason is not None:
        raise ConfigError(
            f"kernels={name!r} cannot be used: {reason}. Use kernels='auto' to take the best that "
            f"can run here."
        )
    return _SETS[name]


def unavailable_reason(name: str) -> str | None:
    """Why the provider ``name`` cannot run on this machine's CPU; None if it can."""
    if name not in _SETS:
        return f"unknown provider; there are {', '.join(map(repr, _SETS))} and 'auto'"
    return library.unavailable_reason() if name == "native" else None
