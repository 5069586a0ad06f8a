"""``isobit chat``, with the real model and without a terminal."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
from click.testing import CliRunner, Result

from isobit import LLM, SamplingParams
from isobit.cli import chat as verb
from isobit.cli.chat import Chat, _typed_lines
from isobit.cli.main import main
from isobit.core.chat import chat_tokens
from isobit.errors import RequestError

PARAMS = SamplingParams(temperature=0.8, seed=3, max_tokens=10)
OPTIONS = ("--temperature", "0.8", "--seed", "3", "--max-tokens", "10")
FIRST = "What is the capital of France?"
SECOND = "Name one river there."


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("smollm2", max_model_len=512) as loaded:
        yield loaded


@pytest.fixture
def talk(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the verb on lines of standard input, with the model that is already loaded."""
    monkeypatch.setattr("isobit.core.llm.LLM", lambda **kwargs: nullcontext(llm))

    def run(*lines: str, options: tuple[str, ...] = OPTIONS) -> Result:
        llm.engine.flush_cache()
        return CliRunner().invoke(main, ["chat", *options], input="".join(f"{x}\n" for x in lines))

    return run


def text_of(llm: LLM, prompt: list[int]) -> str:
    return llm.generate([prompt], PARAMS, use_tqdm=False)[0].outputs[0].text


def test_answers_are_those_to_the_whole_conversation_on_a_cold_cache(llm: LLM, talk: Any) -> None:
    done = talk(FIRST, SECOND)
    assert done.exit_code == 0, done.output
    messages: list[dict[str, str]] = []
    expected = ""
    for question in (FIRST, SECOND):
        messages.append({"role": "user", "content": question})
        llm.engine.flush_cache()
        answer = text_of(llm, chat_tokens(llm.tokenizer, messages))
        messages.append({"role": "assistant", "content": answer})
        expected += f"{answer}\n\n"
    assert done.stdout == expected
    assert "\x1b" not in done.output
    assert "\r" not in done.output


def test_the_conversation_is_remembered_until_reset(talk: Any) -> None:
    remembered = talk(FIRST, SECOND).stdout.split("\n\n")
    alone = talk(SECOND).stdout.split("\n\n")
    forgotten = talk(FIRST, "/reset", "", SECOND).stdout.split("\n\n")
    assert forgotten[1] == alone[0]
    assert remembered[1] != alone[0]


def test_stats_show_that_the_next_turn_hits_the_cache(talk: Any) -> None:
    lines = talk(FIRST, SECOND, options=(*OPTIONS, "--stats")).stderr.splitlines()
    stats = [line for line in lines if "tokens/s" in line]
    cached = [int(line.split("tokens/s, ")[1].split()[0]) for line in stats]
    assert cached[0] == 0
    assert cached[1] >= 32


def test_the_system_message_comes_first(llm: LLM) -> None:
    chat = Chat(llm, PARAMS, "Answer in French.")
    list(chat.answer(FIRST))
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant"]
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Answer in French."}]


def test_an_interrupt_stops_the_answer_and_keeps_the_conversation(
    llm: LLM, talk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = talk(FIRST, SECOND).stdout.split("\n\n")
    stream = llm.stream
    calls = []

    def interrupted(*args: Any) -> Iterator[Any]:
        calls.append(args)
        for count, chunk in enumerate(stream(*args)):
            if len(calls) == 1 and count == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield chunk

    monkeypatch.setattr(llm, "stream", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    done = talk(FIRST, SECOND)
    assert done.exit_code == 0, done.output
    assert "[stopped]" in done.stderr
    answers = done.stdout.split("\n\n")
    assert whole[0].startswith(answers[0])
    assert 0 < len(answers[0]) < len(whole[0])
    assert answers[1]
    assert signal.getsignal(signal.SIGINT) is handler
    assert not llm.engine.has_unfinished()
    llm.engine.scheduler.check_integrity()


def test_leaving_an_answer_early_keeps_what_was_said(llm: LLM) -> None:
    chat = Chat(llm, PARAMS, None)
    answer = chat.answer(FIRST)
    said = next(answer).text + next(answer).text
    answer.close()
    assert chat.messages[-1] == {"role": "assistant", "content": said}
    assert chat.last is None
    assert not llm.engine.has_unfinished()


def test_a_conversation_that_is_too_long_ends_a_script_and_not_a_session(
    llm: LLM, talk: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    done = talk(FIRST, options=("--max-tokens", "512"))
    assert done.exit_code == 2
    assert "max_model_len" in done.stderr
    chat = Chat(llm, SamplingParams(max_tokens=512), None)
    assert verb._obey(chat, FIRST, stats=False, terminal=True)
    assert "/reset" in capsys.readouterr().err
    assert chat.messages == []


def test_a_cut_answer_is_said_to_be_cut(talk: Any) -> None:
    assert "--max-tokens" in talk(FIRST, options=("--max-tokens", "2")).stderr


def test_commands(llm: LLM, talk: Any) -> None:
    done = talk("/help", "/exit", FIRST)
    assert done.exit_code == 0
    assert "/reset" in done.stdout
    assert "Paris" not in done.stdout
    unknown = talk("/rest")
    assert unknown.exit_code == 2
    assert "/rest;" in unknown.stderr
    with pytest.raises(RequestError, match="no command"):
        verb._obey(Chat(llm, PARAMS, None), "/rest", stats=False, terminal=False)


def test_a_model_without_a_chat_template_is_refused() -> None:
    args = ["chat", "--model", "tiny-llama", "--load-format", "random"]
    done = CliRunner().invoke(main, args, input="hello\n")
    assert done.exit_code == 2
    assert "chat template" in done.stderr


def test_at_the_prompt_ctrl_c_gives_a_new_one_and_ctrl_d_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    typed: list[str | type[BaseException]] = ["one", KeyboardInterrupt, "two", EOFError]

    def read(prompt: str) -> str:
        item = typed.pop(0)
        if isinstance(item, str):
            return item
        raise item

    monkeypatch.setattr("builtins.input", read)
    assert list(_typed_lines()) == ["one", "two"]
