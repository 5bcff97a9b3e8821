"""Documents from input files: text, a chat as text, or existing tokens.

Documents of white space alone, and of no tokens, are skipped.
"""

from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Any

from distillcache.cache_builder.text.chat import MESSAGES, TOOLS, named_chat_template, written_chats
from distillcache.cache_builder.text.document import Document, FoundDocument, TokenDocument
from distillcache.cache_builder.text.files.inputs import InputFile, InputReader, input_files
from distillcache.cache_builder.text.files.plain import line_records, text_of_record, too_long, whole_text
from distillcache.cache_builder.text.skipped import Skipped, skipped_record
from distillcache.models.text.tokenizer import TextTokenizer
from distillcache.schemas.config import DataConfig
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import InputError, RecordError


def documents(data: DataConfig, tokenizer: TextTokenizer | None = None) -> Iterator[Document | TokenDocument]:
    """Every document of the input files, in order, without what is skipped.

    Args:
        tokenizer: whose chat template writes chats; needed for them only.

    Raises:
        InputError: a file that cannot be read or decoded, a record that holds no document, or no text at all.
    """
    before, empty = 0, True
    for file in input_files(data):
        with InputReader(file) as reader:
            for document in file_documents(file, reader, data, tokenizer):
                if not isinstance(document, Skipped):
                    empty = False
                    yield replace(document, read_bytes=before + reader.consumed)
            before += reader.consumed
    if empty:
        raise no_text(data)


def no_text(data: DataConfig, skipped: int = 0) -> InputError:
    """The error for files without a document in them.

    Args:
        skipped: records that data.on_error left out.
    """
    facts = {
        "data.path": data.path,
        **({"skipped": f"{counted(skipped, 'record')} (data.on_error)"} if skipped else {}),
    }
    step = "set data.on_error to stop, which names what is wrong" if skipped else "name files that hold some text"
    return InputError("the text is empty", facts, step)


def file_documents(
    file: InputFile, reader: InputReader, data: DataConfig, tokenizer: TextTokenizer | None
) -> Generator[FoundDocument]:
    """The documents of one file, in order, read through `reader`, which may stay unfinished.

    Among them are the notes of records that are skipped; what is wrong with the whole file is raised.
    """
    if data.format == "chat":
        named_chat_template(tokenizer).check()
    limit = data.max_document_mib << 20
    fields = (MESSAGES, TOOLS) if data.format == "chat" else (data.text_field,)
    if file.kind.startswith(".txt"):
        found = _of_text(file, reader, data, limit)
    elif file.kind == ".array_record":
        from distillcache.cache_builder.text.files.array_records import (
            record_documents,  # here, since few corpora need these formats
        )

        found = record_documents(file, reader, data)
    elif file.kind == ".parquet":
        from distillcache.cache_builder.text.files.parquet import table_records

        found = _of_records(table_records(file, reader, data), data, tokenizer, unit="row")
    else:
        lines = line_records(file, reader, fields, limit, data.on_error, deep=data.format == "chat")
        found = _of_records(lines, data, tokenizer)
    for document in found:
        if isinstance(document, Skipped):
            yield document
        elif isinstance(document, TokenDocument):
            if document.tokens.size:
                yield document
        elif document.text and not document.text.isspace():
            if len(document.text) > limit:  # of a table or a record, whose lengths nobody has looked at yet
                raise too_long(document.where, limit)
            yield document


def _of_text(file: InputFile, reader: InputReader, data: DataConfig, limit: int) -> Iterator[FoundDocument]:
    try:
        yield Document(whole_text(file, reader, limit), str(file))
    except RecordError as error:
        yield skipped_record(error, str(file), data.on_error)


def _of_records(
    records: Iterator[tuple[str, dict[str, Any] | Skipped]],
    data: DataConfig,
    tokenizer: TextTokenizer | None,
    unit: str = "line",
) -> Iterator[FoundDocument]:
    for where, record in records:
        try:
            found = [record] if isinstance(record, Skipped) else _of_record(record, data, tokenizer, where)
        except RecordError as error:
            found = [skipped_record(_named(error, unit), where, data.on_error)]
        yield from found


def _named(error: RecordError, unit: str) -> RecordError:
    """The error, of a record that is a line or a row of its file."""
    if unit == "line":
        return error
    facts = {unit if name == "line" else name: value for name, value in error.facts.items()}
    told = RecordError(error.what.replace("a line", f"a {unit}"), facts, error.next.replace("the line", f"the {unit}"))
    return told.with_traceback(error.__traceback__)


def _of_record(record: dict[str, Any], data: DataConfig, tokenizer: TextTokenizer | None, where: str) -> list[Document]:
    if data.format != "chat":
        return [Document(text_of_record(record, data.text_field, where), where)]
    texts = written_chats(record, tokenizer, data, where)
    if not any(text.strip() for text, _ in texts):
        raise RecordError("the chat template writes nothing for a chat", {"line": where}, "use another template")
    return [Document(text, where, spans=tuple(spans)) for text, spans in texts]
