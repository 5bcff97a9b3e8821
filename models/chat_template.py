"""Chats as text: a tokenizer's own chat template, in Jinja's sandbox, and which of the text its assistant wrote.

A template comes with the tokenizer (chat_template.jinja, or `chat_template` of tokenizer_config.json) and is a
stranger's program, so it runs in `ImmutableSandboxedEnvironment`. It sees what transformers' `apply_chat_template`
shows it: `messages`, `tools`, `add_generation_prompt`, the special tokens by their names, `raise_exception`,
`strftime_now`, and blocks `{% generation %}` around what the assistant says.

A *span* is `(start, end)`, characters of the rendered text.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import xxhash

from schemas.errors import ConfigError, InputError

Message = Mapping[str, Any]
Span = tuple[int, int]

# Noncharacters, which no text holds: they stand where a `{% generation %}` block begins and ends until the text is
# whole. Unlike positions taken while it is written, they stay right inside macros and captured blocks.
BEGIN, END = "\ufdd0", "\ufdd1"

# What a message's reasoning is called. Source: transformers 5.23, `_alias_reasoning_fields`.
_REASONING = ("reasoning_content", "thinking", "reasoning")


class TemplateFailure(Exception):
    """The template itself refused the messages, or failed on them."""


@dataclass(frozen=True)
class ChatTemplate:
    """How a tokenizer writes chats.

    source: the Jinja template.
    tool_source: another one for chats with tools, where the tokenizer has two.
    special_tokens: `bos_token`, `eos_token`, ... as the template names them.
    """

    source: str
    tool_source: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """xxh3-128 of all that decides how messages are written."""
        content = [self.source, self.tool_source, dict(self.special_tokens)]
        return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True, ensure_ascii=False).encode())

    def marks_assistant(self, tools: Sequence[Any] | None = None) -> bool:
        """Whether the template has `{% generation %}` blocks."""
        return _compiled(self._source(tools)).has_generation

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = False,
        today: date | None = None,
    ) -> tuple[str, list[Span]]:
        """The chat as text, and the spans of its `{% generation %}` blocks.

        Args:
            add_generation_prompt: end with what goes before an assistant's turn.
            today: what `strftime_now` shows the template.

        Raises:
            TemplateFailure: the template refuses these messages.
            ConfigError: the template asks for the date, and none is given.
        """
        compiled = _compiled(self._source(tools))
        try:
            marked = compiled.template.render(
                messages=[_as_templates_expect(message) for message in messages],
                tools=tools or None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                strftime_now=lambda format: _needed(today).strftime(format),
                **self.special_tokens,
            )
        except (ConfigError, InputError):
            raise
        except Exception as error:  # a stranger's program may raise anything
            raise TemplateFailure(f"{type(error).__name__}: {error}") from error
        return take_marks_out(marked) if compiled.has_generation else (marked, [])

    def _source(self, tools: Sequence[Any] | None) -> str:
        return self.tool_source if tools and self.tool_source is not None else self.source


def chat_template_from(
    config: Mapping[str, Any], file: str | None, special_tokens: Mapping[str, str]
) -> ChatTemplate | None:
    """The chat template of a tokenizer; None where it has none.

    Args:
        config: tokenizer_config.json.
        file: the text of chat_template.jinja, which goes before the config's.
        special_tokens: name -> token, as in the config.
    """
    found = config.get("chat_template")
    named = {entry["name"]: entry["template"] for entry in found} if isinstance(found, list) else {"default": found}
    if file is not None:
        named["default"] = file
    source = named.get("default")
    return None if source is None else ChatTemplate(source, named.get("tool_use"), dict(special_tokens))


def special_tokens_of(config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that a tokenizer_config.json names, as templates see them."""
    found = {}
    for name in ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
        token = config.get(name)
        token = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(token, str):
            found[name] = token
    return found


def take_marks_out(marked: str) -> tuple[str, list[Span]]:
    """The text without its marks, and the spans between them; blocks that hold nothing are none."""
    pieces: list[str] = []
    spans: list[Span] = []
    length = start = depth = 0
    for piece in _split_at_marks(marked):
        if piece == BEGIN:
            start, depth = (length if depth == 0 else start), depth + 1
        elif piece == END:
            depth -= 1
            if depth == 0 and length > start:
                spans.append((start, length))
        else:
            pieces.append(piece)
            length += len(piece)
    return "".join(pieces), spans


def _split_at_marks(marked: str) -> list[str]:
    return re.split(f"([{BEGIN}{END}])", marked)


@dataclass(frozen=True)
class _Compiled:
    template: Any
    has_generation: bool


@lru_cache(maxsize=8)
def _compiled(source: str) -> _Compiled:
    """The template, compiled with the settings and extensions that transformers has."""
    try:
        from jinja2 import TemplateError, nodes
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise InputError(
            "a library is missing that writes chats", {"cause": error}, "pip install 'distillcache[chat]'"
        ) from error

    seen: list[int] = []

    class Generation(Extension):
        """`{% generation %} ... {% endgeneration %}`: the text between, in marks."""

        tags: ClassVar[set[str]] = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            seen.append(line)
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_mark")
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _mark(self, caller: Any) -> str:
            return f"{BEGIN}{caller()}{END}"

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    try:
        return _Compiled(environment.from_string(source), bool(seen))
    except TemplateError as error:
        raise InputError(
            "the tokenizer's chat template cannot be read",
            {"cause": error, "line": getattr(error, "lineno", "unknown")},
            "copy chat_template.jinja again from where it came",
        ) from error


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter writes `<` as an escape, for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateFailure(message)


def _needed(today: date | None) -> date:
    if today is None:
        raise ConfigError(
            "the chat template writes today's date, and rows must not depend on the day",
            {"data.chat_date": None},
            "set data.chat_date to the day to write, for example 2025-01-31",
        )
    return today


def _as_templates_expect(message: Message) -> dict[str, Any]:
    """The message without its empty fields, its reasoning under the names that templates ask for."""
    kept = {name: value for name, value in message.items() if value is not None}
    reasoning = next((kept[name] for name in _REASONING if name in kept), None)
    return kept if reasoning is None else {"thinking": reasoning, **kept, "reasoning_content": reasoning}
