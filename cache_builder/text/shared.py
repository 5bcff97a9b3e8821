"""Rows by many processes: they share input files, then files of rows, only through leases in the store.

Every process goes through the same three stages. A work unit is leased, done and receipted; a process that dies is
replaced by one that sees its lease expire; and what is receipted is never done again, so that a killed command can
resume.

    1. every input file      -> chunks of the token stream, and a receipt with the file's digest
    2. every file of rows    -> a pure function of the stream (packing.py)
    3. once                  -> the digest of all records, rows.json, and the unfinished folder goes
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from distillcache.cache_builder.text.digest import remember_inputs, total_digest
from distillcache.cache_builder.text.rows_files import (
    RowsJob,
    RowsPlanned,
    commit_index,
    plan_rows,
    rows_index,
    stored_content_digest,
    write_rows_file,
)
from distillcache.cache_builder.text.rows_mark import keeping_rows, remove_mark
from distillcache.cache_builder.text.token_stream import (
    UNFINISHED,
    ChunksGone,
    ChunkStream,
    FileReceipt,
    StreamIndex,
    Unfinished,
    Watch,
    job_fingerprint,
    lease_key,
    skipped_in,
    write_chunks,
)
from distillcache.schemas.cache.lease import Leases
from distillcache.schemas.cache.waiting import Waiting
from distillcache.schemas.errors import DamageError, FolderTakenError, Interrupted, StorageError
from distillcache.schemas.format.canonical import from_canonical, to_canonical
from distillcache.schemas.format.rows import INDEX_KEY, RowsFile
from distillcache.schemas.runtime.progress import Progress
from distillcache.schemas.runtime.signals import StopRequest
from distillcache.schemas.store.store import Store

POLL_S, LONGEST_POLL_S = 0.2, 5.0  # how often to look for others' receipts: soon at first, then rarely
REQUESTS = 32  # receipts read at a time
TRIES = 3  # the folder may go once while another process gives up, hardly twice
KB = 1000


@dataclass(frozen=True)
class Share:
    """Which of the processes this is."""

    process_id: int
    num_processes: int
    claim_expiry_s: float


def prepare_shared(store: Store, job: RowsJob, share: Share, stop: StopRequest, quiet: bool = False) -> str | None:
    """Take part in making the rows until `rows.json` is there, by any process.

    Returns: the text's digest; None where the rows were finished before this process had learnt it.

    Raises:
        InputError: text that cannot be used.
        Interrupted: the process was asked to stop; what is receipted stays.
    """
    for _ in range(TRIES):
        work = _Work(store, job, share, stop, quiet)
        digest = None
        try:
            digest = work.through()
        except ChunksGone:
            pass
        except (StorageError, DamageError, FolderTakenError):  # over what another process has tidied up, perhaps
            if store.read(INDEX_KEY) is None:
                raise
        finally:
            work.leases.close()
        if store.read(INDEX_KEY) is not None:
            store.delete_folder(UNFINISHED)  # what came late may have begun it anew
            remove_mark(store)
            return digest
    raise StorageError(
        "the unfinished folder is deleted again and again",
        {"folder": store.where(UNFINISHED)},
        "run the command in a folder that nothing else tidies up",
    )


class _Work:
    """The three stages, for one process."""

    def __init__(self, store: Store, job: RowsJob, share: Share, stop: StopRequest, quiet: bool) -> None:
        self._store, self._job, self._share, self._stop, self._quiet = store, job, share, stop, quiet
        fingerprint = job_fingerprint(job)
        self._folder = Unfinished(keeping_rows(store, fingerprint), fingerprint)
        self._receipts: dict[int, FileReceipt] = {}
        self.leases = Leases(store, self._folder.fingerprint, share.claim_expiry_s, key=lease_key)

    def through(self) -> str:
        index = self._folder.read_streams() or self._read_files()
        stream = ChunkStream(self._folder, index)
        planned = plan_rows(self._job, stream.length, len(skipped_in(index, self._job)))
        self._write_rows(stream, planned)
        self._share_out(
            range(1),
            len(self._job.files) + planned.num_files,
            lambda: {0} if self._store.read(INDEX_KEY) is not None else set(),
            lambda _: finish_rows(self._folder, stream, planned, index),
        )
        return text_digest_of(index, self._job)

    def _read_files(self) -> StreamIndex:
        """Stage 1: the chunks of every file."""
        sizes = [file.size for file in self._job.files]
        with self._bar("prepare", sum(sizes) // KB, "kB") as bar:
            counted: set[int] = set()

            def finished() -> set[int]:
                found = self._folder.receipts("files")
                bar.skip(sum(sizes[number] for number in found - counted) // KB)
                counted.update(found)
                return found

            def read_file(number: int) -> None:
                watch = _BarWatch(self._stop, bar, self._store)
                receipt = write_chunks(self._folder, self._job, number, watch, digest_only=self._is_beyond(number))
                self._receipts[number] = receipt
                counted.add(number)

            self._share_out(range(len(sizes)), 0, finished, read_file)
        return gather_streams(self._folder, len(sizes))

    def _write_rows(self, stream: ChunkStream, planned: RowsPlanned) -> None:
        """Stage 2: every file of rows."""
        with self._bar("pack", planned.rows, "rows") as bar:

            def write_file(number: int) -> None:
                write_packed(self._folder, stream, planned, number)
                bar.advance(min(planned.rows - number * self._job.rows_per_file, self._job.rows_per_file))

            self._share_out(
                range(planned.num_files), len(self._job.files), lambda: self._folder.receipts("rows"), write_file
            )

    def _share_out(
        self, units: Sequence[int], first_lease: int, finished: Callable[[], set[int]], work: Callable[[int], None]
    ) -> None:
        """Lease and do work units, until all are finished, here or elsewhere.

        Args:
            first_lease: the lease of work unit 0; the others follow.
            finished: looks which work units are.
        """
        left, pause, waiting = self._in_order(units), POLL_S, Waiting("for what another process prepares")
        while True:
            done = finished()
            left = [unit for unit in left if unit not in done]
            if not left:
                return
            worked = False
            for unit in left:
                stop_if_asked(self._stop, self._store)
                if not self.leases.take(first_lease + unit):
                    continue
                worked = True
                # Since `done` was read, another process may have finished it. This lease is then held until `close`
                # removes it, since the folder with its leases may be gone.
                if unit not in finished():
                    self._raise_if_all_is_done()
                    work(unit)
                    self.leases.done(first_lease + unit)
            pause = POLL_S if worked else min(2 * pause, LONGEST_POLL_S)
            if worked:
                waiting.over()
            else:
                waiting.tell(self.leases.holder())
                time.sleep(pause)

    def _raise_if_all_is_done(self) -> None:
        """A receipt that is not there may have gone with the folder: `rows.json` is there before any goes."""
        if self._store.read(INDEX_KEY) is not None:
            raise ChunksGone(INDEX_KEY)

    def _in_order(self, units: Sequence[int]) -> list[int]:
        """One's own first. Where rows are limited, front to back: what comes late may not matter at all."""
        if self._job.most_tokens is not None:
            return list(units)
        mine = [unit for unit in units if unit % self._share.num_processes == self._share.process_id]
        return mine + sorted(set(units) - set(mine))

    def _is_beyond(self, number: int) -> bool:
        """Return whether the files before this one are known to fill all rows that are requested."""
        if self._job.most_tokens is None:
            return False
        unknown = [each for each in range(number) if each not in self._receipts]
        found = dict(zip(unknown, read_receipts(self._folder, unknown), strict=True))
        self._receipts |= {each: receipt for each, receipt in found.items() if receipt is not None}
        before = [self._receipts.get(each) for each in range(number)]
        return all(before) and self._job.is_enough(sum(receipt.tokens for receipt in before if receipt))

    def _bar(self, title: str, total: int, unit: str) -> Progress:
        return Progress(title, total, unit=unit, quiet=self._quiet)


class _BarWatch(Watch):
    """Moves the bar by what is read, and stops between two documents when asked."""

    def __init__(self, stop: StopRequest, bar: Progress, store: Store) -> None:
        self._stop, self._bar, self._store, self._counted = stop, bar, store, 0

    def read(self, consumed: int) -> None:
        stop_if_asked(self._stop, self._store)
        self._bar.advance(consumed // KB - self._counted)
        self._counted = consumed // KB


def stop_if_asked(stop: StopRequest, store: Store, kept: str = "what is finished of files and of rows") -> None:
    """Raise `Interrupted` where the process was asked to stop."""
    if stop.requested:
        raise Interrupted(
            "preparing was asked to stop",
            {"out": store.url, "kept": kept},
            "run the same command again to resume",
        )


def read_receipts(folder: Unfinished, numbers: Sequence[int]) -> list[FileReceipt | None]:
    """The receipts of these input files; None where there is none."""
    with ThreadPoolExecutor(REQUESTS) as pool:
        return list(pool.map(folder.read_receipt, numbers))


def gather_streams(folder: Unfinished, files: int) -> StreamIndex:
    """All receipts in one object, once they exist; the first caller writes it for the others.

    Raises:
        ChunksGone: a receipt is not there any more.
    """
    index = folder.read_streams()
    if index is not None:
        return index
    receipts = [receipt for receipt in read_receipts(folder, range(files)) if receipt is not None]
    if len(receipts) < files:
        raise ChunksGone(folder.streams_key)
    index = StreamIndex(files=tuple(receipts))
    folder.store.create(folder.streams_key, to_canonical(index))
    return index


def write_packed(folder: Unfinished, stream: ChunkStream, planned: RowsPlanned, number: int) -> RowsFile:
    """Store one file of rows, then its receipt."""
    file = write_rows_file(folder.store, number, planned.records(stream, number))
    folder.store.write(folder.receipt_key("rows", number), to_canonical(file))
    return file


def finish_rows(folder: Unfinished, stream: ChunkStream, planned: RowsPlanned, index: StreamIndex) -> None:
    """The digest of all rows, and `rows.json`. Safe to repeat."""
    job, store = planned.job, folder.store
    with ThreadPoolExecutor(REQUESTS) as pool:
        files = list(pool.map(lambda number: _read_rows_receipt(folder, number), range(planned.num_files)))
    text_digest = text_digest_of(index, job)
    documents = stream.documents_until(planned.tokens)
    content_digest = stored_content_digest(store, files)
    remember_inputs(store, job.files, text_digest)
    skipped = skipped_in(index, job)
    commit_index(store, rows_index(planned, documents, files, content_digest, text_digest, len(skipped)), skipped)


def text_digest_of(index: StreamIndex, job: RowsJob) -> str:
    """The digest of the text, from the receipts of its files."""
    return total_digest((file.line for file in index.files), job.data, job.tokenizer)


def _read_rows_receipt(folder: Unfinished, number: int) -> RowsFile:
    key = folder.receipt_key("rows", number)
    data = folder.store.read(key)
    if data is None:
        raise ChunksGone(key)
    return from_canonical(RowsFile, data, folder.store.where(key))
