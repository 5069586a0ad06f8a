"""``isobit verify``: prove on this machine that equal requests give equal bits."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .options import engine_kwargs, engine_options, set_threads, user_errors
from .report import check_report, command_line, report_option, write_report

if TYPE_CHECKING:
    from ..core.llm import LLM
    from ..verify.judge import Verdict
    from ..verify.modes import ModeResult
    from ..verify.restart import RestartSpec
    from ..verify.workload import Case


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
@click.option("--quick", is_flag=True, help="Shorter prompts; about a minute on 2 cores.")
@click.option(
    "--max-prompt-tokens",
    type=click.IntRange(min=1),
    default=None,
    help="Longest prompt. Default: 4000, or 700 with --quick.",
)
@click.option(
    "--requests",
    type=click.IntRange(min=1),
    default=None,
    help="One more batch, in which so many requests decode at once.",
)
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
    max_prompt_tokens: int | None,
    requests: int | None,
    as_json: bool,
    report: Path | None,
    **options: Any,
) -> None:
    """Run the proofs; exit status 1 when anything differs.

    --test-mode all shows one row for every invariance. The other modes are those of SGLang's
    deterministic test. The digest is over what each request gives alone: of the same prompts it is
    the same for every page size, chunk size and number of requests, with graphs and without.

    --requests takes the same prompts in turn; --max-num-seqs is raised to it.

    Example: isobit verify --quick
    """
    check_report(report)
    if test_mode != "all" and (requests is not None or max_prompt_tokens is not None):
        raise click.UsageError(
            f"--requests and --max-prompt-tokens belong to --test-mode all; it was {test_mode}. "
            "Leave them out, or see --n-trials."
        )
    set_threads(options.pop("threads"))
    new_tokens = max_new_tokens if max_new_tokens is not None else (8 if quick else 24)
    kwargs = engine_kwargs(options)
    kwargs["max_num_seqs"] = max(kwargs["max_num_seqs"], requests or 1)
    workload = _Workload(quick, max_prompt_tokens, requests, new_tokens, temperature)

    import torch

    from ..core.llm import LLM
    from ..verify.restart import RestartSpec

    # On a GPU the engine of the restart proof stands beside this one, so each has half.
    half = {"gpu_memory_utilization": kwargs["gpu_memory_utilization"] / 2}
    with LLM(**(kwargs | half)) as llm:
        click.echo(str(llm.report) + "\n", err=True)
        if test_mode == "all":
            spec = RestartSpec(kwargs, torch.get_num_threads())
            found: dict[str, Any] = {"verdicts": _all(llm, spec, workload, as_json)}
            clean = all(verdict.holds for verdict in found["verdicts"])
        else:
            results = _mode(llm, test_mode, n_trials, n_start, new_tokens, temperature, as_json)
            found = {"modes": results}
            clean = all(result.unique <= 1 for result in results)
        if report is not None:
            from ..verify.page import verify_page

            write_report(report, verify_page(llm.report, command=command_line(), **found))
    sys.exit(0 if clean else 1)


@dataclass(frozen=True, slots=True)
class _Workload:
    """What --test-mode all runs; None is the default."""

    quick: bool
    max_prompt_tokens: int | None
    requests: int | None
    new_tokens: int
    temperature: float

    def cases(self, llm: LLM) -> list[Case]:
        """One request a length.

        :raises ConfigError: the longest prompt has no room.
        """
        from ..errors import ConfigError
        from ..verify.workload import make_cases, prompt_lengths

        scheduler = llm.engine.scheduler
        longest = scheduler.config.max_model_len - 2 * self.new_tokens - 4
        if self.max_prompt_tokens is not None and self.max_prompt_tokens > longest:
            raise ConfigError(
                f"--max-prompt-tokens was {self.max_prompt_tokens}; max_model_len = "
                f"{scheduler.config.max_model_len} leaves room for {longest} beside the outputs. "
                "Lower it, or raise --max-model-len."
            )
        return make_cases(
            llm.tokenizer,
            llm.engine.vocab_size,
            prompt_lengths(
                quick=self.quick,
                page_size=scheduler.pool.page_size,
                longest=longest,
                reach=self.max_prompt_tokens,
            ),
            max_new_tokens=self.new_tokens,
            temperature=self.temperature,
            sampling_seed=None,
        )


def _all(llm: LLM, spec: RestartSpec, workload: _Workload, as_json: bool) -> list[Verdict]:
    from ..verify.judge import judge_all
    from ..verify.table import table

    cases = workload.cases(llm)
    about = {
        "cases": len(cases),
        "longest_prompt": max(len(case.prompt_token_ids) for case in cases),
        "fingerprint": llm.fingerprint,
    }
    verdicts = []
    for verdict in judge_all(llm.engine, cases, spec, requests=workload.requests):
        verdicts.append(verdict)
        if as_json:
            click.echo(json.dumps(verdict.as_dict() | about))
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
