"""Text files: one document in a .txt, one record a line in a .jsonl, either also as .gz.

A *record* is a mapping with a field that holds text, or with a chat's `messages`.
"""

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from typing_extensions import Buffer

from distillcache.cache_builder.text.files.inputs import READ_BYTES, InputFile, InputReader, unreadable
from distillcache.cache_builder.text.files.marks import MARK_BYTES, refuse_other_kind
from distillcache.cache_builder.text.skipped import Skipped, skipped_record
from distillcache.schemas.config import OnError
from distillcache.schemas.errors import InputError, RecordError

BLANK_LINES = 64  # one behind the other, from which on they are not read one by one
_BOM = b"\xef\xbb\xbf"  # the UTF-8 byte order mark that some editors write first
_OBJECT, _LIST = 200, 100  # bytes in memory of a small object and list, which are 3 bytes of JSON
_TIMES = 9  # what a line takes in memory, in bytes of the longest line (docs/text.md)
_LETTER = re.compile(r"\\u00[4-7]")
ONE_A_LINE = "write one object a line (jq -c '.[]' does for a file that is one list, jq -c . for objects of many lines)"


def whole_text(file: InputFile, reader: InputReader, limit: int) -> str:
    """The text of a .txt file.

    Args:
        limit: bytes that it may have, unpacked.

    Raises:
        InputError: it cannot be read, unpacked or decoded, or is longer.
    """
    chunks, size = [], 0
    for chunk in _chunks(file, reader):
        size += len(chunk)
        if size > limit:
            raise too_long(f"{file}", limit)
        chunks.append(chunk)
    try:
        return _decode(b"".join(chunks), 0)
    except UnicodeDecodeError as error:
        raise RecordError(
            "a text file is not UTF-8",
            {"file": file.place, **_wrong_byte(error, size)},
            "convert the file to UTF-8, or leave it out",
        ) from error


def line_records(
    file: InputFile, reader: InputReader, fields: Sequence[str], limit: int, on_error: OnError, *, deep: bool = False
) -> Iterator[tuple[str, dict[str, Any] | Skipped]]:
    """Yield the place of each line of a .jsonl file, for messages, and its object. Empty lines are skipped.

    Args:
        fields: the keys that will be read: a line that gives one of them twice is refused.
        limit: bytes that a line may have, unpacked. One of small objects alone may have fewer: it takes more memory.
        deep: the fields hold objects, of which none may give a field twice either.

    Raises:
        InputError: the file cannot be read or unpacked, or a line is longer.
        RecordError: a line is not UTF-8, or holds no JSON object.
    """
    for number, offset, line in _lines(file, reader, limit):
        where = f"{file}:{number}"
        if len(line) > limit or _OBJECT * line.count(b"{") + _LIST * line.count(b"[") > _TIMES * limit:
            raise too_long(where, limit)
        try:
            record = _record_in(line, file, number, offset, fields, deep)
        except RecordError as error:
            record = skipped_record(error, where, on_error)
        if record is not None:
            yield where, record


def too_long(where: str, limit: int) -> InputError:
    """The error for a document that is longer than documents may be."""
    return InputError(
        "a document is too long",
        {"document": where, "expected": f"{limit >> 20} MiB of UTF-8 at most (data.max_document_mib)"},
        "cut it into several documents, or set data.max_document_mib higher: memory for nine times as much is needed",
    )


def _record_in(
    line: bytes, file: InputFile, number: int, offset: int, fields: Sequence[str], deep: bool
) -> dict[str, Any] | None:
    """The object in line `number`, which begins at byte `offset` of the file; None: the line is empty."""
    where = f"{file}:{number}"
    try:
        text = _decode(line, offset)
    except UnicodeDecodeError as error:
        facts = {"file": file.place, "line": where, **_wrong_byte(error, offset + len(line))}
        raise RecordError("a line is not UTF-8", facts, "convert or remove the line") from error
    return _object_in(text, where, fields, deep) if text.strip() else None


def text_of_record(record: dict[str, Any], text_field: str, where: str) -> str:
    """The text of a record.

    Raises:
        RecordError: there is none.
    """
    if text_field not in record:
        chat = isinstance(record.get("messages"), list)
        raise RecordError(
            "a line lacks the field that holds the text",
            {"line": where, "found": ", ".join(record) or "no field", "expected": text_field},
            "set data.format to chat, if these are chats" if chat else "set data.text_field to the field's name",
        )
    text = record[text_field]
    if not isinstance(text, str):
        raise RecordError(
            "the field that holds the text is no string",
            {"line": where, "field": text_field, "found": type(text).__name__},
            "correct or remove the line, or set data.text_field to another field",
        )
    check_unicode(text, where)
    return text


def check_unicode(text: str, where: str) -> None:
    """Raise `RecordError` for half a surrogate pair, which JSON can spell and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecordError(
            "the text is not Unicode", {"line": where, "cause": error.reason}, "correct or remove the line"
        ) from error


class FieldTwice(ValueError):
    """A JSON object that gives a field twice; `str` is the field's name."""


def read_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        FieldTwice: an object in it gives a field twice, of which other readers take the last.
        ValueError: it is no JSON.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise FieldTwice(name)
            found[name] = value
        return found

    return json.loads(text, object_pairs_hook=once)


def _object_in(line: str, where: str, fields: Sequence[str], deep: bool) -> dict[str, Any]:
    try:
        record = json.loads(line)
        twice = _given_twice(line, fields, deep) if isinstance(record, dict) else None
    except (ValueError, RecursionError) as error:
        raise RecordError(
            "a line is not JSON",
            {"line": where, "cause": _cause(error)},
            ONE_A_LINE if line.strip() in ("[", "{") or line.lstrip()[:1] == "[" else "correct or remove the line",
        ) from error
    if not isinstance(record, dict):
        raise RecordError(
            "a line holds no JSON object",
            {"line": where, "found": type(record).__name__, "expected": '{"text": "..."}'},
            ONE_A_LINE if isinstance(record, list) else "correct or remove the line",
        )
    if twice is not None:
        raise RecordError("a line gives a field twice", {"line": where, "field": twice}, "correct or remove the line")
    return record


def _given_twice(line: str, fields: Sequence[str], deep: bool) -> str | None:
    """The first of these fields that the object in a line has twice; JSON's readers take the last one silently.

    Args:
        deep: the objects inside these fields count as well.
    """
    escaped = "\\u00" in line and _LETTER.search(line) is not None  # no writer escapes a letter, but a name may be so
    if not deep and not escaped and not any(line.count(f'"{field}"') > 1 for field in fields):
        return None  # nearly always: it costs no second reading
    found: list[tuple[dict[str, Any], list[str]]] = []  # the objects stay alive, so that no other has their id

    def keep(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        kept = dict(pairs)
        if len(kept) < len(pairs):
            names = [name for name, _ in pairs]
            found.append((kept, [name for name in kept if names.count(name) > 1]))
        return kept

    record = json.loads(line, object_pairs_hook=keep)
    twice = {id(each): names for each, names in found}
    outermost = twice.get(id(record), ())
    if name := next((field for field in fields if field in outermost), None):
        return name
    inside = (twice.get(id(each), ()) for field in fields for each in _objects(record.get(field)))
    return next((name for names in inside for name in names), None) if deep and twice else None


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """All mappings in a value. No recursion: JSON may nest as deep as Python's stack."""
    left = [value]
    while left:
        each = left.pop()
        if isinstance(each, dict):
            yield each
            left += each.values()
        elif isinstance(each, list):
            left += each


def _cause(error: Exception) -> str:
    """The cause, without Python's advice to its programmers."""
    return "a number of more than 4,300 digits" if "set_int_max_str_digits" in str(error) else str(error)


def _chunks(file: InputFile, reader: InputReader) -> Iterator[bytes]:
    """The bytes of a file, unpacked, in chunks of any size."""
    with _unpacked(file, reader) as stream:
        yield from iter(lambda: stream.read(READ_BYTES), b"")


def _lines(file: InputFile, reader: InputReader, limit: int) -> Iterator[tuple[int, int, bytes]]:
    """The number of each line that is not blank, its first byte's place in the unpacked file, and its bytes.

    Args:
        limit: of a longer line comes one byte more than this.
    """
    number = offset = blank = 0
    with _unpacked(file, reader) as stream:
        for line in iter(lambda: stream.readline(limit + 1), b""):
            number, start, offset = number + 1, offset, offset + len(line)
            if not line.isspace() or len(line) > limit:
                blank = 0
                yield number, start, line
                continue
            blank += 1
            if blank % BLANK_LINES == 0:  # a gigabyte of them may be a file of one megabyte
                lines, size = _skip_blank_lines(stream)
                number, offset = number + lines, offset + size


def _skip_blank_lines(stream: "io.BufferedReader[Any]") -> tuple[int, int]:
    """Pass over blank lines as far as the stream's buffer reaches: how many, and their bytes."""
    buffered = stream.peek(READ_BYTES)
    end = buffered.rfind(b"\n", 0, len(buffered) - len(buffered.lstrip())) + 1
    stream.read(end)
    return buffered.count(b"\n", 0, end), end


@contextmanager
def _unpacked(file: InputFile, reader: InputReader) -> Iterator["io.BufferedReader[Any]"]:
    """A file's bytes, unpacked; what cannot be read or unpacked meanwhile is an `InputError`."""
    try:
        # gzip and lines need a buffer: a raw stream may give less than it is requested.
        stored = io.BufferedReader(_Borrowed(reader), READ_BYTES)
        packed = gzip.GzipFile(fileobj=stored) if file.kind.endswith(".gz") else None
        if packed is not None and not stored.peek(1):
            raise EOFError("the file is empty")  # gzip reads it as no text, but it is a cut file
        stream = stored if packed is None else io.BufferedReader(packed, READ_BYTES)
        if packed is not None:
            refuse_other_kind(file.kind.removesuffix(".gz"), stream.peek(MARK_BYTES)[:MARK_BYTES], file, packed=True)
        yield stream
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(file, error) from error


class _Borrowed(io.RawIOBase):
    """Another stream's bytes; closing this one leaves that one open."""

    def __init__(self, stream: io.RawIOBase) -> None:
        super().__init__()
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Buffer) -> int | None:
        return self._stream.readinto(buffer)


def _decode(data: bytes, offset: int) -> str:
    """The text in these bytes, which begin at byte `offset` of the (unpacked) file, without a byte order mark."""
    return (data[len(_BOM) :] if offset == 0 and data.startswith(_BOM) else data).decode()


def _wrong_byte(error: UnicodeDecodeError, end: int) -> dict[str, object]:
    """The byte of the (unpacked) file that is wrong in text which ends at byte `end` of it."""
    place = end - len(error.object) + error.start
    return {"byte": place, "found": f"0x{error.object[error.start]:02x} ({error.reason})"}
