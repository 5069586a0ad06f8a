"""``isobit``: finds the verb; each lives in a file of its own and is imported when it is called."""

from __future__ import annotations

import importlib

import click

_VERBS = {
    "backends": "The compatibility matrix of the attention backends.",
    "bench": "Measure throughput, latency, cache hits and a step's ops.",
    "chat": "Talk with a model in the terminal.",
    "doctor": "What is installed, what could run here, and what is missing.",
    "generate": "Complete prompts, or stream an answer.",
    "plugins": "The installed plugins and what became of each.",
    "verify": "Prove on this machine that equal requests give equal bits.",
}


class _LazyGroup(click.Group):
    """Lists every verb from ``_VERBS`` without importing any; ``--help`` never loads torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            return None
        module = importlib.import_module(f".{cmd_name}", __package__)
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(_VERBS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="isobit", prog_name="isobit")
def main() -> None:
    """LLM inference that returns the same bits for the same request."""


if __name__ == "__main__":
    main()
