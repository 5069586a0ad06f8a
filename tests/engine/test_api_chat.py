"""LLM.chat: the template's tokens, generated as any others."""

from __future__ import annotations

from typing import Any

import pytest

from isobit import LLM, SamplingParams
from isobit.core.chat import chat_tokens
from isobit.errors import RequestError
from isobit.verify.transcript import transcripts

GREEDY = SamplingParams(temperature=0, max_tokens=6, logprobs=1)
ONE = [{"role": "user", "content": "What is the capital of France?"}]
TWO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def test_one_and_many_conversations(smollm2: LLM) -> None:
    prompts = [chat_tokens(smollm2.tokenizer, messages) for messages in (ONE, TWO)]
    expected = [transcripts(output) for output in smollm2.generate(prompts, GREEDY)]
    assert [transcripts(output) for output in smollm2.chat([ONE, TWO], GREEDY)] == expected
    (alone,) = smollm2.chat(ONE, GREEDY)
    assert transcripts(alone) == expected[0] != expected[1]
    assert alone.prompt is None
    assert list(alone.prompt_token_ids) == prompts[0]


def test_template_and_generation_prompt(smollm2: LLM) -> None:
    tokenizer: Any = smollm2.tokenizer
    with_prompt = chat_tokens(tokenizer, ONE)
    without = chat_tokens(tokenizer, ONE, add_generation_prompt=False)
    assert with_prompt[: len(without)] == without
    assert len(with_prompt) > len(without)
    (output,) = smollm2.chat(TWO, GREEDY, chat_template=PLAIN)
    text = "system: Be brief.\nuser: Why?\n"
    assert list(output.prompt_token_ids) == tokenizer.encode(text, add_special_tokens=False)


def test_stop_and_choices(smollm2: LLM) -> None:
    whole = smollm2.chat(ONE, SamplingParams(temperature=0, max_tokens=12))[0].outputs[0]
    stop = whole.text[8:11]
    params = SamplingParams(temperature=0, max_tokens=12, stop=[stop], n=2, logprobs=0)
    for choice in smollm2.chat(ONE, params)[0].outputs:
        assert choice.text == whole.text[: whole.text.index(stop)]
        assert choice.stop_reason == stop
        assert len(choice.logprobs or ()) == len(choice.token_ids)


@pytest.mark.parametrize(
    "messages", [[], "hello", ["hello"], [ONE, "x"], [*ONE, ONE], [[]], [{"content": "x"}], [[1]]]
)
def test_what_is_no_conversation(smollm2: LLM, messages: Any) -> None:
    with pytest.raises(RequestError, match="wanted a"):
        smollm2.chat(messages, GREEDY)


def test_a_template_that_refuses(smollm2: LLM) -> None:
    with pytest.raises(RequestError, match="the chat template refused the messages: no system"):
        smollm2.chat(TWO, GREEDY, chat_template="{{ raise_exception('no system') }}")
    with pytest.raises(RequestError, match="the chat template refused"):
        smollm2.chat(TWO, GREEDY, chat_template="{% for %}")


def test_without_tokenizer_or_template(tiny: LLM, smollm2: LLM) -> None:
    with pytest.raises(RequestError, match="chat needs a tokenizer"):
        tiny.chat(ONE, GREEDY)
    tokenizer: Any = smollm2.tokenizer
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(RequestError, match=r"no chat template\. Pass chat_template="):
            smollm2.chat(ONE, GREEDY)
        assert smollm2.chat(ONE, GREEDY, chat_template=PLAIN)
    finally:
        tokenizer.chat_template = template
