"""The token stream of a corpus as objects in the store, while many processes make it.

    <out>/unfinished/<fingerprint>/
        claims/                     who is at work on what
        tokens/00003/00000          a *chunk*: marked tokens of input file 3
        files/00003.json            the receipt of input file 3: its digest and its chunks
        streams.json                all receipts in one, once they are there
        rows/00007.json             the receipt of one file of rows

The fingerprint is of everything that decides these bytes. The folder goes when `rows.json` is written.
"""

import json
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import closing
from functools import lru_cache
from itertools import accumulate

import numpy as np
from pydantic import Field

from distillcache.cache_builder.text.files.inputs import InputReader, input_files
from distillcache.cache_builder.text.packing import MARKED, count_begins
from distillcache.cache_builder.text.rows_files import RowsJob
from distillcache.cache_builder.text.skipped import Skipped, SkippedRecord
from distillcache.cache_builder.text.tokenise import Pace
from distillcache.models.text.tokenizer import TextTokenizer
from distillcache.schemas.config import Config, DataConfig
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import DamageError
from distillcache.schemas.format.canonical import from_canonical, to_canonical
from distillcache.schemas.format.digest import digest_bytes
from distillcache.schemas.store.store import Store

UNFINISHED = "unfinished"
CHUNK_TOKENS = 1 << 22  # 20 MiB: few objects, and two of them are held while rows are packed
CHUNKS_KEPT = 2  # rows are packed front to back: one chunk is read on, the next begun


class ChunkEntry(Config):
    """One chunk of an input file's tokens."""

    tokens: int
    documents: int
    digest: str = Field(description="of the chunk's bytes")


class FileReceipt(Config):
    """An input file that is read and tokenised as far as it matters."""

    line: str = Field(description="the file's line in the digest of the text")
    parts: tuple[ChunkEntry, ...]
    skipped: tuple[SkippedRecord, ...] = Field(
        default=(), exclude_if=lambda value: not value, description="what data.on_error left out"
    )

    @property
    def tokens(self) -> int:
        return sum(chunk.tokens for chunk in self.parts)


class StreamIndex(Config):
    """All receipts, in the order of the files."""

    files: tuple[FileReceipt, ...]


def skipped_in(index: StreamIndex, job: RowsJob) -> list[Skipped]:
    """List the records left out of the text, as far as its tokens matter: the same as one process meets in reading
    order.
    """
    found, before = [], 0
    for file in index.files:
        found += [Skipped(each.where, each.error) for each in file.skipped if not job.is_enough(before + each.tokens)]
        before += file.tokens
    return found


class ChunksGone(Exception):
    """Signals that the unfinished folder's content is gone: the rows are finished, or the folder was deleted."""


class Unfinished:
    """The keys of one unfinished folder, and what they hold."""

    def __init__(self, store: Store, fingerprint: str) -> None:
        self.store, self.fingerprint = store, fingerprint
        self._prefix = f"{UNFINISHED}/{fingerprint}"

    def receipt_key(self, kind: str, number: int) -> str:
        """kind: `files` or `rows`."""
        return f"{self._prefix}/{kind}/{number:05d}.json"

    def chunk_key(self, file: int, chunk: int) -> str:
        return f"{self._prefix}/tokens/{file:05d}/{chunk:05d}"

    @property
    def streams_key(self) -> str:
        return f"{self._prefix}/streams.json"

    def receipts(self, kind: str) -> set[int]:
        """The numbers of which there are receipts."""
        keys = self.store.keys(f"{self._prefix}/{kind}/")
        return {int(key.rsplit("/", 1)[1].removesuffix(".json")) for key in keys}

    def read_receipt(self, number: int) -> FileReceipt | None:
        key = self.receipt_key("files", number)
        data = self.store.read(key)
        return None if data is None else from_canonical(FileReceipt, data, self.store.where(key))

    def read_streams(self) -> StreamIndex | None:
        data = self.store.read(self.streams_key)
        return None if data is None else from_canonical(StreamIndex, data, self.store.where(self.streams_key))


def lease_key(fingerprint: str, unit: int) -> str:
    return f"{UNFINISHED}/{fingerprint}/claims/{unit:05d}.json"


def job_fingerprint(job: RowsJob) -> str:
    """Digest everything that determines the chunks and the rows; the location of the files does not.

    Raises:
        InputError: a file cannot be read.
    """
    settings = job.data.model_dump(mode="json", exclude={"path", "tokenizer"})
    template = None if job.tokenizer.chat is None or job.data.format != "chat" else job.tokenizer.chat.digest
    files = [[file.kind, file.size, mark] for file, mark in zip(job.files, job.marks, strict=True)]
    content = [settings, job.tokenizer.digest, template, job.rows_per_file, CHUNK_TOKENS, files]
    return digest_bytes(json.dumps(content, sort_keys=True).encode())


def rows_fingerprint(data: DataConfig, tokenizer: TextTokenizer) -> str:
    """`job_fingerprint` of the rows of a text, before anything is known of their number."""
    return job_fingerprint(RowsJob(data, tokenizer, tuple(input_files(data)), 0))


def write_chunks(folder: Unfinished, job: RowsJob, number: int, watch: "Watch", *, digest_only: bool) -> FileReceipt:
    """Read input file `number`, store its tokens in chunks, then its receipt.

    Args:
        watch: receives the number of bytes read, and may stop the work.
        digest_only: its tokens are known not to matter.
    """
    file, chunks, skipped = job.files[number], [], []
    with InputReader(file) as reader:
        if not digest_only:
            pace = Pace(reader)
            found = job.marked(file, reader, pace)
            with closing(found):
                for chunk in _chunks(_watched(found, pace, watch), job, skipped):
                    data = chunk.tobytes()
                    folder.store.write(folder.chunk_key(number, len(chunks)), data)
                    chunks.append(
                        ChunkEntry(tokens=chunk.size, documents=count_begins(chunk), digest=digest_bytes(data))
                    )
        receipt = FileReceipt(line=reader.finish(), parts=tuple(chunks), skipped=tuple(skipped))
    folder.store.write(folder.receipt_key("files", number), to_canonical(receipt))
    return receipt


class Watch:
    """Callbacks of long work: progress and requests to stop. This one does nothing."""

    def read(self, consumed: int) -> None:
        """Report bytes read of the current input file; raise to stop the work."""


def _watched(found: Iterator[np.ndarray | Skipped], pace: Pace, watch: Watch) -> Iterator[np.ndarray | Skipped]:
    for marked in found:
        watch.read(pace.done)
        yield marked


def _chunks(found: Iterator[np.ndarray | Skipped], job: RowsJob, skipped: list[SkippedRecord]) -> Iterator[np.ndarray]:
    """Documents joined to chunks of CHUNK_TOKENS or somewhat more, until no further one matters.

    Args:
        skipped: gets the notes of what was left out.
    """
    gathered: list[np.ndarray] = []
    size = total = 0
    for marked in found:
        if isinstance(marked, Skipped):
            skipped.append(SkippedRecord(where=marked.where, error=marked.error, tokens=total))
            continue
        gathered.append(marked)
        size, total = size + marked.size, total + marked.size
        if size >= CHUNK_TOKENS:
            yield np.concatenate(gathered)
            gathered, size = [], 0
        if job.is_enough(total):
            break
    if gathered:
        yield np.concatenate(gathered)


class ChunkStream:
    """The token stream that the chunks of all files make."""

    def __init__(self, folder: Unfinished, index: StreamIndex) -> None:
        self._folder = folder
        self._chunks = [
            (file, number, chunk)
            for file, receipt in enumerate(index.files)
            for number, chunk in enumerate(receipt.parts)
        ]
        self._ends = list(accumulate(chunk.tokens for _, _, chunk in self._chunks))
        self._load = lru_cache(maxsize=CHUNKS_KEPT)(self._load_chunk)

    @property
    def length(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """The marked tokens `start` to `stop - 1`.

        Raises:
            ChunksGone: a chunk is not there any more.
            DamageError: a chunk is not what was written.
        """
        chunks, place = [], bisect_right(self._ends, start)
        while start < stop:
            first = self._ends[place] - self._chunks[place][2].tokens
            chunk = self._load(place)[start - first : stop - first]
            chunks.append(chunk)
            start, place = start + chunk.size, place + 1
        return np.concatenate(chunks)

    def documents_until(self, tokens: int) -> int:
        """Count the documents that begin at or before token `tokens`."""
        whole = bisect_right(self._ends, tokens)
        count = sum(chunk.documents for _, _, chunk in self._chunks[:whole])
        start = self._ends[whole - 1] if whole else 0
        stop = min(tokens + 1, self.length)
        return count + (count_begins(self.read(start, stop)) if stop > start else 0)

    def _load_chunk(self, place: int) -> np.ndarray:
        file, number, chunk = self._chunks[place]
        key = self._folder.chunk_key(file, number)
        data = self._folder.store.read(key)
        if data is None:
            raise ChunksGone(key)
        if digest_bytes(data) != chunk.digest:
            raise DamageError(
                "tokens in the unfinished folder are not what was written",
                {"object": self._folder.store.where(key), "found": counted(len(data), "byte")},
                f"delete {self._folder.store.where(UNFINISHED)} and run the same command again",
            )
        return np.frombuffer(data, MARKED)
