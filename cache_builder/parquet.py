"""Parquet tables: one record a row, of the one column that is asked for, a row group at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cache_builder.chat import MESSAGES, TOOLS, without_nulls
from cache_builder.inputs import InputFile, InputReader, on_disk, unreadable
from schemas.config import DataConfig
from schemas.errors import InputError

BATCH_ROWS = 1024  # records in memory at once, beside the row group's own pages


def table_records(file: InputFile, reader: InputReader, data: DataConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each row stands, for messages, and its column (of chats: `messages`, and `tools` where there is one).

    Raises:
        InputError: the file is no parquet file, or lacks the column.
    """
    chat = data.format == "chat"
    wanted = [MESSAGES, TOOLS] if chat else [data.text_field]
    with on_disk(file, reader) as path, _opened(file, path) as table:
        names = table.schema_arrow.names
        if wanted[0] not in names:
            raise InputError(
                "a parquet file lacks the column that holds the text",
                {"file": file.place, "found": ", ".join(names), "expected": wanted[0]},
                "set data.format to what the column holds" if chat else "set data.text_field to the column's name",
            )
        columns, row = [name for name in wanted if name in names], 0
        try:
            for batch in table.iter_batches(BATCH_ROWS, columns=columns):
                for record in batch.to_pylist():
                    row += 1
                    yield f"{file} row {row}", without_nulls(record) if chat else record
        except OSError as error:  # pyarrow's own for damaged pages
            raise unreadable(file, error) from error


def text_bytes(file: InputFile, column: str) -> int:
    """The unpacked length of a column, from the footer of a local file."""
    with _opened(file, Path(file.place)) as table:
        meta = table.metadata
        return sum(
            group.column(number).total_uncompressed_size
            for group in map(meta.row_group, range(meta.num_row_groups))
            for number in range(group.num_columns)
            if group.column(number).path_in_schema.split(".")[0] == column
        )


@contextmanager
def _opened(file: InputFile, path: Path) -> Iterator[Any]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise InputError(
            "a library is missing that reads parquet files",
            {"file": file.place, "cause": error},
            "pip install 'distillcache[parquet]'",
        ) from error
    try:
        table = ParquetFile(path, pre_buffer=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise unreadable(file, error) from error
    with table:
        yield table
