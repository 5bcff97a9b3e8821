"""Text to rows: tokenise, pack, hold some out, and write a rows folder.

    distillcache prepare --out rows --data.path corpus --data.tokenizer tokenizer.json --data.row-tokens 1024

Documents are joined end to end, each closed by EOS, and cut every T tokens, so that only the last row is padded. A
document that is cut goes on in the next row as a document of its own, from position 0: no row needs its neighbour.
The folder's bytes are a pure function of the text, the tokenizer and the config.
"""

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import grain
import numpy as np
import xxhash
from jaxtyping import Int32

from cache_builder.text import Document, documents, inputs_digest, text_files
from models.tokenizer import TextTokenizer, load_tokenizer
from schemas.canonical import from_canonical, to_canonical
from schemas.config import DataConfig, PrepareConfig
from schemas.digest import digest_bytes
from schemas.errors import ConfigError, InputError, PlanMismatchError, StorageError
from schemas.progress import Progress
from schemas.rows import INDEX_KEY, TOKENIZER_KEY, Row, RowReader, RowsFile, RowsIndex, encode_row, pack_rows
from schemas.storage import Store, is_url

BATCH_DOCUMENTS = 256  # tokenised at once, on all cores
BATCH_CHARACTERS = 1 << 22  # and no more than these, or one document: bounds the memory
KB = 1000
TOKENS_PER_FILE = 1 << 22  # 56 MB of records: they are packed in memory, and a reader loads whole files

# What a user may have changed, and how the message about it names it.
_COMPARED = ("max_rows", "row_tokens", "eval_rows", "eval_seed", "text_field", "eos_token")


@dataclass
class Corpus:
    """What went into the rows."""

    documents: int = 0
    tokens: int = 0


def prepare_rows(
    config: PrepareConfig,
    *,
    tokenizer: TextTokenizer | None = None,
    rows_per_file: int | None = None,
) -> RowsIndex:
    """Write the rows of a corpus, or find that they are there already.

    Args:
        config: which text, and where the rows go.
        tokenizer: default: the one that `config.data.tokenizer` names.
        rows_per_file: default: as many as hold `TOKENS_PER_FILE`.

    Raises:
        InputError: text or tokenizer that cannot be used, or no row left to train on.
        PlanMismatchError: the folder holds the finished rows of other text or another config.
    """
    data, store = config.data, Store(config.out)
    tokenizer = tokenizer or _named_tokenizer(data)
    text_digest = inputs_digest(data)
    finished = _finished_rows(store, data, tokenizer, text_digest)
    if finished is not None:
        return finished
    store.clear_stale_locks()
    # First, since it is small: a place that cannot be written shows before the long work.
    store.write(TOKENIZER_KEY, tokenizer.to_json().encode())
    corpus = Corpus()
    total = sum(file.stat().st_size for file in text_files(data))
    bar = Progress("prepare", total // KB, unit="kB")
    packed = pack_documents(token_arrays(data, tokenizer, corpus, bar), data.row_tokens)
    with bar, _spooled_rows(_count_tokens(islice(packed, data.max_rows), corpus)) as spool:
        rows = os.fstat(spool.fileno()).st_size // (3 * 4 * data.row_tokens)
        held_out = draw_eval_rows(rows, data.eval_rows, data.eval_seed)
        rows_per_file = rows_per_file or max(1, TOKENS_PER_FILE // data.row_tokens)
        files, content_digest = _write_files(store, _read_spool(spool, data.row_tokens, set(held_out)), rows_per_file)
    index = RowsIndex(
        rows=rows,
        row_tokens=data.row_tokens,
        eval_indices=held_out,
        documents=corpus.documents,
        tokens=corpus.tokens,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        tokenizer_digest=tokenizer.digest,
        text_digest=text_digest,
        content_digest=content_digest,
        data=data,
        rows_per_file=rows_per_file,
        files=files,
    )
    if store.create(INDEX_KEY, to_canonical(index)):
        return index
    # Another process prepared the same folder meanwhile.
    return _finished_rows(store, data, tokenizer, text_digest) or index


def open_rows(data: DataConfig) -> RowReader | None:
    """The prepared rows that `data.path` names; None where it names text.

    Raises:
        ConfigError: the config states a setting of the rows, and they were made with another.
    """
    paths = [data.path] if isinstance(data.path, str) else data.path
    if len(paths) != 1 or not (is_url(paths[0]) or Path(paths[0].removeprefix("file://")).expanduser().is_dir()):
        return None
    store = Store(paths[0])
    if store.read(INDEX_KEY) is None:
        return None
    reader = RowReader(store)
    for name in _COMPARED:
        stated, made_with = getattr(data, name), getattr(reader.index.data, name)
        if name in data.model_fields_set and stated != made_with:  # a default states nothing
            raise ConfigError(
                "the prepared rows were made with another config",
                {"rows": store.url, f"data.{name}": f"there {made_with!r}, here {stated!r}"},
                f"leave data.{name} out, or prepare the text again",
            )
    return reader


def token_arrays(
    data: DataConfig, tokenizer: TextTokenizer, corpus: Corpus, bar: Progress
) -> Iterator[Int32[np.ndarray, "length"]]:
    """The tokens of every document, closed by EOS; counts the documents into `corpus`."""
    for batch in _batches(documents(data)):
        for ids in _encode(tokenizer, batch):
            corpus.documents += 1
            yield np.asarray(ids, np.int32)
        bar.advance(batch[-1].read_bytes // KB - bar.done)


def pack_documents(
    token_arrays: Iterable[Int32[np.ndarray, "length"]], row_tokens: int
) -> Iterator[Int32[np.ndarray, "columns T"]]:
    """Rows of T tokens as columns tokens, positions, segment_ids (0 = padding, only in the last row).

    Grain's concat-then-split: documents in order, cut at row ends, positions and segments counted anew in each row.
    """
    packed = grain.experimental.ConcatThenSplitIterDataset(
        _Once(iter(token_arrays)), length_struct={"tokens": row_tokens}
    )
    for row in packed:
        yield np.stack([row["tokens"], row["tokens_positions"], row["tokens_segment_ids"]])


def _count_tokens(
    rows: Iterable[Int32[np.ndarray, "columns T"]], corpus: Corpus
) -> Iterator[Int32[np.ndarray, "columns T"]]:
    for row in rows:
        corpus.tokens += int(np.count_nonzero(row[2]))
        yield row


def draw_eval_rows(rows: int, eval_rows: int, seed: int) -> tuple[int, ...]:
    """Which of the rows are held out, ascending: drawn from all of them, without replacement.

    Raises:
        InputError: no row would be left to train on.
    """
    if eval_rows >= rows:
        most = f"{rows - 1} or less" if rows > 1 else "0"
        raise InputError(
            "the text is too short to hold out so many rows",
            {"data.eval_rows": eval_rows, "found": f"{rows} rows in all", "expected": f"{eval_rows + 1} or more"},
            f"set data.eval_rows to {most}, or name more text, or make data.row_tokens smaller",
        )
    drawn = np.random.Generator(np.random.PCG64(seed)).choice(rows, eval_rows, replace=False)
    return tuple(sorted(drawn.tolist()))


def _batches(source: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    characters = 0
    for document in source:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode(tokenizer: TextTokenizer, batch: list[Document]) -> list[list[int]]:
    try:
        return tokenizer.encode_documents([document.text for document in batch])
    except Exception as error:  # tokenizers raises plain Exception
        raise InputError(
            "the tokenizer cannot encode a document",
            {"from": batch[0].where, "to": batch[-1].where, "cause": error},
            "use a tokenizer that knows every character (byte fallback or an unknown token)",
        ) from error


class _OnceIterator(grain.DatasetIterator):
    """Wraps a plain iterator: Grain asks for a state, but nobody resumes within a corpus."""

    def __init__(self, arrays: Iterator[np.ndarray]) -> None:
        super().__init__()
        self._arrays = arrays

    def __next__(self) -> dict[str, np.ndarray]:
        return {"tokens": next(self._arrays)}

    def get_state(self) -> dict[str, Any]:
        return {}

    def set_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError("a corpus is read once, from its start")


class _Once(grain.IterDataset):
    """A Grain data set that can be iterated once."""

    def __init__(self, arrays: Iterator[np.ndarray]) -> None:
        super().__init__()
        self._arrays = arrays

    def __iter__(self) -> _OnceIterator:
        return _OnceIterator(self._arrays)


@contextmanager
def _spooled_rows(rows: Iterable[Int32[np.ndarray, "columns T"]]) -> Iterator[IO[bytes]]:
    """A temporary file of the rows: the eval rows can be drawn only when their number is known.

    A corpus need not fit in memory; the file takes 12 bytes a token.
    """
    try:
        with tempfile.TemporaryFile(prefix="distillcache-") as spool:
            for row in rows:
                spool.write(row.tobytes())
            spool.seek(0)
            yield spool
    except OSError as error:
        raise StorageError(
            "packed rows cannot be kept in the temporary folder",
            {"folder": tempfile.gettempdir(), "cause": error},
            "free some space there, or set TMPDIR to another folder",
        ) from error


def _read_spool(spool: IO[bytes], row_tokens: int, held_out: set[int]) -> Iterator[Row]:
    size, number = 3 * 4 * row_tokens, 0
    while data := spool.read(size):
        tokens, positions, segment_ids = np.frombuffer(data, np.int32).reshape(3, row_tokens)
        split = "eval" if number in held_out else "train"
        yield Row(tokens, positions, segment_ids, loss_mask=segment_ids > 0, split=split)
        number += 1


def _write_files(store: Store, rows: Iterator[Row], rows_per_file: int) -> tuple[tuple[RowsFile, ...], str]:
    """The files as written, and the digest of all records in order."""
    files: list[RowsFile] = []
    content = xxhash.xxh3_128()
    records: list[bytes] = []

    def write_file() -> None:
        name, packed = f"rows/{len(files):05d}.array_record", pack_rows(records)
        store.write(name, packed)
        files.append(RowsFile(name=name, rows=len(records), length=len(packed), digest=digest_bytes(packed)))
        records.clear()

    for row in rows:
        record = encode_row(row)
        content.update(record)
        records.append(record)
        if len(records) == rows_per_file:
            write_file()
    if records:
        write_file()
    return tuple(files), content.hexdigest()


def _finished_rows(store: Store, data: DataConfig, tokenizer: TextTokenizer, text_digest: str) -> RowsIndex | None:
    """The index that is there already, if it is of the same work; None where the folder is not finished."""
    stored = store.read(INDEX_KEY)
    if stored is None:
        return None
    index = from_canonical(RowsIndex, stored, store.where(INDEX_KEY))
    pairs = {f"data.{name}": (getattr(index.data, name), getattr(data, name)) for name in _COMPARED}
    # Content counts, not the paths; those only tell the user which text it was.
    if index.text_digest != text_digest:
        pairs["data.path"] = (index.data.path, data.path)
        pairs["the text's digest"] = (index.text_digest, text_digest)
    pairs["the tokenizer's digest"] = (index.tokenizer_digest, tokenizer.digest)
    pairs["the tokenizer's EOS"] = (index.eos_id, tokenizer.eos_id)
    facts = {name: f"there {there!r}, here {here!r}" for name, (there, here) in pairs.items() if there != here}
    if facts:
        raise PlanMismatchError(
            "the folder holds the rows of another config",
            {"rows": store.where(INDEX_KEY), **facts},
            "name another folder, or use the config that these rows were made with",
        )
    return index


def _named_tokenizer(data: DataConfig) -> TextTokenizer:
    if data.tokenizer is None:
        raise ConfigError(
            "no tokenizer is named",
            {"data.tokenizer": None},
            "set data.tokenizer to a tokenizer.json, an HF directory or a .gguf",
        )
    return load_tokenizer(data.tokenizer, eos_token=data.eos_token)
