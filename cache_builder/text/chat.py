"""Chats to text, with the spans of the assistant's words.

Only what the assistant says is a target (`loss_mask`). Where the tokenizer's chat template marks it with
`{% generation %}`, the marks count. Elsewhere every assistant turn is found by writing the chat up to it (with the
generation prompt) and up to its end: what lies between is the turn.

A template may write earlier turns otherwise once the chat goes on (Qwen3 drops their thinking). Then a turn's text
stands only in the chat that ends with it, and one chat becomes several examples: each ends with a turn that the next
one writes otherwise, and has as targets the turns that are written in it as they were said.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from distillcache.cache_builder.text.files.plain import FieldTwice, check_unicode, read_json
from distillcache.models.text.chat_template import ChatTemplate, Message, Span, TemplateFailure, TemplateLimit
from distillcache.models.text.template_process import BEGIN, END
from distillcache.models.text.tokenizer import TextTokenizer
from distillcache.schemas.config import DataConfig
from distillcache.schemas.errors import ConfigError, RecordError

MESSAGES = "messages"  # the field of HF chat data sets
TOOLS = "tools"
NEXT = "correct or remove the line"
READ_AHEAD = 1 << 20  # characters of a chat's beginnings that one request has written
SHAREGPT_FIELD = "conversations"
SHAREGPT = "write conversations as messages: role for from (user for human, assistant for gpt), content for value"

# Fields by which data sets leave a turn out of the loss: OpenAI's and Mistral's `weight`, 0 or 1; axolotl's `train` and
# `training`.
LEARNT = ("weight", "train", "training")
# Fields that say something no template writes, and what to do about each.
UNWRITTEN = {
    "function_call": "write it as tool_calls, which chat templates know",
    "refusal": "write it as the message's content",
    "train_detail": "leave it out: a turn is learnt as a whole (weight: 1) or not at all (weight: 0)",
}

_MEDIA = re.compile("(^|_)(image|audio|video|file)s?(_|$)")  # a part's type: input_image, image_url, video, ...


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
    _check_parts(messages, text, where)
    unknown = next((token for token in template.unknown_tokens if token in text), None)
    if unknown is not None:
        raise RecordError(
            "a chat holds a special token that the tokenizer's vocabulary lacks",
            {"line": where, "token": repr(unknown), "declared in": "tokenizer_config.json or special_tokens_map.json"},
            "save the tokenizer with transformers, which adds the token, or correct the line",
        )
    if not template.marks_assistant(tools):
        return chat.examples(text, closing)
    return [(text, chat.learnt_of(spans))]


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
        self._muted = {number for number, message in enumerate(messages) if not _is_learnt(message, number + 1, where)}
        self._prefixes: dict[tuple[int, bool], str] = {}  # as `_read_ahead` has them

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

    def learnt_of(self, spans: list[Span]) -> list[Span]:
        """The spans of `{% generation %}` blocks without those of turns that are not to be learnt."""
        turns = [number for number, message in enumerate(self._messages) if message["role"] == "assistant"]
        if not self._muted.intersection(turns):
            return spans
        if len(spans) != len(turns):
            raise RecordError(
                "the turns of a chat that are not to be learnt cannot be told from the others",
                {"line": self._where, "assistant's turns": len(turns), "{% generation %} blocks": len(spans)},
                f"leave out {', '.join(LEARNT)}, or use a template with one block a turn",
            )
        return [span for number, span in zip(turns, spans, strict=True) if number not in self._muted]

    def examples(self, whole: str, special_tokens: tuple[str, ...]) -> list[tuple[str, list[Span]]]:
        """The texts that contain every assistant turn unchanged, and the spans of the turns, found by prefixes.

        One text, the whole chat, where the template writes a turn alike however the chat goes on.
        """
        found: list[tuple[str, list[Span]]] = []
        turns = [
            number
            for number, message in enumerate(self._messages)
            if message["role"] == "assistant" and number not in self._muted
        ]
        self._read_ahead(turns, len(whole))
        for number in turns:
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

    def _read_ahead(self, turns: Sequence[int], length: int) -> None:
        """Have the texts written that the turns are found by, many by one request: each costs as much as a render."""
        wanted = [(number + after, not after) for number in turns for after in (1, 0)]
        step = max(1, READ_AHEAD // max(length, 1))
        for start in range(0, len(wanted), step):
            some = wanted[start : start + step]
            texts = self._template.render_prefixes(self._messages, some, tools=self._tools, today=self._today)
            self._prefixes |= {key: text for key, text in zip(some, texts, strict=True) if text is not None}

    def _prefix(self, count: int, *, prompt: bool = False) -> str:
        """The chat's first messages as text."""
        known = self._prefixes.get((count, prompt))
        return self.write(self._messages[:count], prompt=prompt)[0] if known is None else known

    def _turn(self, number: int, special_tokens: tuple[str, ...]) -> tuple[str, int, int]:
        """The chat up to an assistant turn's end, and the turn's span in it.

        White space behind the special token that closes a turn belongs to the format, not to what was said.
        """
        after = self._prefix(number + 1)
        start = self._start(number, after)
        said = after[start:].rstrip()
        return after, start, start + len(said) if said.endswith(special_tokens) else len(after)

    def _start(self, number: int, after: str) -> int:
        """The character of `after` at which turn `number` begins to be said: where its generation prompt ends.

        Three kinds of template need more than a look at the prompt. It may open what the turn itself lacks
        (`<think>`): what both have of it is the turn's header. The turns before may be written otherwise once this
        one follows, and the prompt of an empty chat may be none. Then the turn begins behind the prompt's own words,
        the last ones before the place where another text would stand.
        """
        before = self._prefixes.get((number, True)) or self._or_none(self._messages[:number], prompt=True)
        said = before is not None and after.startswith(before)
        if said and number:
            return len(before or "")
        other = self._or_none([*self._messages[:number], {"role": "assistant", "content": BEGIN}])
        if other is None or other.count(BEGIN) != 1:
            raise self._not_stable(number, before or "", after)
        varies = _common(other, after)
        prompted = self._messages[:number] or self._messages[:1]
        plain, whole = self._or_none(prompted), before if number else self._or_none(prompted, prompt=True)
        if plain is None or whole is None or not whole.startswith(plain):
            return len(before or "") if said and before else varies
        header = min(_common(whole, after), varies)
        if number and len(plain) < header and after.startswith(plain):
            return header
        prompt = whole[len(plain) :]
        place = after.rfind(prompt, 0, varies) if prompt else -1
        return varies if place < 0 else place + len(prompt)

    def _or_none(self, messages: Sequence[Message], *, prompt: bool = False) -> str | None:
        """The chat, or None where the template refuses it, as some do with an empty one."""
        try:
            return self.write(messages, prompt=prompt)[0]
        except RecordError:
            return None

    def _not_stable(self, number: int, before: str, after: str) -> RecordError:
        place = _common(before, after)
        return RecordError(
            "the chat template writes a chat differently when it continues, so the assistant's turns cannot be located",
            {
                "line": self._where,
                "message": number + 1,
                "character": place,
                "first written": repr(before[place : place + 40]),
                "then written": repr(after[place : place + 40]),
            },
            "put {% generation %} and {% endgeneration %} around the assistant's text in chat_template.jinja",
        )


def _common(one: str, other: str) -> int:
    """Count the characters that two texts have in common at their start."""
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
    """The messages of a chat, their tool calls as lists. Some data sets store either as JSON text.

    Raises:
        RecordError: they are no chat, or hold what no text can be made of.
    """
    messages = _parsed(record.get(MESSAGES), MESSAGES, where)
    if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
        found = ", ".join(record) or "no field" if messages is None else repr(messages)[:80]
        raise RecordError(
            "a line has no chat",
            {"line": where, "found": found, "expected": '{"messages": [{"role": "user", "content": "..."}, ...]}'},
            SHAREGPT if SHAREGPT_FIELD in record else NEXT + ", or set data.format to what the files hold",
        )
    _check_values(messages, MESSAGES, where)
    messages = [_with_calls(message, number, where) for number, message in enumerate(messages, 1)]
    for number, message in enumerate(messages, 1):
        _refuse_other_content(message.get("content"), number, where)
        _refuse_media(message.get("content"), number, where)
        _refuse_unwritten(message, number, where)
    return messages


def _refuse_other_content(content: Any, number: int, where: str) -> None:
    """Raise for a number or a truth value, which templates write as Python spells it, or fail over."""
    entries = content if isinstance(content, list) else [content]
    other = next((each for each in entries if isinstance(each, int | float)), None)
    if other is not None:
        raise RecordError(
            "a message's content is no text",
            {"line": where, "message": number, "found": repr(content)[:80], "expected": "a text, or a list of parts"},
            NEXT,
        )


def _with_calls(message: Message, number: int, where: str) -> Message:
    """The message, its tool calls as a list of mappings."""
    if message.get("tool_calls") is None:
        return message
    name = f"{MESSAGES}[{number - 1}].tool_calls"
    calls = _mappings(message["tool_calls"], name, where)
    if calls is None:
        raise RecordError(
            "a message's tool calls are not a list of calls",
            {
                "line": where,
                "message": number,
                "found": repr(message["tool_calls"])[:80],
                "expected": '[{"type": "function", "function": {"name": ..., "arguments": ...}}, ...]',
            },
            NEXT,
        )
    return {**message, "tool_calls": calls}


def _tools_of(record: Mapping[str, Any], where: str) -> list[Any] | None:
    """The tools of a chat. Many data sets store them as JSON text, whole or one text a tool.

    No tools are None, as an empty list is too: some templates write instructions for tools wherever there is a list.

    Raises:
        RecordError: they are no list of mappings, which transformers refuses too.
    """
    if record.get(TOOLS) is None:
        return None
    tools = _mappings(record[TOOLS], TOOLS, where)
    if tools is None:
        raise RecordError(
            "a chat's tools are not a list of descriptions",
            {
                "line": where,
                "found": repr(record[TOOLS])[:80],
                "expected": '[{"type": "function", "function": {...}}, ...]',
            },
            NEXT,
        )
    return tools or None


def _mappings(value: Any, name: str, where: str) -> list[Any] | None:
    """A list of mappings, which may be JSON text as a whole or each; None: it is something else."""
    found = _parsed(value, name, where)
    found = [_parsed(each, name, where) for each in found] if isinstance(found, list) else found
    if found is None:
        return []
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        return None
    _check_values(found, name, where)
    return found


def _parsed(value: Any, name: str, where: str) -> Any:
    """Parse a JSON text; anything else, also text that is not JSON, is returned as it is."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return read_json(value)
    except FieldTwice as error:
        raise _given_twice(f"{name}: {error}", where) from error
    except (ValueError, RecursionError):
        return value


def _check_values(value: Any, name: str, where: str) -> None:
    """Refuse a chat with values that JSON lacks, or with one of the characters by which turns are marked.

    transformers writes `<date>` for a date. No recursion: JSON may nest as deep as Python's stack.
    """
    left = [(name, value)]
    while left:
        place, each = left.pop()
        if isinstance(each, dict):
            left += [(place, key) for key in each] + [(f"{place}.{key}", inner) for key, inner in each.items()]
        elif isinstance(each, list | tuple):
            left += [(f"{place}[{number}]", inner) for number, inner in enumerate(each)]
        elif isinstance(each, str):
            if BEGIN in each or END in each:
                raise RecordError(
                    "a chat holds a noncharacter (U+FDD0 or U+FDD1)", {"line": where, "field": place}, NEXT
                )
        elif each is not None and not isinstance(each, int | float):
            raise RecordError(
                "a chat holds a value that is neither text nor number",
                {"line": where, "field": place, "found": type(each).__name__},
                "write it as text",
            )


def _refuse_media(content: Any, number: int, where: str) -> None:
    """Refuse a message with pictures or sound among its parts: rows hold text alone."""
    for part in content if isinstance(content, list) else ():
        said = part if isinstance(part, dict) else {}
        kind = said.get("type")
        names = [kind] if isinstance(kind, str) else [name for name, value in said.items() if value is not None]
        media = next((name for name in names if _MEDIA.search(name.lower())), None)
        if media is not None:
            raise RecordError(
                "a chat holds more than text",
                {"line": where, "message": number, "found": media, "expected": "text"},
                "leave such chats out (data.on_error: skip does)",
            )


def _refuse_unwritten(message: Message, number: int, where: str) -> None:
    """Refuse a message with a field that means something to trainers or models, and nothing to chat templates."""
    name = next((name for name in UNWRITTEN if message.get(name) is not None), None)
    if name is not None:
        raise RecordError(
            "a message has a field that no chat template writes",
            {"line": where, "message": number, "field": name, "found": repr(message[name])[:80]},
            UNWRITTEN[name],
        )


def _is_learnt(message: Message, number: int, where: str) -> bool:
    """Return whether a turn is to be learnt, as far as its fields `LEARNT` say.

    Raises:
        RecordError: one has another value, or a turn that is not the assistant's is to be learnt.
    """
    for name in LEARNT:
        value = message.get(name)
        if value is None:
            continue
        facts = {"line": where, "message": number, "field": name, "found": repr(value)[:80]}
        if not isinstance(value, int | float) or value not in (0, 1):
            raise RecordError("a turn is learnt or not", {**facts, "expected": "0 or 1 (false or true)"}, NEXT)
        if value and message["role"] != "assistant":
            raise RecordError(
                "only what the assistant says is learnt",
                {**facts, "role": message["role"]},
                f"leave {name} out of the turns of others",
            )
        if not value:
            return False
    return True


def _check_parts(messages: Sequence[Message], text: str, where: str) -> None:
    """Refuse a chat whose contents are lists or mappings that the template cannot write.

    Templates that know texts alone write a list as Python spells it, or leave it out, and so they do in transformers.
    """
    for number, message in enumerate(messages, 1):
        content = message.get("content")
        if not content or not isinstance(content, list | dict):
            continue
        parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
        texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
        heard = message["role"] in ("user", "assistant")  # templates may drop what others say
        lost = next((each for each in texts if heard and each.split("</think>")[-1].strip() not in text), None)
        if lost is not None or any(repr(each) in text for each in (content, *parts)):
            raise RecordError(
                "the chat template cannot write contents that are not text",
                {"line": where, "message": number, "found": repr(content)[:80], "expected": "a text"},
                "write each content as one text, or use a template that takes lists of parts",
            )


def _given_twice(name: str, where: str) -> RecordError:
    return RecordError("a line gives a field twice", {"line": where, "field": name}, NEXT)


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str)
