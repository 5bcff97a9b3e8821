"""Chats to text, and which of the text is the assistant's.

Only what the assistant says is a target (`loss_mask`). Where the tokenizer's chat template marks it with
`{% generation %}`, the marks count. Elsewhere every assistant turn is found by writing the chat up to it (with the
generation prompt) and up to its end: what lies between is the turn. That needs a template whose text only ever grows;
one that rewrites earlier turns is refused.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cache_builder.text import check_unicode
from models.chat_template import BEGIN, END, ChatTemplate, Message, Span, TemplateFailure
from models.tokenizer import TextTokenizer
from schemas.config import DataConfig
from schemas.errors import ConfigError, InputError

MESSAGES = "messages"  # the field of HF chat data sets


def named_chat_template(tokenizer: TextTokenizer | None) -> ChatTemplate:
    """The tokenizer's chat template.

    Raises:
        ConfigError: it has none.
    """
    if tokenizer is None or tokenizer.chat is None:
        raise ConfigError(
            "the tokenizer has no chat template",
            {"data.format": "chat", "looked in": "chat_template.jinja, tokenizer_config.json (chat_template)"},
            "name a chat model's tokenizer (its HF directory) with data.tokenizer",
        )
    return tokenizer.chat


def written_chat(
    record: Mapping[str, Any], tokenizer: TextTokenizer | None, data: DataConfig, where: str
) -> tuple[str, list[Span]]:
    """A record's chat as text, and the spans of it that the assistant wrote.

    Raises:
        InputError: the record holds no chat, or the template cannot write it so that the turns are known.
    """
    template, closing = named_chat_template(tokenizer), tokenizer.special_tokens if tokenizer is not None else ()
    messages, tools = _messages_of(record, where), record.get("tools") or None
    chat = _Chat(messages, tools, template, data, where)
    text, spans = chat.write(messages)
    check_unicode(text, where)
    return text, spans if template.marks_assistant(tools) else chat.turns(text, closing)


class _Chat:
    """One chat while it is written."""

    def __init__(
        self,
        messages: Sequence[Message],
        tools: Sequence[Any] | None,
        template: ChatTemplate,
        data: DataConfig,
        where: str,
    ) -> None:
        self._messages, self._tools, self._template = messages, tools, template
        self._today, self._where = data.chat_date, where

    def write(self, messages: Sequence[Message], *, prompt: bool = False) -> tuple[str, list[Span]]:
        try:
            return self._template.render(messages, tools=self._tools, add_generation_prompt=prompt, today=self._today)
        except TemplateFailure as error:
            raise InputError(
                "the chat template cannot write a chat",
                {"line": self._where, "messages": f"{len(messages)} of {len(self._messages)}", "cause": error},
                "correct or remove the line, or use a template that takes such chats",
            ) from error

    def turns(self, whole: str, special_tokens: tuple[str, ...]) -> list[Span]:
        """The spans of the assistant's turns, found by prefixes of the chat.

        White space behind the special token that closes a turn belongs to the format, not to what was said.
        """
        spans = []
        for number, message in enumerate(self._messages):
            if message["role"] != "assistant":
                continue
            before, _ = self.write(self._messages[:number], prompt=True)
            after, _ = self.write(self._messages[: number + 1])
            if not (after.startswith(before) and whole.startswith(after)):
                raise self._not_stable(number, before, after, whole)
            said = after[len(before) :].rstrip()
            end = len(before) + len(said) if said.endswith(special_tokens) else len(after)
            if end > len(before):
                spans.append((len(before), end))
        return spans

    def _not_stable(self, number: int, before: str, after: str, whole: str) -> InputError:
        longer, shorter = (after, before) if not after.startswith(before) else (whole, after)
        place = next((i for i, (a, b) in enumerate(zip(longer, shorter, strict=False)) if a != b), len(longer))
        return InputError(
            "the chat template writes a chat otherwise once it goes on, so the assistant's turns cannot be told",
            {
                "line": self._where,
                "message": number,
                "character": place,
                "first written": repr(shorter[place : place + 40]),
                "then written": repr(longer[place : place + 40]),
            },
            "put {% generation %} and {% endgeneration %} around the assistant's text in chat_template.jinja",
        )


def _messages_of(record: Mapping[str, Any], where: str) -> list[Message]:
    messages = record.get(MESSAGES)
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        found = ", ".join(record) or "no field" if messages is None else repr(messages)[:80]
        raise InputError(
            "a line holds no chat",
            {"line": where, "found": found, "expected": '{"messages": [{"role": "user", "content": "..."}, ...]}'},
            "correct or remove the line, or set data.format to what the files hold",
        )
    if any(mark in json.dumps([messages, record.get("tools")], ensure_ascii=False) for mark in (BEGIN, END)):
        raise InputError(
            "a chat holds a noncharacter (U+FDD0 or U+FDD1)", {"line": where}, "correct or remove the line"
        )
    return messages


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str)
