"""Chats to text, and which of the text is the assistant's.

Only what the assistant says is a target (`loss_mask`). Where the tokenizer's chat template marks it with
`{% generation %}`, the marks count. Elsewhere every assistant turn is found by writing the chat up to it (with the
generation prompt) and up to its end: what lies between is the turn.

A template may write earlier turns otherwise once the chat goes on (Qwen3 drops their thinking). Then a turn's text
stands only in the chat that ends with it, and one chat becomes several examples: each ends with a turn that the next
one writes otherwise, and has as targets the turns that are written in it as they were said.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cache_builder.text import check_unicode
from models.chat_template import ChatTemplate, Message, Span, TemplateFailure, TemplateLimit
from models.template_process import BEGIN, END
from models.tokenizer import TextTokenizer
from schemas.config import DataConfig
from schemas.errors import ConfigError, RecordError

MESSAGES = "messages"  # the field of HF chat data sets
TOOLS = "tools"


def named_chat_template(tokenizer: TextTokenizer | None) -> ChatTemplate:
    """The tokenizer's chat template.

    Raises:
        ConfigError: it has none.
    """
    if tokenizer is None or tokenizer.chat is None:
        raise ConfigError(
            "the tokenizer has no chat template",
            {
                "data.format": "chat",
                "looked in": "chat_template.jinja, additional_chat_templates/, tokenizer_config.json (chat_template), "
                "chat_template.json",
            },
            "name a chat model's tokenizer (its HF directory) with data.tokenizer",
        )
    return tokenizer.chat


def written_chats(
    record: Mapping[str, Any], tokenizer: TextTokenizer | None, data: DataConfig, where: str
) -> list[tuple[str, list[Span]]]:
    """A record's chat as one text or several, and the spans of each that the assistant wrote.

    Raises:
        RecordError: the record holds no chat, or the template cannot write it so that the turns are known.
    """
    template, closing = named_chat_template(tokenizer), tokenizer.special_tokens if tokenizer is not None else ()
    messages, tools = _messages_of(record, where), _tools_of(record, where)
    chat = _Chat(messages, tools, template, data, where)
    text, spans = chat.write(messages)
    check_unicode(text, where)
    unknown = next((token for token in template.unknown_tokens if token in text), None)
    if unknown is not None:
        raise RecordError(
            "a chat holds a special token that the tokenizer's vocabulary lacks",
            {"line": where, "token": repr(unknown), "declared in": "tokenizer_config.json or special_tokens_map.json"},
            "save the tokenizer with transformers, which adds the token, or correct the line",
        )
    return [(text, spans)] if template.marks_assistant(tools) else chat.examples(text, closing)


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
            raise RecordError(
                "the chat template cannot write a chat",
                {"line": self._where, "messages": f"{len(messages)} of {len(self._messages)}", "cause": error},
                "correct or remove the line, or use a template that takes such chats",
            ) from error
        except TemplateLimit as error:
            raise TemplateLimit(error.what, {"line": self._where, **error.facts}, error.next) from error

    def examples(self, whole: str, special_tokens: tuple[str, ...]) -> list[tuple[str, list[Span]]]:
        """The texts that show every assistant turn as it was said, and the spans of the turns, found by prefixes.

        One text, the whole chat, where the template writes a turn alike however the chat goes on.
        """
        found: list[tuple[str, list[Span]]] = []
        for number, message in enumerate(self._messages):
            if message["role"] != "assistant":
                continue
            text, start, end = self._turn(number, special_tokens)
            if not found or not text.startswith(found[-1][0]):
                found.append((text, []))
            spans = found[-1][1] + ([(start, end)] if end > start else [])
            found[-1] = text, spans
        if not found:
            return [(whole, [])]
        if whole.startswith(found[-1][0]):
            found[-1] = whole, found[-1][1]
        return found

    def _turn(self, number: int, special_tokens: tuple[str, ...]) -> tuple[str, int, int]:
        """The chat up to an assistant turn's end, and the turn's span in it.

        White space behind the special token that closes a turn belongs to the format, not to what was said.
        """
        after, _ = self.write(self._messages[: number + 1])
        start = self._start(number, after, special_tokens)
        said = after[start:].rstrip()
        return after, start, start + len(said) if said.endswith(special_tokens) else len(after)

    def _start(self, number: int, after: str, special_tokens: tuple[str, ...]) -> int:
        """The character of `after` at which turn `number` begins to be said."""
        if number == 0:
            return self._start_of_first(after)
        before, _ = self.write(self._messages[:number], prompt=True)
        if after.startswith(before):
            return len(before)
        # A prompt may open what the turn itself lacks (`<think>`): what both have of it is the turn's header.
        plain, _ = self.write(self._messages[:number])
        same = _common(before, after)
        if len(plain) < same and after.startswith(plain):
            header = after[len(plain) : same]
            ends = [header.rfind(token) + len(token) for token in special_tokens if token in header]
            return len(plain) + max([*ends, header.rfind("\n") + 1])
        raise self._not_stable(number, before, after)

    def _start_of_first(self, after: str) -> int:
        """The same for a chat that begins with the assistant.

        Templates that read `messages[0]` cannot write the prompt of an empty chat: then the turn begins where another
        text in its place would.
        """
        try:
            before, _ = self.write([], prompt=True)
        except RecordError:
            before = None
        if before is not None and after.startswith(before):
            return len(before)
        other, _ = self.write([{"role": "assistant", "content": BEGIN}])
        text, _ = self.write(self._messages[:1])
        prompt = self._prompt_behind(text)
        same = _common(other, after)
        place = after.rfind(prompt, 0, same) if prompt else -1
        return same if place < 0 else place + len(prompt)

    def _prompt_behind(self, text: str) -> str:
        """The generation prompt, as it follows the first turn; empty where the template has none."""
        prompted, _ = self.write(self._messages[:1], prompt=True)
        return prompted[len(text) :] if prompted.startswith(text) else ""

    def _not_stable(self, number: int, before: str, after: str) -> RecordError:
        place = _common(before, after)
        return RecordError(
            "the chat template writes a chat otherwise once it goes on, so the assistant's turns cannot be told",
            {
                "line": self._where,
                "message": number,
                "character": place,
                "first written": repr(before[place : place + 40]),
                "then written": repr(after[place : place + 40]),
            },
            "put {% generation %} and {% endgeneration %} around the assistant's text in chat_template.jinja",
        )


def _common(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def without_nulls(value: Any) -> Any:
    """A table's value without the empty fields of its records.

    A column's records share all fields: what one record lacks is null in it. Nulls in lists are values.
    """
    if isinstance(value, dict):
        return {name: without_nulls(each) for name, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def _messages_of(record: Mapping[str, Any], where: str) -> list[Message]:
    messages = record.get(MESSAGES)
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        found = ", ".join(record) or "no field" if messages is None else repr(messages)[:80]
        raise RecordError(
            "a line holds no chat",
            {"line": where, "found": found, "expected": '{"messages": [{"role": "user", "content": "..."}, ...]}'},
            "correct or remove the line, or set data.format to what the files hold",
        )
    if any(_has_mark(text) for text in _texts([messages, record.get(TOOLS)])):
        raise RecordError(
            "a chat holds a noncharacter (U+FDD0 or U+FDD1)", {"line": where}, "correct or remove the line"
        )
    return messages


def _tools_of(record: Mapping[str, Any], where: str) -> list[Any] | None:
    """The tools of a chat. Many data sets store them as JSON text, whole or one text a tool.

    Raises:
        RecordError: they are no list of mappings, which transformers refuses too.
    """
    tools = _parsed(record.get(TOOLS))
    tools = [_parsed(tool) for tool in tools] if isinstance(tools, list) else tools
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RecordError(
            "a chat's tools are no list of descriptions",
            {"line": where, "found": repr(tools)[:80], "expected": '[{"type": "function", "function": {...}}, ...]'},
            "correct or remove the line",
        )
    if any(_has_mark(text) for text in _texts(tools)):  # JSON text may spell them
        raise RecordError(
            "a chat holds a noncharacter (U+FDD0 or U+FDD1)", {"line": where}, "correct or remove the line"
        )
    return tools


def _parsed(value: Any) -> Any:
    """What a JSON text says; anything else as it is, and a text that is no JSON too."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value, names of fields among them. No recursion: JSON may nest as deep as Python's stack."""
    left = [value]
    while left:
        each = left.pop()
        if isinstance(each, str):
            yield each
        elif isinstance(each, dict):
            left += [*each.keys(), *each.values()]
        elif isinstance(each, list | tuple):
            left += each


def _has_mark(text: str) -> bool:
    return BEGIN in text or END in text


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str)
