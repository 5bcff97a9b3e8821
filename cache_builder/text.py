"""Text files: one document in a .txt, one record a line in a .jsonl, either also as .gz.

A *record* is a mapping with a field that holds text, or with a chat's `messages`.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

from typing_extensions import Buffer

from cache_builder.inputs import READ_BYTES, InputFile, InputReader, unreadable
from cache_builder.skipped import Skipped, skipped_record
from schemas.config import OnError
from schemas.errors import InputError, RecordError

_BOM = b"\xef\xbb\xbf"  # the UTF-8 byte order mark that some editors write first


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
    file: InputFile, reader: InputReader, fields: Sequence[str], limit: int, on_error: OnError
) -> Iterator[tuple[str, dict[str, Any] | Skipped]]:
    """Where each line of a .jsonl file stands, for messages, and the object in it. Empty lines are none.

    Args:
        fields: the keys that will be read: a line that gives one of them twice is refused.
        limit: bytes that a line may have, unpacked.

    Raises:
        InputError: the file cannot be read or unpacked, or a line is longer.
        RecordError: a line is not UTF-8, or holds no JSON object.
    """
    offset = 0
    for number, line in enumerate(_chunks(file, reader, limit), 1):
        where = f"{file}:{number}"
        if len(line) > limit:
            raise too_long(where, limit)
        try:
            record = _record_in(line, file, number, offset, fields)
        except RecordError as error:
            record = skipped_record(error, where, on_error)
        offset += len(line)
        if record is not None:
            yield where, record


def too_long(where: str, limit: int) -> InputError:
    """The error for a document that is longer than documents may be."""
    return InputError(
        "a document is too long",
        {"document": where, "expected": f"{limit >> 20} MiB of UTF-8 at most (data.max_document_mib)"},
        "cut it into several documents, or set data.max_document_mib higher: memory for nine times as much is needed",
    )


def _record_in(line: bytes, file: InputFile, number: int, offset: int, fields: Sequence[str]) -> dict[str, Any] | None:
    """The object in line `number`, which begins at byte `offset` of the file; None: the line is empty."""
    where = f"{file}:{number}"
    try:
        text = _decode(line, offset)
    except UnicodeDecodeError as error:
        facts = {"file": file.place, "line": where, **_wrong_byte(error, offset + len(line))}
        raise RecordError("a line is not UTF-8", facts, "convert or remove the line") from error
    return _object_in(text, where, fields) if text.strip() else None


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


def _object_in(line: str, where: str, fields: Sequence[str]) -> dict[str, Any]:
    try:
        record = json.loads(line)
        twice = _given_twice(line, fields) if isinstance(record, dict) else None
    except (ValueError, RecursionError) as error:
        raise RecordError(
            "a line is not JSON", {"line": where, "cause": error}, "correct or remove the line"
        ) from error
    if not isinstance(record, dict):
        raise RecordError(
            "a line holds no JSON object",
            {"line": where, "found": type(record).__name__, "expected": '{"text": "..."}'},
            "correct or remove the line",
        )
    if twice is not None:
        raise RecordError("a line gives a field twice", {"line": where, "field": twice}, "correct or remove the line")
    return record


def _given_twice(line: str, fields: Sequence[str]) -> str | None:
    """The first of these fields that the object in a line has twice; JSON's readers take the last one silently."""
    if not any(line.count(f'"{field}"') > 1 for field in fields):  # nearly always: it costs no second reading
        return None
    outermost: list[tuple[str, Any]] = []

    def keep(pairs: list[tuple[str, Any]]) -> None:
        outermost[:] = pairs  # the outermost object is finished last

    json.loads(line, object_pairs_hook=keep)
    names = [name for name, _ in outermost]
    return next((field for field in fields if names.count(field) > 1), None)


def _chunks(file: InputFile, reader: InputReader, line_limit: int | None = None) -> Iterator[bytes]:
    """The bytes of a file, unpacked: pieces of any size, or its lines, each with its end.

    Args:
        line_limit: lines are asked for; of a longer one comes one byte more than this.
    """
    try:
        if file.kind.endswith(".gz") and file.size == 0:
            raise EOFError("the file is empty")  # gzip reads it as no text, but it is a cut file
        # gzip and lines need a buffer: a raw stream may give less than it is asked for.
        stored = io.BufferedReader(_Borrowed(reader), READ_BYTES)
        packed = gzip.GzipFile(fileobj=stored) if file.kind.endswith(".gz") else None
        stream = stored if packed is None else io.BufferedReader(packed, READ_BYTES)
        if line_limit is None:
            yield from iter(lambda: stream.read(READ_BYTES), b"")
        else:
            yield from iter(lambda: stream.readline(line_limit + 1), b"")
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
