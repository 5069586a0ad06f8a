"""Options that several verbs share, and how errors reach the terminal."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from ..errors import IsobitError

F = TypeVar("F", bound=Callable[..., Any])

_PLAIN = (
    "model",
    "attention_backend",
    "deterministic",
    "dtype",
    "device",
    "kernels",
    "load_format",
    "sampling_seed",
    "max_num_seqs",
    "max_num_batched_tokens",
    "max_model_len",
    "page_size",
    "kv_cache_memory",
    "gpu_memory_utilization",
    "cuda_graph_max_bs",
    "cuda_graph_max_tokens",
    "disable_plugins",
    "strict_plugins",
)
_TOGGLES = ("chunked_prefill", "radix_cache", "cuda_graph", "async_scheduling")


def toggle(name: str, meaning: str) -> Callable[[F], F]:
    """``--name / --no-name``, left to the engine where neither is given."""
    flag = name.replace("_", "-")
    return click.option(f"--{flag}/--no-{flag}", name, default=None, help=meaning)


def engine_options(function: F) -> F:
    """The options that build an engine, gathered by ``engine_kwargs``."""
    decorators = [
        click.option(
            "--model",
            "--model-config",
            "model",
            default="smollm2",
            show_default=True,
            help="smollm2, a Hugging Face folder, or a built-in shape with random weights.",
        ),
        click.option(
            "--attention-backend",
            default="auto",
            show_default=True,
            help="A backend's name, auto, or prefill=NAME,decode=NAME; see isobit backends.",
        ),
        click.option(
            "--enable-deterministic-inference/--no-deterministic-inference",
            "deterministic",
            default=True,
            show_default=True,
            help="Hold every invariance, or lift the constraints.",
        ),
        click.option("--dtype", default="auto", show_default=True, help="float32 or bfloat16."),
        click.option("--device", default="auto", show_default=True, help="cpu, cuda or auto."),
        click.option(
            "--kernels", default="auto", show_default=True, help="native, torch or triton."
        ),
        click.option(
            "--load-format",
            default="auto",
            show_default=True,
            help="auto, or random for weights from a config alone.",
        ),
        click.option("--sampling-seed", type=int, default=42, show_default=True),
        click.option("--max-num-seqs", type=int, default=256, show_default=True),
        click.option(
            "--max-num-batched-tokens",
            type=int,
            default=None,
            help="Default: 8192 on CUDA, 2048 on the CPU.",
        ),
        click.option("--max-model-len", type=int, default=None, help="Default: the model's."),
        click.option("--page-size", type=int, default=16, show_default=True),
        click.option("--kv-cache-memory", default=None, help="Such as 2GiB. Default: chosen."),
        click.option(
            "--gpu-memory-utilization",
            type=click.FloatRange(0, 1, min_open=True),
            default=0.9,
            show_default=True,
            help="Share of a GPU's memory to use.",
        ),
        toggle("chunked_prefill", "Compute long prompts in several steps."),
        toggle("radix_cache", "Reuse prefixes of earlier requests."),
        toggle("cuda_graph", "Capture and replay CUDA graphs."),
        toggle("async_scheduling", "Launch a step before the last one's results are known."),
        click.option(
            "--cuda-graph-max-bs",
            type=int,
            default=256,
            show_default=True,
            help="Largest captured step, in requests.",
        ),
        click.option(
            "--cuda-graph-max-tokens",
            type=int,
            default=None,
            help="Largest step with a prefill that is replayed in pieces. Default: by the model.",
        ),
        click.option("--threads", type=int, default=None, help="CPU threads. Default: torch's."),
        plugin_options,
    ]
    return _decorated(function, decorators)


def plugin_options(function: F) -> F:
    """Which plugins are loaded: ``disable_plugins`` and ``strict_plugins``."""
    decorators = [
        click.option(
            "--no-plugin", "disable_plugins", multiple=True, help="Do not load this plugin."
        ),
        click.option("--strict-plugins", is_flag=True, help="Any broken plugin is an error."),
    ]
    return _decorated(function, decorators)


def sampling_options(function: F) -> F:
    """How answers are sampled: each is a field of ``SamplingParams``."""
    decorators = [
        click.option(
            "--max-tokens", type=int, default=128, show_default=True, help="Tokens out at most."
        ),
        click.option(
            "--temperature", type=float, default=0.0, show_default=True, help="0 is greedy."
        ),
        click.option("--top-p", type=float, default=1.0, show_default=True),
        click.option("--top-k", type=int, default=-1, show_default=True, help="-1 keeps all."),
        click.option("--min-p", type=float, default=0.0, show_default=True),
        click.option("--seed", type=int, default=None, help="Default: the sampling seed."),
        click.option("--stop", multiple=True, help="A string that ends the output; repeatable."),
    ]
    return _decorated(function, decorators)


def _decorated(function: F, decorators: Sequence[Callable[[F], F]]) -> F:
    """The function with options in the order of the list."""
    for decorate in reversed(decorators):
        function = decorate(function)
    return function


def engine_kwargs(options: dict[str, Any]) -> dict[str, Any]:
    """Take the engine's options out of a command's, as keyword arguments of ``LLM``."""
    kwargs = {name: options.pop(name) for name in _PLAIN}
    for name in _TOGGLES:
        value = options.pop(name)
        kwargs[name] = "auto" if value is None else value
    return kwargs


def set_threads(count: int | None) -> None:
    """Use ``count`` CPU threads; None leaves torch's own choice."""
    import torch

    if count is None:
        return
    if count < 1:
        raise click.UsageError(f"--threads was {count}; wanted at least 1.")
    torch.set_num_threads(count)


def user_errors(function: F) -> F:
    """Turn Isobit's own errors into usage errors: the message alone, exit status 2."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except IsobitError as error:
            raise click.UsageError(str(error)) from error

    return wrapped  # type: ignore[return-value]
