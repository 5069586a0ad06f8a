"""``isobit bench step``: one step taken apart into ops."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from .bench_rows import about, headline, number
from .columns import columns
from .options import engine_kwargs, engine_options, set_threads, user_errors

if TYPE_CHECKING:
    from ..bench.steady import StepKind

_COLUMNS = {
    "op": "op",
    "ms": "ms",
    "share_of_step": "of step",
    "calls": "calls",
    "launches": "launches",
    "mb": "MB",
    "gflop": "GFLOP",
    "share_of_limit": "of limit",
    "limit": "limit",
}


@click.command("step")
@engine_options
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True)
@click.option(
    "--context",
    type=click.IntRange(min=0),
    default=None,
    help="Tokens that each sequence has in the cache. Default: 512; 0 for a prefill.",
)
@click.option(
    "--phase", type=click.Choice(["decode", "prefill"]), default="decode", show_default=True
)
@click.option(
    "--tokens",
    type=click.IntRange(min=1),
    default=None,
    help="New tokens of each sequence in a prefill. Default: 512.",
)
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy.")
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Timed, and as many profiled.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the prompts.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@user_errors
def step(
    batch: int,
    context: int | None,
    phase: str,
    tokens: int | None,
    temperature: float,
    steps: int,
    seed: int,
    as_json: bool,
    **options: Any,
) -> None:
    """One decode or prefill step: each op's time, launches, bytes and share of the limit.

    The step is timed first, as the engine takes it, then repeated under torch's profiler. On CUDA
    an op's time is that of its kernels, launched one by one, without CUDA graphs; the device's idle
    share is what the kernels leave of the step's time without the profiler. On a CPU it is the time
    within the op, with the profiler's own cost.

    An op's bytes are its weights, the KV cache, and what it reads from and writes for its
    neighbours; in the step's own floor the last does not count. "sampling" is all after the
    logits, "other" what is in no op. --max-num-batched-tokens is raised to the step's tokens, and
    --max-num-seqs to the batch.

    Example: isobit bench step --model-config tiny-qwen3 --load-format random --context 64
    """
    from ..bench.steady import StepKind

    decode = phase == "decode"
    if decode and tokens is not None:
        raise click.UsageError(
            f"--tokens was {tokens}, but a decode has one new token a sequence. Leave it out, or "
            "pass --phase prefill."
        )
    if decode and context == 0:
        raise click.UsageError("--context was 0; wanted at least 1 for a decode.")
    kind = StepKind(
        batch,
        context if context is not None else (512 if decode else 0),
        1 if decode else tokens or 512,
        decode,
    )
    set_threads(options.pop("threads"))
    kwargs = _fitted(engine_kwargs(options), kind, steps)
    report = _measure(kwargs, kind, steps=steps, seed=seed, temperature=temperature)
    if as_json:
        click.echo(json.dumps(report))
    else:
        click.echo(_text(report))


def _fitted(kwargs: dict[str, Any], kind: StepKind, steps: int) -> dict[str, Any]:
    """The engine's options with room for the step, and no steps ahead: they hide what is whose."""
    from ..bench.one_step import steps_needed
    from ..bench.steady import max_model_len
    from ..core.config import EngineConfig
    from ..core.devices import resolve_device

    if kwargs["async_scheduling"] is True:
        raise click.UsageError(
            "--async-scheduling was given, but a step is measured by itself. Leave it out; isobit "
            "bench throughput measures with it."
        )
    kwargs["async_scheduling"] = False
    kwargs["max_num_seqs"] = max(kwargs["max_num_seqs"], kind.batch)
    usual = EngineConfig(**kwargs).token_budget(resolve_device(kwargs["device"]).type)
    budget = max(usual, kind.batch * kind.tokens)
    kwargs["max_num_batched_tokens"] = budget
    if kwargs["max_model_len"] is None:
        kwargs["max_model_len"] = max_model_len(kind, steps_needed(steps), budget)
    return kwargs


def _measure(
    kwargs: dict[str, Any], kind: StepKind, *, steps: int, seed: int, temperature: float
) -> dict[str, Any]:
    from ..bench.limits import measure_limits
    from ..bench.one_step import measure_step
    from ..core.llm import LLM

    with LLM(**kwargs) as llm:
        limits = measure_limits(llm.engine.runner.backend.config.device)
        report = measure_step(
            llm.engine, kind, limits, steps=steps, seed=seed, temperature=temperature
        )
        return (
            about(llm)
            | limits.as_dict()
            | {
                "phase": "decode" if kind.decode else "prefill",
                "batch": kind.batch,
                "context": kind.context,
                "tokens": kind.tokens,
                "steps": steps,
            }
            | report.as_dict()
        )


def _text(report: dict[str, Any]) -> str:
    what = (
        "{phase} of {batch} x {tokens} tokens after {context}: {step_ms:.4g} ms{how}, "
        "{profiled_step_ms:.4g} ms under the profiler; at least {floor_ms:.4g} ms by {limit}, "
        "share {share_of_limit:.3g}"
    ).format(**report, how=" from a CUDA graph" if report["replayed"] else "")
    device = ""
    if report["device_ms"] is not None:
        device = (
            "\ndevice {device_ms:.4g} ms, idle {device_idle_share:.1%}, {launches:.0f} launches"
        ).format(**report)
    cells = [
        [number(_scaled(row, key)) for key in _COLUMNS]
        for row in sorted(report["ops"], key=lambda row: -row["ms"])
    ]
    return f"{headline(report)}\n{what}{device}\n{columns([list(_COLUMNS.values()), *cells])}"


def _scaled(row: dict[str, Any], key: str) -> Any:
    source, scale = {"mb": ("bytes", 1e6), "gflop": ("flops", 1e9)}.get(key, (key, None))
    value = row[source]
    return value if scale is None or value is None else value / scale
