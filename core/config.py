"""The engine's options, checked on their own; what depends on the model is checked at start-up."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Literal

from ..errors import ConfigError
from ..sampling.strict import refuse_unknown

Toggle = bool | Literal["auto"]

DEVICES = ("cpu", "cuda")
"""Device types that the engine runs on."""

_LAUNCH_BOUND = 4 * 2**30  # bytes of weights below which launching a short prefill sets its time
_MEMORY_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@refuse_unknown
@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything ``LLM`` accepts.

    :param model: ``"smollm2"`` (the packaged model), a Hugging Face folder, or, with
        ``load_format="random"``, the name of a built-in shape.
    :param attention_backend: a backend's name; ``"auto"``: the first that holds what is asked; or
        ``"prefill=NAME,decode=NAME"``: one for each phase, judged by what both declare.
    :param deterministic: hold every invariance. ``False`` lifts the constraints: kernels and
        backends may choose their reduction order by the batch.
    :param dtype: ``"float32"``, ``"bfloat16"`` or ``"auto"``: the checkpoint's where the backend
        offers it, else float32.
    :param device: ``"cpu"``, ``"cuda"`` (torch's current one), or ``"auto"``: CUDA where there is a
        device.
    :param sampling_seed: the seed of requests that bring none.
    :param max_num_seqs: requests in one step at most.
    :param max_num_batched_tokens: tokens in one step at most (the chunked-prefill budget); ``None``
        takes 8192 on CUDA and 2048 on the CPU.
    :param max_model_len: prompt plus output at most; ``None`` takes the model's own limit.
    :param page_size: tokens in a KV page, 1 to 256.
    :param kv_cache_memory: bytes for the KV cache, or a string such as ``"2GiB"``; ``None`` takes
        on the CPU what ``max_num_seqs`` requests of full length need, at most 4 GiB and 30% of free
        memory, and on CUDA what ``gpu_memory_utilization`` leaves.
    :param gpu_memory_utilization: share of the GPU's memory that may be used, above 0 and at most
        1: weights, a step at its height, other processes; the KV cache takes what is left of it.
        Captured graphs come out of the rest.
    :param chunked_prefill: compute long prompts in several steps, mixed with decoding.
    :param radix_cache: reuse prefixes of earlier requests.
    :param cuda_graph: capture decode steps as CUDA graphs at start-up, and replay them.
    :param async_scheduling: launch each step before the results of the last are known; a request's
        end is then found one step late, and the row too many is dropped. ``"auto"``: on CUDA.
    :param cuda_graph_max_bs: largest number of requests in a captured step; larger ones run as
        they do without graphs.
    :param cuda_graph_max_tokens: largest step with a prefill, in tokens, that is replayed from
        captured pieces between its attention calls; 0 turns that off. ``None`` takes 512 for a
        model whose weights are below 4 GiB and 0 for a larger one, whose steps keep the device busy
        for longer than the host takes to launch them.
    :param load_format: ``"auto"`` (safetensors) or ``"random"`` (from a config alone).
    :param load_seed: seed of random weights.
    :param kernels: ``"native"`` (CPU), ``"triton"`` (CUDA), ``"torch"``, ``"auto"``; or
        ``"library"``, torch's own default kernels (on CUDA its products alone, among Triton's
        other kernels), which hold no contract and need
        ``deterministic=False``.
    :param disable_plugins: entry-point names that are not loaded.
    :param strict_plugins: any broken plugin is an error, also one that nobody asked for.
    :raises ConfigError: an option out of its range.
    """

    model: str
    attention_backend: str = "auto"
    deterministic: bool = True
    dtype: str = "auto"
    device: str = "auto"
    sampling_seed: int = 42
    max_num_seqs: int = 256
    max_num_batched_tokens: int | None = None
    max_model_len: int | None = None
    page_size: int = 16
    kv_cache_memory: int | str | None = None
    gpu_memory_utilization: float = 0.9
    chunked_prefill: Toggle = "auto"
    radix_cache: Toggle = "auto"
    cuda_graph: Toggle = "auto"
    async_scheduling: Toggle = "auto"
    cuda_graph_max_bs: int = 256
    cuda_graph_max_tokens: int | None = None
    load_format: str = "auto"
    load_seed: int = 0
    kernels: str = "auto"
    disable_plugins: tuple[str, ...] = ()
    strict_plugins: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.model, os.PathLike):
            object.__setattr__(self, "model", os.fspath(self.model))
        for name in ("model", "attention_backend"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise ConfigError(f"{name} was {value!r}; wanted a string. Pass a name or a path.")
        for name in ("deterministic", "strict_plugins"):
            _one_of(name, getattr(self, name), (True, False))
        _one_of("dtype", self.dtype, ("auto", "float32", "bfloat16", "float16"))
        _one_of("device", self.device, ("auto", *DEVICES))
        _one_of("load_format", self.load_format, ("auto", "random"))
        _one_of("kernels", self.kernels, ("auto", "native", "torch", "triton", "library"))
        for name in ("chunked_prefill", "radix_cache", "cuda_graph", "async_scheduling"):
            _one_of(name, getattr(self, name), (True, False, "auto"))
        for name, low, high in (
            ("max_num_seqs", 1, 2**16),
            ("page_size", 1, 256),
            ("cuda_graph_max_bs", 1, 2**16),
            ("sampling_seed", -(2**63), 2**63 - 1),
            ("load_seed", -(2**63), 2**63 - 1),
        ):
            _in_range(name, getattr(self, name), low, high)
        if self.max_num_batched_tokens is not None:
            _in_range("max_num_batched_tokens", self.max_num_batched_tokens, 1, 2**20)
        if self.cuda_graph_max_tokens is not None:
            _in_range("cuda_graph_max_tokens", self.cuda_graph_max_tokens, 0, 2**20)
        if self.max_model_len is not None:
            _in_range("max_model_len", self.max_model_len, 2, 2**24)
        if self.kv_cache_memory is not None:
            parse_memory(self.kv_cache_memory)
        share = self.gpu_memory_utilization
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ConfigError(
                f"gpu_memory_utilization was {share!r}; wanted a number above 0 and at most 1."
            )
        if self.kernels == "library" and self.deterministic:
            raise ConfigError(
                "kernels='library' was asked for together with deterministic=True, but torch's "
                "default kernels keep no contract. Pass deterministic=False, or kernels='auto'."
            )

    def token_budget(self, device: str) -> int:
        """``max_num_batched_tokens`` on a type of device."""
        if self.max_num_batched_tokens is not None:
            return self.max_num_batched_tokens
        return 8192 if device == "cuda" else 2048

    def graph_tokens(self, device: str, weight_bytes: int) -> int:
        """``cuda_graph_max_tokens`` on a type of device, for a model of so many bytes."""
        most = self.cuda_graph_max_tokens
        if most is None:
            most = 512 if weight_bytes < _LAUNCH_BOUND else 0
        return min(most, self.token_budget(device))

    def steps_ahead(self, device: str) -> int:
        """How many steps may be under way when the next one is scheduled."""
        chosen = self.async_scheduling
        return int(device == "cuda" if chosen == "auto" else chosen)


def parse_memory(value: int | str) -> int:
    """Bytes of ``1073741824``, ``"1GiB"``, ``"512 MB"`` (units are powers of 1024).

    :raises ConfigError: not a positive amount of memory.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", value, re.IGNORECASE)
        if match and float(match[1]) > 0:
            return int(float(match[1]) * _MEMORY_UNITS[match[2].upper()])
    raise ConfigError(
        f"kv_cache_memory was {value!r}; wanted a positive number of bytes or a string such as "
        "'2GiB'. Leave it out to have it chosen."
    )


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if not any(value is a or (isinstance(value, str) and value == a) for a in allowed):
        wanted = ", ".join(repr(a) for a in allowed)
        raise ConfigError(f"{name} was {value!r}; wanted one of {wanted}.")


def _in_range(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} was {value!r}; wanted a whole number from {low} to {high}.")
