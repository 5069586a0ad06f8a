"""``isobit backends``: the compatibility matrix, as declared or against what is asked."""

from __future__ import annotations

import json
from typing import Any

import click

from .options import engine_kwargs, engine_options, user_errors


@click.command("backends")
@engine_options
@click.option(
    "--explain", is_flag=True, help="Judge each backend for this model and these options."
)
@click.option("--json", "as_json", is_flag=True, help="The rows as JSON.")
@user_errors
def command(explain: bool, as_json: bool, **options: Any) -> None:
    """Print what every installed attention backend declares.

    With --explain, what holds for the given model and options: every refusal of every backend, and
    which one would be taken.

    Example: isobit backends --explain --model smollm2 --cuda-graph
    """
    options.pop("threads")
    from ..backends.table import matrix_rows, text_table
    from ..plugins.manager import PluginHost

    kwargs = engine_kwargs(options)
    host = PluginHost(disabled=kwargs["disable_plugins"], strict_plugins=kwargs["strict_plugins"])
    requirements = _requirements(kwargs) if explain else None
    rows = matrix_rows(host, requirements)
    taken = _taken(kwargs["attention_backend"], requirements, host) if requirements else None
    if as_json:
        click.echo(json.dumps({"backends": rows, "problems": host.problems(), "taken": taken}))
        return
    click.echo(text_table(rows))
    if taken is not None:
        click.echo(f"\n{taken}")
    for problem in host.problems():
        click.echo(f"problem: {problem}", err=True)


def _requirements(kwargs: dict[str, Any]) -> Any:
    from ..core.config import EngineConfig
    from ..core.startup import requirements
    from ..models.registry import load_model_config

    config = EngineConfig(**kwargs)
    _, model = load_model_config(config.model, random=config.load_format == "random")
    dtype = str(model.dtype).removeprefix("torch.") if config.dtype == "auto" else config.dtype
    return requirements(config, model, dtype)


def _taken(name: str, requirements: Any, host: Any) -> str:
    from ..backends.matrix import select_backend
    from ..errors import ConfigError

    try:
        return f"taken: {select_backend(name, requirements, host).spec.name}"
    except ConfigError as error:
        return f"none is taken: {error}"
