"""Documents from files: what `data.path` names, in an order that does not depend on the file system.

A *text file* is .txt (one document) or .jsonl (one document a line), either also as .gz. Files come in the order
in which `data.path` lists them, and sorted by path within a folder or a glob; a file that is named twice is read
once. Documents of white space alone are skipped.
"""

import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import xxhash

from schemas.config import DataConfig
from schemas.errors import InputError
from schemas.storage import is_url

SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz")

_BOM = b"\xef\xbb\xbf"  # the UTF-8 byte order mark that some editors write first
_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Document:
    """A text, how messages name the place that it came from, and how many bytes of the input are read by now."""

    text: str
    where: str
    read_bytes: int


def text_files(data: DataConfig) -> list[Path]:
    """The text files that `data.path` names, in reading order.

    Raises:
        InputError: a path that does not exist, is no text file, or holds none.
    """
    paths = [data.path] if isinstance(data.path, str) else data.path
    files: dict[str, Path] = {}
    for path in paths:
        for file in _named_by(path):
            files.setdefault(os.path.realpath(file), file)
    if not files:
        raise InputError("data.path names no text", {"found": paths}, "name a file, a folder or a glob")
    return list(files.values())


def documents(data: DataConfig) -> Iterator[Document]:
    """Every document of the text files, in order.

    Raises:
        InputError: a file that cannot be read or decoded, a line that holds no document, or no text at all.
    """
    files, empty, before = text_files(data), True, 0
    for file in files:
        size, lines = file.stat().st_size, _suffix(file).startswith(".jsonl")
        for document in _line_documents(file, data.text_field) if lines else [_whole_document(file)]:
            if document.text and not document.text.isspace():
                empty = False
                # A packed file is longer unpacked than it is stored.
                yield replace(document, read_bytes=before + min(document.read_bytes, size))
        before += size
    if empty:
        raise InputError(
            "the text is empty", {"data.path": data.path, "files": len(files)}, "name files that hold some text"
        )


def inputs_digest(data: DataConfig) -> str:
    """The XXH3 digest (128 bits) of the text files: kinds, lengths and bytes, in reading order; no names, no times."""
    total = xxhash.xxh3_128()
    for file in text_files(data):
        content, length = xxhash.xxh3_128(), 0
        try:
            with open(file, "rb") as stream:
                while chunk := stream.read(_READ_BYTES):
                    content.update(chunk)
                    length += len(chunk)
        except OSError as error:
            raise _unreadable(file, error) from error
        total.update(f"{_suffix(file)} {length} {content.hexdigest()}\n".encode())
    return total.hexdigest()


def _named_by(path: str) -> list[Path]:
    """The text files that one entry of `data.path` names, sorted."""
    if is_url(path):
        raise InputError("text is read from local files only", {"data.path": path}, "copy the text to this machine")
    path = os.path.expanduser(path.removeprefix("file://"))
    if os.path.isfile(path):
        if not _suffix(Path(path)):
            raise InputError("not a text file", {"file": path, "expected": " ".join(SUFFIXES)}, "rename or convert it")
        return [Path(path)]
    # A name that exists is taken as it is, brackets and all; only then it may be a pattern.
    matches = [path] if os.path.isdir(path) else glob.glob(path, recursive=True)
    files = [file for match in matches for file in (_walk(match) if os.path.isdir(match) else [Path(match)])]
    texts = sorted({file for file in files if _suffix(file)})
    if not texts:
        found = f"{len(files)} other files" if matches else "no such file or folder"
        raise InputError(
            "data.path names no text file",
            {"data.path": path, "found": found, "expected": " ".join(SUFFIXES)},
            "name a file, a folder or a glob that holds text",
        )
    return texts


def _walk(folder: str) -> Iterator[Path]:
    """The files below a folder; hidden ones are left out, as a glob does."""
    for parent, folders, names in os.walk(folder, onerror=_raise_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def _suffix(file: Path) -> str:
    """The one of SUFFIXES that the file has, or the empty string."""
    return next((suffix for suffix in SUFFIXES if file.name.lower().endswith(suffix)), "")


def _whole_document(file: Path) -> Document:
    data = b"".join(_chunks(file, lines=False))
    return Document(_decode(data, file, 0), str(file), len(data))


def _line_documents(file: Path, text_field: str) -> Iterator[Document]:
    offset = 0
    for number, line in enumerate(_chunks(file, lines=True), 1):
        where = f"{file}:{number}"
        text = _decode(line, file, offset)
        offset += len(line)
        if text.strip():
            yield Document(_field_of_line(text, text_field, where), where, offset)


def _field_of_line(line: str, text_field: str, where: str) -> str:
    """The text in one line of a .jsonl file."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError("a line is not JSON", {"line": where, "cause": error}, "correct or remove the line") from error
    if not isinstance(record, dict):
        raise InputError(
            "a line holds no JSON object",
            {"line": where, "found": type(record).__name__, "expected": f'{{"{text_field}": "..."}}'},
            "correct or remove the line",
        )
    if text_field not in record:
        raise InputError(
            "a line lacks the field that holds the text",
            {"line": where, "found": ", ".join(record) or "no field", "expected": text_field},
            "set data.text_field to the field's name",
        )
    text = record[text_field]
    if not isinstance(text, str):
        raise InputError(
            "the field that holds the text is no string",
            {"line": where, "field": text_field, "found": type(text).__name__},
            "correct or remove the line, or set data.text_field to another field",
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair; no tokenizer takes it
        raise InputError(
            "the text is not Unicode", {"line": where, "cause": error.reason}, "correct or remove the line"
        ) from error
    return text


def _chunks(file: Path, *, lines: bool) -> Iterator[bytes]:
    """The bytes of a file, unpacked: its lines, each with its end, or pieces of any size."""
    packed = file.name.lower().endswith(".gz")
    try:
        if packed and file.stat().st_size == 0:
            raise EOFError("the file is empty")  # gzip reads it as no text, but it is a cut file
        with gzip.open(file) if packed else open(file, "rb") as stream:
            yield from stream if lines else _pieces(stream)
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(file, error) from error


def _pieces(stream: io.BufferedIOBase) -> Iterator[bytes]:
    while piece := stream.read(_READ_BYTES):
        yield piece


def _decode(data: bytes, file: Path, offset: int) -> str:
    """The text in these bytes, which begin at byte `offset` of the (unpacked) file."""
    start = len(_BOM) if offset == 0 and data.startswith(_BOM) else 0
    try:
        return data[start:].decode()
    except UnicodeDecodeError as error:
        place = offset + start + error.start
        raise InputError(
            "a text file is not UTF-8",
            {"file": file, "byte": place, "found": f"0x{error.object[error.start]:02x} ({error.reason})"},
            "convert the file to UTF-8, or leave it out",
        ) from error


def _unreadable(file: Path, error: Exception) -> InputError:
    return InputError("a text file cannot be read", {"file": file, "cause": error}, "replace the file, or leave it out")


def _raise_unreadable(error: OSError) -> None:
    raise _unreadable(Path(error.filename), error)
