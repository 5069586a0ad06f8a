"""Finds, loads and types the shared library of C kernels."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache

# torch first: it brings the OpenMP runtime whose thread pool the kernels then share.
import torch

_POINTER = ctypes.c_void_p
_LONG = ctypes.c_int64
_INT = ctypes.c_int

_SIGNATURES: dict[str, tuple[type | None, list[type]]] = {
    "isobit_set_isa": (_INT, [ctypes.c_char_p]),
    "isobit_isa": (ctypes.c_char_p, []),
    "isobit_linear": (None, [_POINTER, _POINTER, _INT, _POINTER, _LONG, _LONG, _LONG, _INT]),
    "isobit_linear_canonical": (
        None,
        [_POINTER, _POINTER, _INT, _POINTER, _LONG, _LONG, _LONG, _LONG],
    ),
    "isobit_rms_norm": (None, [_POINTER, _POINTER, _LONG, _LONG, ctypes.c_float, _INT]),
    "isobit_rope": (None, [_POINTER, _LONG, *[_POINTER] * 3, *[_LONG] * 3, _INT]),
    "isobit_silu_mul": (None, [_POINTER, _POINTER, _LONG, _LONG, _INT]),
    "isobit_log_softmax": (None, [_POINTER, _POINTER, _LONG, _LONG, _INT]),
    "isobit_gumbel": (None, [*[_POINTER] * 4, _LONG, _LONG, _INT]),
    "isobit_paged_attention": (
        _INT,
        [
            *[_POINTER] * 3,
            _INT,
            _LONG,
            _POINTER,
            _LONG,
            _POINTER,
            _POINTER,
            *[_LONG] * 5,
            ctypes.c_float,
            _POINTER,
            _INT,
        ],
    ),
}


@cache
def library() -> ctypes.CDLL:
    """The loaded library, set to the widest instruction set that this CPU has.

    :raises OSError: it was not built, cannot be loaded, or the CPU is too old for it
    """
    spec = importlib.util.find_spec("._isobit", __package__)
    if spec is None or spec.origin is None:
        raise OSError("the C kernels were not built; reinstall isobit where a C compiler is found")
    loaded = ctypes.CDLL(spec.origin)
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype = result
        function.argtypes = arguments
    if loaded.isobit_set_isa(None) != 0:
        raise OSError(
            f"the C kernels need AVX2 and FMA (x86-64) or NEON (aarch64), and this CPU "
            f"({torch.backends.cpu.get_cpu_capability()}) has neither"
        )
    return loaded


@cache
def unavailable_reason() -> str | None:
    """Why ``library()`` fails; None if it does not."""
    try:
        library()
    except (OSError, AttributeError) as error:
        return str(error)
    return None


def active_isa() -> str:
    """The instruction set in use: ``avx512``, ``avx2`` or ``neon``."""
    name: bytes = library().isobit_isa()
    return name.decode()


def set_isa(name: str | None) -> bool:
    """Use the instruction set ``name``, or the widest for None; False if this CPU lacks it.

    The bits are the same for each, which is what the tests use this for.
    """
    return bool(library().isobit_set_isa(name.encode() if name else None) == 0)
