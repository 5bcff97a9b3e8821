"""Documents from input files: text, a chat as text, or tokens that somebody else made.

Documents of white space alone, and of no tokens, are skipped.
"""

from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any

from jaxtyping import Bool, Int32
from numpy import ndarray

from cache_builder.chat import MESSAGES, TOOLS, written_chats
from cache_builder.inputs import InputFile, InputReader, input_files
from cache_builder.text import line_records, text_of_record, too_long, whole_text
from models.tokenizer import TextTokenizer
from schemas.config import DataConfig
from schemas.errors import InputError


@dataclass(frozen=True)
class Document:
    """A text, how messages name the place that it came from, and how many bytes of the input are read by now.

    spans: of a chat, the characters `(start, end)` whose tokens are targets; None: a plain text, all of it.
    """

    text: str
    where: str
    read_bytes: int = 0
    spans: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True, eq=False)
class TokenDocument:
    """Tokens that were made elsewhere, and which of them are targets. They are taken as they are: no BOS, no EOS."""

    tokens: Int32[ndarray, "n"]
    counted: Bool[ndarray, "n"]
    where: str
    read_bytes: int = 0


def documents(data: DataConfig, tokenizer: TextTokenizer | None = None) -> Iterator[Document | TokenDocument]:
    """Every document of the input files, in order.

    Args:
        tokenizer: whose chat template writes chats; needed for them only.

    Raises:
        InputError: a file that cannot be read or decoded, a record that holds no document, or no text at all.
    """
    before, empty = 0, True
    for file in input_files(data):
        with InputReader(file) as reader:
            for document in file_documents(file, reader, data, tokenizer):
                empty = False
                yield replace(document, read_bytes=before + reader.consumed)
        before += file.size
    if empty:
        raise no_text(data)


def no_text(data: DataConfig) -> InputError:
    """The error for files without a document in them."""
    return InputError("the text is empty", {"data.path": data.path}, "name files that hold some text")


def file_documents(
    file: InputFile, reader: InputReader, data: DataConfig, tokenizer: TextTokenizer | None
) -> Generator[Document | TokenDocument]:
    """The documents of one file, in order, read through `reader`, which may stay unfinished."""
    limit = data.max_document_mib << 20
    fields = (MESSAGES, TOOLS) if data.format == "chat" else (data.text_field,)
    if file.kind.startswith(".txt"):
        found: Iterator[Document | TokenDocument] = iter([Document(whole_text(file, reader, limit), str(file))])
    elif file.kind == ".array_record":
        from cache_builder.array_records import record_documents  # here, since few corpora need these formats

        found = record_documents(file, reader, data)
    elif file.kind == ".parquet":
        from cache_builder.parquet import table_records

        found = _of_records(table_records(file, reader, data), data, tokenizer)
    else:
        found = _of_records(line_records(file, reader, fields, limit), data, tokenizer)
    for document in found:
        if isinstance(document, TokenDocument):
            if document.tokens.size:
                yield document
        elif document.text and not document.text.isspace():
            if len(document.text) > limit:  # of a table or a record, whose lengths nobody has looked at yet
                raise too_long(document.where, limit)
            yield document


def _of_records(
    records: Iterator[tuple[str, dict[str, Any]]], data: DataConfig, tokenizer: TextTokenizer | None
) -> Iterator[Document]:
    for where, record in records:
        if data.format == "chat":
            for text, spans in written_chats(record, tokenizer, data, where):
                yield Document(text, where, spans=tuple(spans))
        else:
            yield Document(text_of_record(record, data.text_field, where), where)
