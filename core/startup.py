"""From options to an engine: every choice made here is checked, and said in the report."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..backends.base import AttentionBackend, AttentionConfig
from ..backends.matrix import Selection, load_factory
from ..cache.kv import allocate_layers, bytes_per_page
from ..cache.pages import PagePool
from ..cache.radix import RadixCache
from ..cache.reuse import reuse_policy
from ..errors import BackendError, ConfigError
from ..models.config import ModelConfig
from ..models.loader import load_weights
from ..models.registry import load_model_config, load_tokenizer
from ..models.weights import random_weights, random_weights_digest, weights_digest
from ..plugins.manager import PluginHost
from .backend_choice import choose_backend
from .config import EngineConfig
from .devices import current_device, resolve_device
from .engine import Engine
from .graphs import DecodeGraphs, graph_sizes
from .kernel_choice import KernelChoice, check_attention_backend, choose_kernels
from .memory import DeviceMemory, measure, num_pages
from .phases import GRAPHS, KERNELS, KV_CACHE, STEP, WEIGHTS, Phases
from .pieces import PiecewiseGraphs, piece_sizes
from .report import (
    StartupReport,
    device_rows,
    fingerprint_of,
    fingerprint_parts,
    graphs_row,
    library_parts,
    library_rows,
    phases_row,
    pieces_row,
    promise,
    report_rows,
    steps_row,
)
from .runner import LOGITS_ROWS, Runner
from .scheduler import Scheduler, SchedulerConfig


def start_engine(config: EngineConfig, host: PluginHost) -> tuple[Engine, StartupReport]:
    """Build an engine that holds what ``config`` asks for.

    :raises ConfigError: the request cannot be held; the message has every reason.
    :raises SelfCheckError: no kernels keep their contract on this machine, or the attention backend
        does not keep its declaration.
    """
    device = resolve_device(config.device)
    with current_device(device):
        return _start(config, host, device)


def _start(
    config: EngineConfig, host: PluginHost, device: torch.device
) -> tuple[Engine, StartupReport]:
    phases = Phases(device)
    folder, model = load_model_config(config.model, random=config.load_format == "random")
    selection, dtype = choose_backend(config, model, host, device)
    max_model_len = _max_model_len(config, model)
    tokenizer = load_tokenizer(folder) if folder else None
    with phases.timed(WEIGHTS):
        weights, digest = _weights(config, folder, model, dtype, device)
    with phases.timed(KERNELS):
        choice = choose_kernels(config, model, weights, dtype, max_model_len, device)
        linears = choice.decoder.linears()
        head = linears.pop("lm_head")
        most = config.token_budget(device.type), max(config.max_num_seqs, LOGITS_ROWS)
        choice.kernels.prepare(linears.values(), head, *most)
    weight_bytes = sum(weight.nbytes for weight in weights.values())
    del weights  # what the decoder does not use is free again
    with phases.timed(KV_CACHE):
        name = choice.kernels.name
        backend = _backend(config, selection, model, dtype, max_model_len, name, device)
        attention_digest = check_attention_backend(config, selection, backend)
    with phases.timed(STEP):
        memory = _measured(config, choice, device)
    with phases.timed(KV_CACHE):
        pages = num_pages(config, bytes_per_page(backend), max_model_len, memory)
        layers = allocate_layers(backend, pages)
    runner = Runner(
        choice.decoder,
        backend,
        layers,
        choice.kernels,
        config.sampling_seed,
        model.eos_token_ids,
        selection.spec.name,
        selection.spec.capabilities.engine_writes_kv,
    )
    if selection.features["cuda_graph"].value:
        with phases.timed(GRAPHS):
            _capture(config, runner, config.graph_tokens(device.type, weight_bytes))
    scheduler = _scheduler(config, selection, pages, max_model_len, device.type)
    parts = fingerprint_parts(config, model, digest, dtype, selection, choice, device)
    parts |= library_parts(backend.library(), attention_digest)
    fingerprint = fingerprint_of(parts)
    rows = report_rows(config, model, dtype, selection, choice, pages, max_model_len, host)
    rows += library_rows(backend.library(), attention_digest)
    rows[1:1] = device_rows(config, device, memory, pages * bytes_per_page(backend))
    rows.append(steps_row(config, device))
    if runner.graphs is not None:
        rows.append(graphs_row(runner.graphs))
    if runner.pieces is not None:
        rows.append(pieces_row(runner.pieces))
    seconds = phases.seconds()
    rows += [phases_row(seconds), ("fingerprint", fingerprint, promise(config))]
    report = StartupReport(tuple(rows), fingerprint, parts, seconds)
    return Engine(runner, scheduler, tokenizer, fingerprint), report


def _weights(
    config: EngineConfig,
    folder: Path | None,
    model: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[dict[str, Tensor], str]:
    """The weights on the device, and their digest.

    Those of a checkpoint are digested before they are copied. Random ones on CUDA are drawn there,
    and their digest is of what determines them.
    """
    if folder is None or config.load_format == "random":
        weights = random_weights(model, config.load_seed, dtype, device)
        if device.type == "cuda":
            return weights, random_weights_digest(model, config.load_seed, dtype, device)
        return weights, weights_digest(weights)
    weights = load_weights(folder, model, dtype)
    digest = weights_digest(weights)
    for name in weights:
        weights[name] = weights[name].to(device)
    return weights, digest


def _measured(
    config: EngineConfig, choice: KernelChoice, device: torch.device
) -> DeviceMemory | None:
    """A GPU's memory, with the weights on it; None on the CPU."""
    if device.type != "cuda":
        return None
    tokens, seqs = config.token_budget(device.type), config.max_num_seqs
    return measure(choice.decoder, choice.kernels, tokens, seqs, device)


def _max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    limit = model.max_position_embeddings
    if config.max_model_len is None:
        return limit
    if config.max_model_len > limit:
        raise ConfigError(
            f"max_model_len was {config.max_model_len}, but the model's positions end at {limit}. "
            f"Pass at most {limit}, or leave it out."
        )
    return config.max_model_len


def _backend(
    config: EngineConfig,
    selection: Selection,
    model: ModelConfig,
    dtype: torch.dtype,
    max_model_len: int,
    kernels: str,
    device: torch.device,
) -> AttentionBackend:
    factory = load_factory(selection.spec)
    attention = AttentionConfig(
        num_layers=model.num_layers,
        num_q_heads=model.num_q_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        scale=model.head_dim**-0.5,
        page_size=config.page_size,
        dtype=dtype,
        device=device,
        max_model_len=max_model_len,
        sliding_windows=(model.sliding_window,) * model.num_layers if model.sliding_window else (),
        logit_soft_cap=model.logit_soft_cap,
        deterministic=config.deterministic,
        kernels=kernels,
    )
    try:
        return factory(attention)
    except (ConfigError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ConfigError(
            f"attention backend {selection.spec.name!r} of {selection.distribution} "
            f"{selection.version} raised {type(error).__name__} when it was made: {error}. Report "
            "it to its author, or pass another attention_backend."
        ) from error


def _capture(config: EngineConfig, runner: Runner, max_tokens: int) -> None:
    """Decode steps, and the pieces of steps with a prefill of up to ``max_tokens`` tokens.

    No attention is in the pieces: what cannot be captured there is the model.
    """
    sizes = graph_sizes(min(config.max_num_seqs, config.cuda_graph_max_bs))
    hidden_size = runner.decoder.config.hidden_size
    try:
        runner.graphs = DecodeGraphs(runner.backend, runner.compute, sizes, hidden_size)
    except BackendError as error:
        raise ConfigError(
            f"CUDA graphs of attention backend {runner.backend_name!r} cannot be made: "
            f"{_sentence(error)} Pass cuda_graph=False, or another attention_backend."
        ) from error
    if not max_tokens:
        return
    try:
        sizes = piece_sizes(max_tokens)
        runner.pieces = PiecewiseGraphs(runner.backend.config, runner.model, sizes)
    except BackendError as error:
        raise ConfigError(
            f"model {config.model!r} cannot be captured in pieces between its attention calls: "
            f"{_sentence(error)} Pass cuda_graph_max_tokens=0, or cuda_graph=False."
        ) from error


def _sentence(error: Exception) -> str:
    return f"{str(error).rstrip('.')}."


def _scheduler(
    config: EngineConfig, selection: Selection, num_pages: int, max_model_len: int, device: str
) -> Scheduler:
    capabilities = selection.spec.capabilities
    pool = PagePool(num_pages, config.page_size)
    radix = selection.features["radix_cache"].value
    policy = reuse_policy(
        deterministic=config.deterministic,
        chunk_invariant=capabilities.chunk_invariant,
        alignment=capabilities.alignment,
        decode_equals_prefill=capabilities.decode_equals_prefill,
    )
    return Scheduler(
        SchedulerConfig(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.token_budget(device),
            max_model_len=max_model_len,
            chunked_prefill=selection.features["chunked_prefill"].value,
            alignment=capabilities.alignment if config.deterministic else 1,
            decode_equals_prefill=capabilities.decode_equals_prefill or not config.deterministic,
            steps_ahead=config.steps_ahead(device),
        ),
        pool,
        RadixCache(pool, policy) if radix else None,
    )
