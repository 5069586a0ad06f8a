"""``isobit generate``: complete prompts, or stream an answer."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from .options import engine_kwargs, engine_options, sampling_options, set_threads, user_errors


@click.command("generate")
@click.argument("prompts", nargs=-1)
@engine_options
@sampling_options
@click.option("-n", "n", type=int, default=1, show_default=True, help="Choices per prompt.")
@click.option("--logprobs", type=int, default=None, help="Top logprobs to report (with --json).")
@click.option("--raw", is_flag=True, help="Prompts as they are, not as a chat message.")
@click.option("--report", is_flag=True, help="Print the start-up report on stderr.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per prompt.")
@user_errors
def command(prompts: tuple[str, ...], **options: Any) -> None:
    """Complete PROMPTS, or those on standard input, one a line.

    A single prompt is streamed as it is generated.

    Example: isobit generate "What is the capital of France?"
    """
    texts = list(prompts) or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not texts:
        raise click.UsageError("no prompt was given. Pass one, or pipe one a line.")
    set_threads(options.pop("threads"))
    as_json, raw, report = (options.pop(name) for name in ("as_json", "raw", "report"))

    from ..core.llm import LLM
    from ..sampling.params import SamplingParams

    kwargs = engine_kwargs(options)
    params = SamplingParams(**options)
    with LLM(**kwargs) as llm:
        if report:
            click.echo(str(llm.report), err=True)
        inputs = texts if raw else [_as_chat(llm.tokenizer, text) for text in texts]
        if as_json:
            for text, output in zip(texts, llm.generate(inputs, params), strict=True):
                click.echo(json.dumps(_as_json(text, output), ensure_ascii=False))
        elif len(texts) == 1 and params.n == 1:
            for chunk in llm.stream(inputs, params):
                click.echo(chunk.text, nl=False)
            click.echo()
        else:
            for text, output in zip(texts, llm.generate(inputs, params), strict=True):
                for choice in output.outputs:
                    click.echo(f"--- {text}" + (f" [{choice.index}]" if params.n > 1 else ""))
                    click.echo(choice.text)


def _as_chat(tokenizer: Any | None, text: str) -> str | list[int]:
    """The text as a user's message where the model has a chat template, else as it is."""
    from ..core.chat import chat_tokens, has_chat_template

    if not has_chat_template(tokenizer):
        return text
    return chat_tokens(tokenizer, [{"role": "user", "content": text}])


def _as_json(text: str, output: Any) -> dict[str, Any]:
    return {
        "prompt": text,
        "fingerprint": output.fingerprint,
        "num_cached_tokens": output.num_cached_tokens,
        "outputs": [
            {
                "index": choice.index,
                "text": choice.text,
                "token_ids": choice.token_ids,
                "cumulative_logprob": choice.cumulative_logprob,
                "finish_reason": choice.finish_reason,
                "stop_reason": choice.stop_reason,
                "logprobs": choice.logprobs
                and [
                    {str(token): [entry.logprob, entry.rank] for token, entry in position.items()}
                    for position in choice.logprobs
                ],
            }
            for choice in output.outputs
        ],
    }
