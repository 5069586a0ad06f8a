"""``isobit verify``: prove on this machine that equal requests give equal bits."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import engine_kwargs, engine_options, set_threads, user_errors
from .report import check_report, command_line, report_option, write_report

if TYPE_CHECKING:
    from ..verify.judge import Verdict
    from ..verify.modes import ModeResult


@click.command("verify")
@engine_options
@click.option(
    "--test-mode",
    type=click.Choice(["all", "single", "prefix", "radix_cache"]),
    default="all",
    show_default=True,
)
@click.option("--n-trials", type=int, default=50, show_default=True, help="Batches (not for all).")
@click.option("--n-start", type=int, default=1, show_default=True, help="First batch's size.")
@click.option("--temperature", type=float, default=0.0, show_default=True)
@click.option("--max-new-tokens", type=int, default=None, help="Default: 24, or 8 with --quick.")
@click.option("--quick", is_flag=True, help="Shorter prompts; under a minute on 2 cores.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a row.")
@report_option
@user_errors
def command(
    test_mode: str,
    n_trials: int,
    n_start: int,
    temperature: float,
    max_new_tokens: int | None,
    quick: bool,
    as_json: bool,
    report: Path | None,
    **options: Any,
) -> None:
    """Run the proofs; exit status 1 when anything differs.

    --test-mode all shows one row for every invariance. The other modes are those of SGLang's
    deterministic test.

    Example: isobit verify --quick
    """
    check_report(report)
    set_threads(options.pop("threads"))
    new_tokens = max_new_tokens if max_new_tokens is not None else (8 if quick else 24)
    kwargs = engine_kwargs(options)

    import torch

    from ..core.llm import LLM
    from ..verify.restart import RestartSpec

    # On a GPU the engine of the restart proof stands beside this one, so each has half.
    half = {"gpu_memory_utilization": kwargs["gpu_memory_utilization"] / 2}
    with LLM(**(kwargs | half)) as llm:
        click.echo(str(llm.report) + "\n", err=True)
        if test_mode == "all":
            spec = RestartSpec(kwargs, torch.get_num_threads())
            found: dict[str, Any] = {
                "verdicts": _all(llm, spec, quick, new_tokens, temperature, as_json)
            }
            clean = all(verdict.holds for verdict in found["verdicts"])
        else:
            results = _mode(llm, test_mode, n_trials, n_start, new_tokens, temperature, as_json)
            found = {"modes": results}
            clean = all(result.unique <= 1 for result in results)
        if report is not None:
            from ..verify.page import verify_page

            write_report(report, verify_page(llm.report, command=command_line(), **found))
    sys.exit(0 if clean else 1)


def _all(
    llm: Any, spec: Any, quick: bool, new_tokens: int, temperature: float, as_json: bool
) -> list[Verdict]:
    from ..verify.judge import judge_all
    from ..verify.table import table
    from ..verify.workload import make_cases, prompt_lengths

    scheduler = llm.engine.scheduler
    longest = scheduler.config.max_model_len - 2 * new_tokens - 4
    page_size = scheduler.pool.page_size
    cases = make_cases(
        llm.tokenizer,
        llm.engine.vocab_size,
        prompt_lengths(quick=quick, page_size=page_size, longest=longest),
        max_new_tokens=new_tokens,
        temperature=temperature,
        sampling_seed=None,
    )
    verdicts = []
    for verdict in judge_all(llm.engine, cases, spec):
        verdicts.append(verdict)
        if as_json:
            click.echo(json.dumps(verdict.as_dict()))
        elif sys.stderr.isatty():
            click.echo(f"{verdict.invariance} …", err=True)
    if not as_json:
        click.echo(table(verdicts))
    return verdicts


def _mode(
    llm: Any,
    mode: str,
    n_trials: int,
    n_start: int,
    new_tokens: int,
    temperature: float,
    as_json: bool,
) -> list[ModeResult]:
    from ..sampling.params import SamplingParams
    from ..verify.modes import run_mode

    params = SamplingParams(
        temperature=temperature, max_tokens=new_tokens, ignore_eos=True, logprobs=2
    )
    results = []
    for result in run_mode(llm.engine, mode, n_trials, n_start, params):
        results.append(result)
        if as_json:
            row = {"label": result.label, "samples": result.samples, "unique": result.unique}
            click.echo(json.dumps(row))
        else:
            click.echo(str(result))
    return results
