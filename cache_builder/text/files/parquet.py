"""Parquet tables: one record a row, of the one column that is requested, a row group at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distillcache.cache_builder.text.chat import MESSAGES, TOOLS, without_nulls
from distillcache.cache_builder.text.files.inputs import InputFile, InputReader, foreign, on_disk, unreadable
from distillcache.cache_builder.text.skipped import Skipped, skipped_record
from distillcache.schemas.config import DataConfig, OnError
from distillcache.schemas.errors import InputError, RecordError, install_advice

BATCH_ROWS = 1024  # read at once, each different text once, beside the row group's own pages


def table_records(
    file: InputFile, reader: InputReader, data: DataConfig
) -> Iterator[tuple[str, dict[str, Any] | Skipped]]:
    """Yield the place of each row, for messages, and its column (for chats: `messages`, and `tools` if there is one).

    Raises:
        InputError: the file is no parquet file, or lacks the column or has it twice.
    """
    chat = data.format == "chat"
    wanted = [MESSAGES, TOOLS] if chat else [data.text_field]
    with on_disk(file, reader) as path, _opened(file, path) as (table, names):
        if wanted[0] not in names:
            step = "set data.format to what the column holds" if chat else "set data.text_field to the column's name"
            raise InputError(
                "a parquet file lacks the column that holds the text",
                {"file": file.place, "found": ", ".join(names) or "no column", "expected": wanted[0]},
                "set data.format to chat, if these are chats" if not chat and MESSAGES in names else step,
            )
        columns, row = [name for name in wanted if name in names], 0
        twice = next((name for name in columns if names.count(name) > 1), None)
        if twice is not None:
            raise InputError(
                "a parquet file has two columns of one name",
                {"file": file.place, "column": twice, "found": ", ".join(names)},
                "write the file again with other names, so that it is clear which of them is meant",
            )
        for batch in foreign(file, table.iter_batches(BATCH_ROWS, columns=columns)):
            for number in range(batch.num_rows):  # one at a time: a kilobyte may say a gigabyte a thousand times
                where, row = f"{file} row {row + 1}", row + 1
                record = _record(batch.slice(number, 1), where, data.on_error)
                yield where, without_nulls(record) if chat else record


def _record(row: Any, where: str, on_error: OnError) -> dict[str, Any] | Skipped:
    """A row as a mapping, columns of maps too.

    Raises:
        RecordError: a text is not UTF-8, a map gives a key twice, or another value is none that Python knows.
    """
    try:
        return row.to_pylist(maps_as_pydicts="strict")[0]
    except Exception as error:  # of one damaged value
        what = "a row's text is not UTF-8" if isinstance(error, UnicodeDecodeError) else "a row cannot be read"
        found = RecordError(what, {"record": where, "cause": error}, "correct or remove the row")
        return skipped_record(found, where, on_error)


def text_bytes(file: InputFile, column: str) -> int:
    """The unpacked length of a column, from the footer of a local file."""
    with _opened(file, Path(file.place)) as (table, _):
        meta = table.metadata
        return sum(
            group.column(number).total_uncompressed_size
            for group in map(meta.row_group, range(meta.num_row_groups))
            for number in range(group.num_columns)
            if group.column(number).path_in_schema.split(".")[0] == column
        )


@contextmanager
def _opened(file: InputFile, path: Path) -> Iterator[tuple[Any, list[str]]]:
    """The table, and the names of its columns."""
    try:
        from pyarrow.parquet import ParquetFile, read_metadata
    except ImportError as error:
        raise InputError(
            "a library is missing that reads parquet files",
            {"file": file.place, "cause": error},
            install_advice("parquet"),
        ) from error
    try:
        footer = read_metadata(path)
        leaves = [footer.schema.column(number) for number in range(len(footer.schema))]
        # A text that many rows share stays one in memory.
        texts = [leaf.path for leaf in leaves if leaf.logical_type.type == "STRING"]
        table = ParquetFile(
            path, metadata=footer, read_dictionary=texts, pre_buffer=False, page_checksum_verification=True
        )
        names = table.schema_arrow.names  # a damaged schema shows here only
    except Exception as error:  # pyarrow's own, OSError, and Python's for names and numbers that are none
        raise unreadable(file, error) from error
    with table:
        yield table, names
