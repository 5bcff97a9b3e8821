"""Chats as text: a tokenizer's own chat template, and which of the text its assistant wrote.

A template comes with the tokenizer (`chat_files.py` says where it is looked for) and is a stranger's program, so it
runs in Jinja's `ImmutableSandboxedEnvironment`, in a process of its own with limits of time and memory
(`template_worker.py`). It sees what transformers' `apply_chat_template` shows it: `messages`, `tools`,
`add_generation_prompt`, the special tokens by their names, `raise_exception`, `strftime_now`, and blocks
`{% generation %}` around what the assistant says; but nothing random, since rows must not depend on chance.

A *span* is `(start, end)`, characters of the rendered text.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property, lru_cache
from typing import Any

import xxhash

from distillcache.models.text import template_worker
from distillcache.models.text.template_process import BEGIN, END
from distillcache.schemas.errors import ConfigError, InputError

Message = Mapping[str, Any]
Span = tuple[int, int]

# What a message's reasoning is called. Source: transformers 5.24, `_alias_reasoning_fields`.
REASONING = ("reasoning_content", "thinking", "reasoning")


class TemplateFailure(Exception):
    """The template itself refused the messages, or failed on them."""


class TemplateLimit(InputError):
    """The template exceeds its limits of time, memory or text, or uses random values."""


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's template for chats.

    source: the Jinja template; None: the tokenizer has named ones only, for chats with tools.
    tool_source: another one for chats with tools, where the tokenizer has two.
    special_tokens: `bos_token`, `eos_token`, ... as the template names them.
    whole_tokens: tokens of the vocabulary that only the files beside tokenizer.json declare to be taken whole, as
        keyword arguments of `tokenizers.AddedToken`.
    unknown_tokens: what those files declare and the vocabulary lacks.
    """

    source: str | None
    tool_source: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    whole_tokens: tuple[Mapping[str, Any], ...] = ()
    unknown_tokens: tuple[str, ...] = ()

    @cached_property
    def digest(self) -> str:
        """xxh3-128 of all that decides how messages are written."""
        content: list[Any] = [self.source, self.tool_source, dict(self.special_tokens)]
        if self.whole_tokens:  # only then: the digests of other templates stay what they were
            content.append([dict(token) for token in self.whole_tokens])
        return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True, ensure_ascii=False).encode())

    def check(self) -> None:
        """Raise `InputError` for a template that cannot be compiled."""
        for source in {self.source, self.tool_source} - {None}:
            _marks(source)

    def marks_assistant(self, tools: Sequence[Any] | None = None) -> bool:
        """Return whether the template has `{% generation %}` blocks."""
        return _marks(self._source(tools))

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
            TemplateLimit: it takes too much.
            ConfigError: the template asks for the date, and none is given.
        """
        reply = _asked(self._request(messages, tools, add_generation_prompt, today))
        return take_marks_out(reply["text"]) if reply["marks"] else (reply["text"], [])

    def render_prefixes(
        self,
        messages: Sequence[Message],
        prefixes: Sequence[tuple[int, bool]],
        *,
        tools: Sequence[Any] | None = None,
        today: date | None = None,
    ) -> list[str | None]:
        """Several beginnings of a chat as text, by one request, without marks.

        Args:
            prefixes: how many messages, and whether the generation prompt follows.

        Returns: None where `render` would raise, which says why; nothing but None where all together take too much.
        """
        request = self._request(messages, tools, False, today)
        reply = template_worker.PROCESS.ask({**request, "prefixes": list(prefixes)})
        return reply.get("texts") or [None] * len(prefixes)

    def _request(
        self, messages: Sequence[Message], tools: Sequence[Any] | None, prompted: bool, today: date | None
    ) -> dict[str, Any]:
        values = {
            **self.special_tokens,
            "messages": [_as_templates_expect(message) for message in messages],
            "tools": tools or None,
            "documents": None,
            "add_generation_prompt": prompted,
        }
        return {
            "source": self._source(tools),
            "values": values,
            "today": None if today is None else today.isoformat(),
        }

    def _source(self, tools: Sequence[Any] | None) -> str:
        found = self.tool_source if tools and self.tool_source is not None else self.source
        if found is None:
            raise TemplateFailure("the tokenizer has a template for chats with tools alone, and none named default")
        return found


def take_marks_out(marked: str) -> tuple[str, list[Span]]:
    """The text without its marks, and the spans between them; blocks that hold nothing are none."""
    chunks: list[str] = []
    spans: list[Span] = []
    length = start = depth = 0
    for chunk in re.split(f"([{BEGIN}{END}])", marked):
        if chunk == BEGIN:
            start, depth = (length if depth == 0 else start), depth + 1
        elif chunk == END:
            depth -= 1
            if depth == 0 and length > start:
                spans.append((start, length))
        else:
            chunks.append(chunk)
            length += len(chunk)
    return "".join(chunks), spans


@lru_cache(maxsize=8)
def _marks(source: str) -> bool:
    return _asked({"source": source})["marks"]


def _asked(request: dict[str, Any]) -> dict[str, Any]:
    """The reply of the template's process; whatever can be wrong is one error."""
    reply = template_worker.PROCESS.ask(request)
    kind, message = reply.get("error"), reply.get("message")
    if kind is None:
        return reply
    if kind == "failure":
        raise TemplateFailure(message)
    if kind == "syntax":
        raise InputError(
            "the tokenizer's chat template cannot be read",
            {"cause": message, "line": reply["line"] or "unknown"},
            "copy chat_template.jinja again from its source",
        )
    if kind == "date":
        raise ConfigError(
            "the chat template writes today's date, and rows must not depend on the day",
            {"data.chat_date": None},
            "set data.chat_date to the day to write, for example 2025-01-31",
        )
    raise _limit_of(kind, message)


def _limit_of(kind: str, message: str | None) -> TemplateLimit:
    if kind == "chance":
        return TemplateLimit(
            "the chat template asks for random values, and rows must not depend on chance",
            {"found": "lipsum or random"},
            "use the template without them",
        )
    found = {
        "time": f"more than {template_worker.CPU_S} s of processor time",
        "memory": f"more than {template_worker.MEMORY_BYTES >> 20} MiB of memory",
    }.get(kind, message)
    return TemplateLimit(
        "the chat template takes more than a chat may",
        {"found": found},
        "use the template of the model's own publisher: a sound one takes less than a millisecond",
    )


def _as_templates_expect(message: Message) -> dict[str, Any]:
    """The message without its empty fields, its reasoning under the names that templates ask for."""
    kept = {name: value for name, value in message.items() if value is not None}
    reasoning = next((kept[name] for name in REASONING if name in kept), None)
    return kept if reasoning is None else {"thinking": reasoning, **kept, "reasoning_content": reasoning}
