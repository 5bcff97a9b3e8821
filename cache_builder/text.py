"""Text files: one document in a .txt, one record a line in a .jsonl, either also as .gz.

A *record* is a mapping with a field that holds text, or with a chat's `messages`.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from typing import Any

from typing_extensions import Buffer

from cache_builder.inputs import READ_BYTES, InputFile, InputReader, unreadable
from schemas.errors import InputError

_BOM = b"\xef\xbb\xbf"  # the UTF-8 byte order mark that some editors write first


def whole_text(file: InputFile, reader: InputReader) -> str:
    """The text of a .txt file.

    Raises:
        InputError: it cannot be read, unpacked or decoded.
    """
    return _decode(b"".join(_chunks(file, reader, lines=False)), file, 0)


def line_records(file: InputFile, reader: InputReader) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each line of a .jsonl file stands, for messages, and the object in it. Empty lines are none.

    Raises:
        InputError: the file cannot be read, unpacked or decoded, or a line holds no JSON object.
    """
    offset = 0
    for number, line in enumerate(_chunks(file, reader, lines=True), 1):
        text = _decode(line, file, offset)
        offset += len(line)
        if text.strip():
            where = f"{file}:{number}"
            yield where, _object_in(text, where)


def text_of_record(record: dict[str, Any], text_field: str, where: str) -> str:
    """The text of a record.

    Raises:
        InputError: there is none.
    """
    if text_field not in record:
        chat = isinstance(record.get("messages"), list)
        raise InputError(
            "a line lacks the field that holds the text",
            {"line": where, "found": ", ".join(record) or "no field", "expected": text_field},
            "set data.format to chat, if these are chats" if chat else "set data.text_field to the field's name",
        )
    text = record[text_field]
    if not isinstance(text, str):
        raise InputError(
            "the field that holds the text is no string",
            {"line": where, "field": text_field, "found": type(text).__name__},
            "correct or remove the line, or set data.text_field to another field",
        )
    check_unicode(text, where)
    return text


def check_unicode(text: str, where: str) -> None:
    """Raise `InputError` for half a surrogate pair, which JSON can spell and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            "the text is not Unicode", {"line": where, "cause": error.reason}, "correct or remove the line"
        ) from error


def _object_in(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError("a line is not JSON", {"line": where, "cause": error}, "correct or remove the line") from error
    if not isinstance(record, dict):
        raise InputError(
            "a line holds no JSON object",
            {"line": where, "found": type(record).__name__, "expected": '{"text": "..."}'},
            "correct or remove the line",
        )
    return record


def _chunks(file: InputFile, reader: InputReader, *, lines: bool) -> Iterator[bytes]:
    """The bytes of a file, unpacked: its lines, each with its end, or pieces of any size."""
    try:
        if file.kind.endswith(".gz") and file.size == 0:
            raise EOFError("the file is empty")  # gzip reads it as no text, but it is a cut file
        # gzip and lines need a buffer: a raw stream may give less than it is asked for.
        stored = io.BufferedReader(_Borrowed(reader), READ_BYTES)
        packed = gzip.GzipFile(fileobj=stored) if file.kind.endswith(".gz") else None
        stream = stored if packed is None else io.BufferedReader(packed, READ_BYTES)
        yield from stream if lines else iter(lambda: stream.read(READ_BYTES), b"")
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


def _decode(data: bytes, file: InputFile, offset: int) -> str:
    """The text in these bytes, which begin at byte `offset` of the (unpacked) file."""
    start = len(_BOM) if offset == 0 and data.startswith(_BOM) else 0
    try:
        return data[start:].decode()
    except UnicodeDecodeError as error:
        place = offset + start + error.start
        raise InputError(
            "a text file is not UTF-8",
            {"file": file.place, "byte": place, "found": f"0x{error.object[error.start]:02x} ({error.reason})"},
            "convert the file to UTF-8, or leave it out",
        ) from error
