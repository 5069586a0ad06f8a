"""How large the KV cache becomes: as asked for, by what is useful, or by what is left on a GPU."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError
from ..kernels.kernel_set import KernelSet
from ..models.decoder import Decoder
from ..sampling.params import SamplingParams
from ..sampling.rows import SamplingRow
from ..sampling.sampler import sample
from .config import EngineConfig, parse_memory

_DEFAULT_KV_BYTES = 4 * 2**30
_DEFAULT_KV_SHARE = 0.3


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """A GPU's memory, in bytes.

    total:     of the device
    free:      that nobody has: neither this process nor another
    reserved:  that torch's allocator has taken from the device, in use or not
    weights:   in use before the profiling step
    peak:      in use at the height of the profiling step, weights included
    """

    total: int
    free: int
    reserved: int
    weights: int
    peak: int

    def for_kv(self, utilization: float) -> int:
        """What the KV cache may take: the share of the device, less what everything else needs.

        Everything else: other processes and CUDA itself, and a step at its height.
        """
        others = self.total - self.free - self.reserved
        return int(self.total * utilization) - others - self.peak


def num_pages(
    config: EngineConfig, page: int, max_model_len: int, device_memory: DeviceMemory | None
) -> int:
    """Pages of the KV cache, each of ``page`` bytes over all layers.

    :param device_memory: of the CUDA device that serves; None on the CPU.
    :raises ConfigError: not even one request of ``max_model_len`` fits.
    """
    if config.kv_cache_memory is not None:
        memory = parse_memory(config.kv_cache_memory)
        total = _system("SC_PHYS_PAGES") if device_memory is None else device_memory.total
        if total is not None and memory > total:
            raise ConfigError(
                f"a KV cache of {memory} bytes was asked for, but the machine has {total} bytes of "
                "memory. Lower kv_cache_memory."
            )
        remedy = "Raise kv_cache_memory"
    elif device_memory is not None:
        memory = max(0, device_memory.for_kv(config.gpu_memory_utilization))
        remedy = (
            f"Of {device_memory.total} bytes, gpu_memory_utilization = "
            f"{config.gpu_memory_utilization} may be used, a step at its height takes "
            f"{device_memory.peak} ({device_memory.weights} for the weights), and {memory} are "
            "left. Raise gpu_memory_utilization, lower max_num_batched_tokens"
        )
    else:
        useful = config.max_num_seqs * -(-max_model_len // config.page_size) * page
        available = _system("SC_AVPHYS_PAGES")
        free = _DEFAULT_KV_BYTES if available is None else int(_DEFAULT_KV_SHARE * available)
        memory = min(useful, _DEFAULT_KV_BYTES, free)
        remedy = "Pass a larger kv_cache_memory"
    return _enough(memory // page, page, config.page_size, max_model_len, remedy)


def _enough(pages: int, page: int, page_size: int, max_model_len: int, remedy: str) -> int:
    needed, room = -(-max_model_len // page_size), pages * page_size
    if pages < needed:
        at_most = f" to at most {room}" if room > 1 else ""
        raise ConfigError(
            f"the KV cache holds {pages} pages of {page_size} tokens ({pages * page} bytes), and "
            f"one request of max_model_len = {max_model_len} tokens takes {needed} "
            f"({needed * page} bytes). {remedy}, or lower max_model_len{at_most}."
        )
    return pages


def measure(
    decoder: Decoder, kernels: KernelSet, num_tokens: int, num_seqs: int, device: torch.device
) -> DeviceMemory:
    """Run a step as large as any, and see what it takes of the CUDA device.

    It runs twice: the first time kernels are compiled, which takes memory of its own.
    """
    gc.collect()  # an engine that was closed may still wait for it
    torch.cuda.empty_cache()
    weights = torch.cuda.memory_allocated(device)
    _largest_step(decoder, kernels, num_tokens, num_seqs)
    torch.cuda.reset_peak_memory_stats(device)
    _largest_step(decoder, kernels, num_tokens, num_seqs)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return DeviceMemory(total, free, torch.cuda.memory_reserved(device), weights, peak)


@torch.inference_mode()
def _largest_step(decoder: Decoder, kernels: KernelSet, num_tokens: int, num_seqs: int) -> None:
    """The model over ``num_tokens`` tokens without a KV cache, and sampling for ``num_seqs``.

    What is sampled are zeros: a model that has not seen its attention may give anything.
    """

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.zeros_like(q)

    token_ids = torch.zeros(num_tokens, dtype=torch.int64, device=decoder.embed_tokens.device)
    hidden = decoder.forward(token_ids, token_ids, attend)
    logits = decoder.logits(hidden[:num_seqs]).zero_()
    params = SamplingParams(temperature=0.9, top_p=0.9, repetition_penalty=1.1, seed=0)
    row = SamplingRow(
        params=params,
        seed=0,
        choice=0,
        position=0,
        prompt_token_ids=(0,),
        output_token_ids=(),
        eos_token_ids=(),
    )
    sample(logits, [row] * len(logits), kernels)


def _system(pages: str) -> int | None:
    """Bytes of memory that the system counts under ``pages``; None where it does not say."""
    try:
        return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return None
