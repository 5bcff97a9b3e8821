"""Rows: what one is, its bytes, and the folder of prepared rows.

A *record* is one row as a safetensors byte string. A *file of rows* is an ArrayRecord file with one record a row.
A *rows folder* is what `prepare` writes: files of rows, the tokenizer that made them, and `rows.json`, the index,
written last: without it the folder holds nothing.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from typing import IO, Literal

import numpy as np
import safetensors.numpy
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from jaxtyping import Bool, Int32
from pydantic import Field
from safetensors import SafetensorError

from distillcache.schemas.base import RelativeName, Size
from distillcache.schemas.config import Config, DataConfig
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import DamageError, InputError, StorageError
from distillcache.schemas.format.canonical import from_canonical
from distillcache.schemas.format.digest import digest_bytes
from distillcache.schemas.store.store import Store

Split = Literal["train", "eval"]
SPLITS: tuple[Split, ...] = ("train", "eval")  # stored as the place in this tuple

INDEX_KEY = "rows.json"
TOKENIZER_KEY = "tokenizer.json"
SKIPPED_KEY = "skipped.jsonl"

_DTYPES = {
    "tokens": np.dtype(np.int32),
    "positions": np.dtype(np.int32),
    "segment_ids": np.dtype(np.int32),
    "loss_mask": np.dtype(np.uint8),
    "split": np.dtype(np.uint8),
}
_LOADED_FILES = 2  # a reader that goes forward crosses from one file into the next


@dataclass(frozen=True, eq=False)  # arrays have no single truth value to compare by
class Row:
    """One packed training example of T tokens.

    tokens: vocabulary ids; 0 in padding.
    positions: the place of each token in its document's part of this row, from 0; 0 in padding.
    segment_ids: which document of this row a token belongs to, numbered from 1; 0 = padding.
    loss_mask: `loss_mask[t]` says whether token t counts where it is the target of a prediction.
    split: whether the row is for training or held out.
    """

    tokens: Int32[np.ndarray, " T"]
    positions: Int32[np.ndarray, " T"]
    segment_ids: Int32[np.ndarray, " T"]
    loss_mask: Bool[np.ndarray, " T"]
    split: Split


def num_targets(segment_ids: Int32[np.ndarray, "*B T"], loss_mask: Bool[np.ndarray, "*B T"]) -> int:
    """The number of tokens that are targets: they count, and a token of their own document stands before them."""
    follows = (segment_ids[..., 1:] == segment_ids[..., :-1]) & (segment_ids[..., 1:] > 0)
    return int(np.count_nonzero(follows & loss_mask[..., 1:]))


def too_long_note(row_tokens: int, context: int | None, whose: str, change: str) -> str | None:
    """One line that warns of rows longer than a model's context; None if they are not, or if the context is unknown.

    Args:
        context: the longest document that the model is made for, in tokens.
        whose: the model or models, as "the teacher".
        change: what the user can do.
    """
    if context is None or row_tokens <= context:
        return None
    verb = "are" if " and " in whose else "is"
    made_for = f"the {context:,} that {whose} {verb} made for (max_position_embeddings with its rope scaling)"
    unreliable = "what is computed for later tokens of longer documents is not reliable"
    return f"rows of {row_tokens:,} tokens are longer than {made_for}: {unreliable}; {change}"


def too_long_for_teacher(row_tokens: int, context: int | None) -> str | None:
    """`too_long_note` where rows are still to be made."""
    return too_long_note(row_tokens, context, "the teacher", f"set data.row_tokens to {context} or less")


def no_targets_note(splits: Sequence[Split]) -> str:
    """One sentence about splits in which no token is a target."""
    rows = " or ".join({"train": "the rows to train on", "eval": "the held-out rows"}[split] for split in splits)
    return f"no token of {rows} is a target: cross-entropy, KL and perplexity are undefined there"


def encode_row(row: Row) -> bytes:
    """The row as a record: equal rows give equal bytes."""
    values = {
        "tokens": row.tokens,
        "positions": row.positions,
        "segment_ids": row.segment_ids,
        "loss_mask": row.loss_mask,
        "split": [SPLITS.index(row.split)],
    }
    return safetensors.numpy.save({name: np.ascontiguousarray(values[name], dtype) for name, dtype in _DTYPES.items()})


def decode_row(record: bytes, where: str = "a row") -> Row:
    """The row in a record.

    Raises:
        DamageError: the bytes are not a record; `where` names them.
    """
    try:
        found = safetensors.numpy.load(record)
    except (SafetensorError, KeyError) as error:
        raise _not_a_record(where, str(error), "a safetensors byte string") from error
    if found.keys() != _DTYPES.keys():
        raise _not_a_record(where, f"tensors {sorted(found)}", f"tensors {sorted(_DTYPES)}")
    row_tokens = found["tokens"].size
    for name, array in found.items():
        shape = (1,) if name == "split" else (row_tokens,)
        if array.shape != shape or array.dtype != _DTYPES[name]:
            raise _not_a_record(where, f"{name} {array.dtype}{[*array.shape]}", f"{_DTYPES[name]}{[*shape]}")
    for name in ("loss_mask", "split"):
        if (found[name] > 1).any():
            raise _not_a_record(where, f"{name} {found[name].max()}", f"{name} 0 or 1")
    split = SPLITS[found.pop("split")[0]]
    return Row(**{**found, "loss_mask": found["loss_mask"].astype(bool)}, split=split)


def pack_rows(records: Sequence[bytes]) -> bytes:
    """The bytes of an ArrayRecord file with one record a row; equal records give equal bytes."""
    with _scratch_file() as scratch:
        try:
            # Groups of one: a row is read without its neighbours.
            writer = ArrayRecordWriter(scratch.name, "group_size:1")
            for record in records:
                writer.write(record)
            writer.close()
        except RuntimeError as error:
            raise _scratch_failure(str(error)) from error
        return scratch.read()


def unpack_rows(data: bytes, count: int | None = None, where: str = "a file of rows") -> list[bytes]:
    """The records in the bytes of an ArrayRecord file.

    ArrayRecord's own checks miss some damage, so a caller who knows the bytes' digest compares it first.

    Args:
        data: the whole file.
        count: how many records there must be; None: not known.
        where: how messages name the file.

    Raises:
        DamageError: not an ArrayRecord file, or another number of records.
    """
    with _scratch_file() as scratch:
        scratch.write(data)
        scratch.flush()
        try:
            # No read-ahead: its 16 MiB buffers and threads cost more than these files.
            reader = ArrayRecordReader(scratch.name, "readahead_buffer_size:0,max_parallelism:0")
            records = reader.read_all()
            reader.close()
        except RuntimeError as error:
            raise DamageError(
                "a file of rows is damaged",
                {"object": where, "length": counted(len(data), "byte"), "cause": str(error).split(";")[0]},
                "copy it again from its source, or write it again",
            ) from error
    if count is not None and len(records) != count:
        raise DamageError(
            "a file of rows has the wrong number of rows",
            {"object": where, "found": len(records), "expected": count},
            "copy it again from its source, or write it again",
        )
    return records


@contextmanager
def _scratch_file() -> Iterator[IO[bytes]]:
    """A temporary file with a name, since ArrayRecord opens nothing else."""
    try:
        with tempfile.NamedTemporaryFile(prefix="distillcache-", suffix=".array_record") as scratch:
            yield scratch
    except OSError as error:
        raise _scratch_failure(str(error)) from error


def _scratch_failure(cause: str) -> StorageError:
    return StorageError(
        "a file of rows cannot be copied to the temporary folder",
        {"folder": tempfile.gettempdir(), "cause": cause},
        "free some space there, or set TMPDIR to another folder",
    )


def teacher_batch(rows: Sequence[Row | None], batch_rows: int, row_tokens: int) -> list[Int32[np.ndarray, "B T"]]:
    """tokens, positions, segment_ids of one call of the teacher; None is a row of padding, and these fill it up."""
    arrays = []
    for name in ("tokens", "positions", "segment_ids"):
        array = np.zeros((batch_rows, row_tokens), np.int32)
        for place, row in enumerate(rows):
            if row is not None:
                array[place] = getattr(row, name)
        arrays.append(array)
    return arrays


class RowsFile(Config):
    """One file of rows, as the index knows it."""

    name: RelativeName = Field(description="key below the rows folder")
    rows: Size = Field(description="records in the file")
    length: Size = Field(description="bytes")
    digest: str = Field(description="of the file's bytes")


class RowsIndex(Config):
    """`rows.json`: the content of a rows folder and the settings that made it."""

    format: Literal["distillcache-rows/1"] = "distillcache-rows/1"
    rows: Size = Field(description="N")
    row_tokens: Size = Field(description="T")
    eval_indices: tuple[int, ...] = Field(description="the rows that are held out, ascending")
    documents: Size = Field(description="documents in the text")
    skipped: int = Field(
        default=0,
        ge=0,
        exclude_if=lambda value: value == 0,
        description="records of the text that data.on_error left out; skipped.jsonl lists them",
    )
    tokens: Size = Field(description="tokens in the rows, padding not counted")
    vocab_size: Size = Field(description="the highest id that the tokenizer can give, plus one")
    eos_id: int = Field(ge=0, description="the id that ends every document")
    tokenizer_digest: str = Field(description="of the tokenizer that made the tokens")
    text_digest: str = Field(description="of the input files' bytes, in reading order")
    content_digest: str = Field(description="of all records in order: the same however they are split into files")
    data: DataConfig = Field(description="the config that made the rows")
    rows_per_file: Size = Field(description="in every file but the last")
    files: tuple[RowsFile, ...] = Field(description="in the order of their rows")

    @property
    def eval_rows(self) -> int:
        """The number of held-out rows."""
        return len(self.eval_indices)


class RowReader:
    """The rows of a rows folder, by their number; every file is checked against its digest when it is loaded."""

    def __init__(self, store: Store, prefix: str = "", files_kept: int = _LOADED_FILES) -> None:
        """
        Args:
            prefix: the folder's key below the store: empty, or ending in a slash.
            files_kept: how many files of rows stay in memory; more than the default are for rows in random order.
        """
        self._store, self._prefix = store, prefix
        where = store.where(prefix + INDEX_KEY)
        data = store.read(prefix + INDEX_KEY)
        if data is None:
            raise InputError("there are no finished rows here", {"missing": where}, "run distillcache prepare")
        self.index = from_canonical(RowsIndex, data, where)
        self._records = lru_cache(maxsize=files_kept)(self._load)

    def __len__(self) -> int:
        return self.index.rows

    def __getitem__(self, number: int) -> Row:
        if not 0 <= number < len(self):
            raise IndexError(f"row {number} of {len(self)}")
        return self.slice(number, number + 1)[0]

    def slice(self, start: int, stop: int) -> list[Row]:
        """Rows `start` to `stop - 1`."""
        rows = []
        for file, numbers in groupby(range(start, stop), lambda number: number // self.index.rows_per_file):
            records = self._records(file)
            first = file * self.index.rows_per_file
            rows.extend(
                decode_row(records[number - first], f"{self._where(file)} row {number - first}") for number in numbers
            )
        return rows

    def without_targets(self) -> tuple[Split, ...]:
        """The splits in which no token is a target. Of each, rows are read until one has targets: usually one row."""
        held_out = set(self.index.eval_indices)
        numbers = {
            "train": (number for number in range(len(self)) if number not in held_out),
            "eval": self.index.eval_indices,
        }
        sizes = {"train": len(self) - len(held_out), "eval": len(held_out)}

        def has_targets(split: Split) -> bool:
            return any(num_targets(row.segment_ids, row.loss_mask) for row in map(self.__getitem__, numbers[split]))

        return tuple(split for split in SPLITS if sizes[split] and not has_targets(split))

    def skipped(self) -> bytes:
        """The list of skipped records, one JSON object a line; empty where none was skipped, or the list is gone."""
        return (self._store.read(self._prefix + SKIPPED_KEY) or b"") if self.index.skipped else b""

    def _where(self, file: int) -> str:
        return self._store.where(self._prefix + self.index.files[file].name)

    def _load(self, file: int) -> list[bytes]:
        entry, where = self.index.files[file], self._where(file)
        data = self._store.read(self._prefix + entry.name)
        found = "nothing" if data is None else f"{counted(len(data), 'byte')}, digest {digest_bytes(data)}"
        expected = f"{counted(entry.length, 'byte')}, digest {entry.digest}"
        if data is None or found != expected:
            raise DamageError(
                "a file of rows is not what was committed",
                {"object": where, "found": found, "expected": expected},
                "copy it again from its source, or prepare the rows again in another folder",
            )
        return unpack_rows(data, entry.rows, where)


def _not_a_record(where: str, found: str, expected: str) -> DamageError:
    return DamageError(
        "the bytes of a row are damaged",
        {"row": where, "found": found, "expected": expected},
        "copy its file again from its source, or write it again",
    )
