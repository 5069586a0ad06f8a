"""``isobit chat``: a conversation that streams, and reuses the cache from turn to turn."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import click

from ..errors import ConfigError, RequestError
from .options import engine_kwargs, engine_options, sampling_options, set_threads, user_errors

_HELP = """\
/reset  forget the conversation
/exit   end (so does Ctrl-D)
/help   this list
Ctrl-C  stop the answer that is being written"""


@click.command("chat", context_settings={"default_map": {"max_tokens": 512}})
@engine_options
@sampling_options
@click.option("--system", default=None, help="System message. Default: the template's own.")
@click.option("--stats", is_flag=True, help="After each answer, its speed and its cached tokens.")
@user_errors
def command(system: str | None, stats: bool, **options: Any) -> None:
    """Talk with a model; each line is a message.

    When standard input is no terminal, its lines are the messages, and a blank line follows each
    answer. On a terminal, /help lists what else can be typed.

    Example: isobit chat --system "Answer in one sentence." --stats
    """
    set_threads(options.pop("threads"))

    from ..core.llm import LLM
    from ..sampling.params import SamplingParams

    kwargs = engine_kwargs(options)
    params = SamplingParams(**options)
    with LLM(**kwargs) as llm:
        chat = Chat(llm, params, system)
        terminal = sys.stdin.isatty()
        if terminal:
            click.echo(f"{kwargs['model']}, {llm.fingerprint}. /help lists the commands.", err=True)
        for line in _typed_lines() if terminal else sys.stdin:
            if not _obey(chat, line.strip(), stats, terminal):
                break


class Chat:
    """A conversation: every turn's prompt is all the turns before it, by the chat template.

    The prompt of a turn begins with the tokens of the one before, so the prefix cache has them.
    An answer is encoded again from its text; where that gives other tokens than were sampled, the
    cache serves up to the first that differs.

    :raises ConfigError: the model has no chat template.
    """

    def __init__(self, llm: Any, params: Any, system: str | None) -> None:
        if not getattr(llm.tokenizer, "chat_template", None):
            raise ConfigError(
                "chat wants a model with a chat template, and this one has none. Choose another "
                "--model, or use isobit generate."
            )
        self._llm = llm
        self._params = params
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.last: Any | None = None
        """The last answer's ``RequestOutput``; None where it was stopped."""
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = list(self._system)

    def answer(self, text: str) -> Generator[Any, None, None]:
        """The chunks of the answer. What came before the loop was left is kept as the answer.

        :raises RequestError: the conversation is too long; the message was not added.
        """
        from ..core.chat import chat_tokens

        asked = [*self.messages, {"role": "user", "content": text}]
        self.last = None
        chunks = self._llm.stream([chat_tokens(self._llm.tokenizer, asked)], self._params)
        said = ""
        try:
            for chunk in chunks:
                said += chunk.text
                self.last = chunk.output
                yield chunk
        finally:
            chunks.close()
            if said or self.last is not None:
                self.messages = [*asked, {"role": "assistant", "content": said}]


def _typed_lines() -> Iterator[str]:
    """Lines typed at the prompt, with editing where the platform has it, up to Ctrl-D."""
    with suppress(ImportError):
        import readline  # noqa: F401 -- importing it makes input() edit and remember lines
    while True:
        try:
            yield input("> ")
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo()


def _obey(chat: Chat, line: str, stats: bool, terminal: bool) -> bool:
    """Do what a line says; False where it ends the conversation."""
    if line == "/exit":
        return False
    if line == "/reset":
        chat.reset()
    elif line == "/help":
        click.echo(_HELP)
    elif line.startswith("/"):
        _complain(f"there is no command {line.split()[0]}; /help lists them.", terminal)
    elif line:
        try:
            _say(chat, line, stats)
        except RequestError as error:
            _complain(f"{error} Or type /reset.", terminal)
    return True


def _complain(message: str, terminal: bool) -> None:
    """On a terminal the conversation goes on; a script's mistake ends it."""
    if not terminal:
        raise RequestError(message)
    click.echo(message, err=True)


def _say(chat: Chat, text: str, stats: bool) -> None:
    """Print the answer as it comes, then a blank line, then what is to be said about it."""
    began = time.perf_counter()
    times: list[float] = []
    reason = None
    with _interrupts() as interrupts:
        chunks = chat.answer(text)
        for chunk in chunks:
            times.append(time.perf_counter())
            click.echo(chunk.text, nl=False)
            reason = chunk.finish_reason
            if interrupts:
                break
        chunks.close()
    click.echo("\n")
    if interrupts and reason is None:
        click.echo("[stopped]", err=True)
    if reason == "length":
        click.echo(f"[cut at {len(times)} tokens; --max-tokens allows more]", err=True)
    if stats:
        click.echo(_stats(began, times, chat.last), err=True)


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collects Ctrl-C instead of raising it: an engine's step must not end half-way.

    A second one raises ``KeyboardInterrupt`` at once.
    """
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, before)


def _stats(began: float, times: list[float], output: Any | None) -> str:
    rate = len(times) / (times[-1] - began)
    text = f"[{len(times)} tokens, {rate:.1f} tokens/s"
    if output is not None:
        text += f", {output.num_cached_tokens} of {len(output.prompt_token_ids)} prompt tokens"
        text += " cached"
    return text + "]"
