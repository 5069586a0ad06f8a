"""Conversations as token ids, through a chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from ..errors import RequestError

Message = Mapping[str, Any]
"""``{"role": …, "content": …}``, and whatever else the template reads."""

Conversation = Sequence[Message]


def has_chat_template(tokenizer: Any | None) -> bool:
    """Whether ``chat_tokens`` needs no template to be passed."""
    return bool(getattr(tokenizer, "chat_template", None))


def chat_tokens(
    tokenizer: Any | None,
    messages: Conversation,
    chat_template: str | None = None,
    *,
    add_generation_prompt: bool = True,
) -> list[int]:
    """The token ids of one conversation.

    :param tokenizer: the model's transformers tokenizer.
    :param chat_template: a Jinja template instead of the tokenizer's own.
    :param add_generation_prompt: end with the opening of the assistant's turn.
    :raises RequestError: no tokenizer, no template, no messages, or the template refuses them.
    """
    if tokenizer is None:
        raise RequestError(
            "chat needs a tokenizer and this model has none. Pass token ids to generate()."
        )
    if chat_template is None and not has_chat_template(tokenizer):
        raise RequestError(
            "this model's tokenizer has no chat template. Pass chat_template=, or a plain text to "
            "generate()."
        )
    _check_messages(messages)
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=False,
        )
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise RequestError(
            f"the chat template refused the messages: {error}. Pass messages that it knows, or "
            "another chat_template."
        ) from error
    return list(ids)


def as_conversations(messages: Conversation | Sequence[Conversation]) -> list[Conversation]:
    """One conversation or many, as many.

    :raises RequestError: neither messages nor lists of messages.
    """
    one = [item for item in messages if isinstance(item, Mapping)]
    if one and len(one) == len(messages):
        return [one]
    many: list[Conversation] = [item for item in messages if isinstance(item, (list, tuple))]
    if many and len(many) == len(messages):
        return many
    raise RequestError(
        f"messages was {messages!r}; wanted a list of {{'role': …, 'content': …}}, or a list of "
        "such lists."
    )


def _check_messages(messages: object) -> None:
    if not isinstance(messages, (list, tuple)) or not messages:
        raise RequestError(f"a conversation was {messages!r}; wanted a list of messages.")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise RequestError(
                f"message {index} was {message!r}; wanted a mapping with 'role' and 'content'."
            )
