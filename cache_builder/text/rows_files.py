"""A rows folder from a token stream: its files, each a pure function of the stream, and its index.

One process writes all files in order, or many write some each; the bytes are the same.
"""

from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xxhash

from distillcache.cache_builder.text.documents import file_documents, no_text
from distillcache.cache_builder.text.files.inputs import InputFile, InputReader, content_mark
from distillcache.cache_builder.text.packing import TokenStream, draw_eval_rows, pack_rows_of
from distillcache.cache_builder.text.skipped import Skipped, write_skipped
from distillcache.cache_builder.text.tokenise import Pace, token_arrays
from distillcache.models.text.tokenizer import TextTokenizer
from distillcache.schemas.config import DataConfig
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import DamageError
from distillcache.schemas.format.canonical import to_canonical
from distillcache.schemas.format.digest import digest_bytes
from distillcache.schemas.format.rows import INDEX_KEY, RowsFile, RowsIndex, encode_row, pack_rows, unpack_rows
from distillcache.schemas.store.store import Store

READ_AHEAD = 2  # files of rows on their way while one is digested


@dataclass(frozen=True)
class RowsJob:
    """Inputs that rows are made from."""

    data: DataConfig
    tokenizer: TextTokenizer
    files: tuple[InputFile, ...]
    rows_per_file: int

    @cached_property
    def marks(self) -> tuple[str, ...]:
        """Every file's content mark; worker processes receive them with the job.

        Raises:
            InputError: a file cannot be read.
        """
        return tuple(map(content_mark, self.files))

    def marked(self, file: InputFile, reader: InputReader, pace: Pace) -> Generator[np.ndarray | Skipped]:
        """The marked tokens of a file's documents, and the notes of what was skipped, in order.

        Args:
            pace: receives progress.
        """
        found = file_documents(file, reader, self.data, self.tokenizer)
        return token_arrays(found, self.tokenizer, self.data.on_error, pace)

    @property
    def most_tokens(self) -> int | None:
        """The tokens in `max_rows` rows; None: there is no limit."""
        return None if self.data.max_rows is None else self.data.max_rows * self.data.row_tokens

    def is_enough(self, tokens: int) -> bool:
        """Return whether no further document matters: one that begins where the last row ends is still counted."""
        return self.most_tokens is not None and tokens > self.most_tokens


@dataclass(frozen=True)
class RowsPlanned:
    """Facts about the rows that are known once every token is counted.

    length: tokens in the stream.
    """

    job: RowsJob
    length: int

    @property
    def tokens(self) -> int:
        """Tokens that go into rows."""
        most = self.job.most_tokens
        return self.length if most is None else min(self.length, most)

    @property
    def rows(self) -> int:
        return -(-self.tokens // self.job.data.row_tokens)

    @property
    def num_files(self) -> int:
        return -(-self.rows // self.job.rows_per_file)

    @cached_property
    def held_out(self) -> tuple[int, ...]:
        """The rows for evaluation.

        Raises:
            InputError: no row would be left to train on.
        """
        data = self.job.data
        return draw_eval_rows(self.rows, data.eval_rows, data.eval_seed, data.max_rows)

    @cached_property
    def _held_out(self) -> set[int]:
        return set(self.held_out)

    def records(self, stream: TokenStream, number: int) -> list[bytes]:
        """The records of one file of rows."""
        first = number * self.job.rows_per_file
        stop = min(first + self.job.rows_per_file, self.rows)
        rows = pack_rows_of(stream, self.tokens, first, stop, self.job.data.row_tokens, self._held_out)
        return [encode_row(row) for row in rows]


def plan_rows(job: RowsJob, length: int, skipped: int = 0) -> RowsPlanned:
    """The rows of a stream of this length.

    Args:
        skipped: records that were left out, for the message where nothing is left.

    Raises:
        InputError: there is no text, or no row would be left to train on.
    """
    if not length:
        raise no_text(job.data, skipped)
    planned = RowsPlanned(job, length)
    _ = planned.held_out
    return planned


def rows_file_key(number: int) -> str:
    return f"rows/{number:05d}.array_record"


def write_rows_file(store: Store, number: int, records: Sequence[bytes]) -> RowsFile:
    """Store one file of rows."""
    name, packed = rows_file_key(number), pack_rows(records)
    store.write(name, packed)
    return RowsFile(name=name, rows=len(records), length=len(packed), digest=digest_bytes(packed))


def stored_content_digest(store: Store, files: Sequence[RowsFile]) -> str:
    """The digest of all records in order, read back from the files; each is checked on the way.

    Raises:
        DamageError: a file is not what was written.
    """
    content = xxhash.xxh3_128()
    for data, file in zip(_read_ahead(store, [file.name for file in files]), files, strict=True):
        if data is None or len(data) != file.length or digest_bytes(data) != file.digest:
            raise DamageError(
                "a file of rows is not what was written",
                {
                    "object": store.where(file.name),
                    "found": "nothing" if data is None else counted(len(data), "byte"),
                },
                "run the same command again in an empty folder",
            )
        for record in unpack_rows(data, file.rows, store.where(file.name)):
            content.update(record)
    return content.hexdigest()


def rows_index(
    planned: RowsPlanned,
    documents: int,
    files: Iterable[RowsFile],
    content_digest: str,
    text_digest: str,
    skipped: int = 0,
) -> RowsIndex:
    """Return the index of finished rows, `rows.json`."""
    job = planned.job
    return RowsIndex(
        rows=planned.rows,
        row_tokens=job.data.row_tokens,
        eval_indices=planned.held_out,
        documents=documents,
        skipped=skipped,
        tokens=planned.tokens,
        vocab_size=job.tokenizer.vocab_size,
        eos_id=job.tokenizer.eos_id,
        tokenizer_digest=job.tokenizer.digest,
        text_digest=text_digest,
        content_digest=content_digest,
        data=job.data,
        rows_per_file=job.rows_per_file,
        files=tuple(files),
    )


def commit_index(store: Store, index: RowsIndex, skipped: Sequence[Skipped]) -> None:
    """Write the list of skipped records, then `rows.json`, which commits the rows.

    Where another process was first, its `rows.json` stays.

    Args:
        store: for writing these rows with (rows_mark.py); it does so no more afterwards.
    """
    write_skipped(store, skipped)
    store.create(INDEX_KEY, to_canonical(index))


def _read_ahead(store: Store, keys: Sequence[str]) -> Iterator[bytes | None]:
    with ThreadPoolExecutor(READ_AHEAD, thread_name_prefix="rows-read") as pool:
        waiting = [pool.submit(store.read, key) for key in keys[:READ_AHEAD]]
        for place in range(len(keys)):
            data = waiting.pop(0).result()
            if place + READ_AHEAD < len(keys):
                waiting.append(pool.submit(store.read, keys[place + READ_AHEAD]))
            yield data
