"""Text to rows: tokenise, pack, hold out rows for evaluation, and write a rows folder.

    distillcache prepare --out rows --data.path corpus --data.tokenizer tokenizer.json --data.row-tokens 1024

Documents are joined end to end, each closed by EOS, and cut every T tokens, so that only the last row is padded.
The folder's bytes are a pure function of the text, the tokenizer and the config. A small text is prepared by one
process in one go; a large one, or one for several processes, in work units that outlive a process (text/shared.py).
"""

import logging
import multiprocessing
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress

import xxhash

from distillcache.cache_builder.text.digest import known_digest, remember_inputs, total_digest
from distillcache.cache_builder.text.files.inputs import InputFile, InputReader, input_files, named_kind
from distillcache.cache_builder.text.packing import SpooledStream, count_begins
from distillcache.cache_builder.text.rows_files import RowsJob, commit_index, plan_rows, rows_index, write_rows_file
from distillcache.cache_builder.text.rows_mark import (
    is_marked,
    keeping_rows,
    refuse_foreign_folder,
    remove_mark,
    write_mark,
)
from distillcache.cache_builder.text.shared import KB, Share, prepare_shared, stop_if_asked
from distillcache.cache_builder.text.skipped import Skipped
from distillcache.cache_builder.text.token_stream import UNFINISHED, job_fingerprint
from distillcache.cache_builder.text.tokenise import Pace
from distillcache.models.text.tokenizer import TextTokenizer, load_tokenizer
from distillcache.schemas.config import DataConfig, PrepareConfig
from distillcache.schemas.errors import (
    ConfigError,
    DistillcacheError,
    FolderTakenError,
    PlanMismatchError,
    StorageError,
)
from distillcache.schemas.format.canonical import from_canonical
from distillcache.schemas.format.rows import INDEX_KEY, TOKENIZER_KEY, RowReader, RowsIndex
from distillcache.schemas.runtime.progress import Progress
from distillcache.schemas.runtime.signals import StopRequest, watch_for_stop
from distillcache.schemas.store.names import refuse_locked_path
from distillcache.schemas.store.store import Store, is_url, using

log = logging.getLogger(__name__)

TOKENS_PER_FILE = 1 << 22  # 56 MB of records: they are packed in memory, and a reader loads whole files
RESUMABLE_BYTES = 256 << 20  # of text: some ten seconds of work, which nobody minds to lose or to do twice

WORKER_ENDS_S = 30.0  # a worker looks every few seconds whether the rows are finished, or it is to stop

# What a user may have changed, and how the message about it names it.
_COMPARED = (
    "max_rows",
    "row_tokens",
    "eval_rows",
    "eval_seed",
    "format",
    "text_field",
    "chat_date",
    "eos_token",
    "on_error",
)


def prepare_rows(
    config: PrepareConfig,
    *,
    tokenizer: TextTokenizer | None = None,
    rows_per_file: int | None = None,
    shared_from_bytes: int = 0,
) -> RowsIndex:
    """Write the rows of a corpus, or find that they are there already.

    Args:
        config: which text, and where the rows go.
        tokenizer: default: the one that `config.data.tokenizer` names.
        rows_per_file: default: as many as hold `TOKENS_PER_FILE`.
        shared_from_bytes: of several processes, each prepares a smaller text by itself: they write the same bytes.

    Raises:
        InputError: text or tokenizer that cannot be used, or no row left to train on.
        ConfigError: the folder holds something else than rows.
        PlanMismatchError: the folder holds the finished rows of other text or another config.
        Interrupted: SIGTERM or SIGINT; the same command goes on.
    """
    with using(config.storage):
        return _prepare_rows(config, tokenizer, rows_per_file, shared_from_bytes)


def _prepare_rows(
    config: PrepareConfig, tokenizer: TextTokenizer | None, rows_per_file: int | None, shared_from_bytes: int
) -> RowsIndex:
    job = begin_rows(config, tokenizer, rows_per_file)
    if isinstance(job, RowsIndex):
        return job
    store = Store(config.out)
    try:
        keeping_rows(store, job_fingerprint(job)).put_once(TOKENIZER_KEY, job.tokenizer.to_json().encode())
        text_digest = _prepare(store, job, config, shared_from_bytes)
    except FolderTakenError:
        _remove_own(store, job)
        found = finished_rows(store, config.data, job.tokenizer)
        if found is None:
            raise
        return found
    finished = finished_rows(store, config.data, job.tokenizer, text_digest)  # perhaps another process's
    if finished is None:
        raise StorageError("rows disappeared while they were prepared", {"missing": store.where(INDEX_KEY)})
    return finished


def _prepare(store: Store, job: RowsJob, config: PrepareConfig, shared_from_bytes: int) -> str | None:
    """Make the rows. Returns: the text's digest, where this process learnt it."""
    size, processes = sum(file.size for file in job.files), config.num_processes * config.workers
    with watch_for_stop() as stop:
        if size < (RESUMABLE_BYTES if processes == 1 else shared_from_bytes):
            placed = keeping_rows(store, job_fingerprint(job))
            index, skipped = _prepare_alone(placed, job, stop)
            commit_index(placed, index, skipped)
            return index.text_digest
        return _prepare_together(store, job, config, stop)


def _remove_own(store: Store, job: RowsJob) -> None:
    """Remove what this process left in a folder that is another's now, or gone, or finished."""
    fingerprint, finished = job_fingerprint(job), store.read(INDEX_KEY) is not None
    if is_marked(store, fingerprint) and finished:
        remove_mark(store)
    if finished or not is_marked(store, fingerprint):
        store.delete_folder(f"{UNFINISHED}/{fingerprint}")


def begin_rows(
    config: PrepareConfig, tokenizer: TextTokenizer | None, rows_per_file: int | None
) -> RowsJob | RowsIndex:
    """Return the job to be done, or the index of rows that already exist. Arguments and errors as of `prepare_rows`."""
    data, store = config.data, Store(config.out)
    tokenizer = tokenizer or _named_tokenizer(data)
    finished = finished_rows(store, data, tokenizer)
    if finished is not None:
        return finished
    refuse_foreign_folder(store)
    store.clear_stale_locks()
    rows_per_file = rows_per_file or max(1, TOKENS_PER_FILE // data.row_tokens)
    job = RowsJob(data, tokenizer, tuple(input_files(data)), rows_per_file)
    _warn_of_unused(data, job.files)
    # First, since it is small: a place that cannot be written shows before the long work.
    write_mark(store, job_fingerprint(job))
    return job


def _warn_of_unused(data: DataConfig, files: Sequence[InputFile]) -> None:
    """Say which settings of the text do nothing for these files."""
    if data.chat_date is not None and data.format != "chat":
        log.warning(f"data.chat_date {data.chat_date} has no effect: data.format is {data.format}, not chat")
    whole = all(file.kind.startswith(".txt") for file in files)
    if data.text_field != "text" and (whole or data.format == "chat"):
        reason = "a .txt file has no fields" if whole else "chats are read from messages"
        log.warning(f"data.text_field {data.text_field} has no effect: {reason}")


def open_rows(data: DataConfig) -> RowReader | None:
    """The prepared rows that `data.path` names; None where it names text.

    Raises:
        ConfigError: the config states a setting of the rows, and they were made with another.
    """
    paths = [data.path] if isinstance(data.path, str) else data.path
    if len(paths) != 1 or not _may_be_rows(paths[0]):
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


def _may_be_rows(path: str) -> bool:
    """Return whether this could be a rows folder: a local one that exists, or a bucket's place that is no file or
    pattern.
    """
    if not is_url(path):
        local = os.path.expanduser(path.removeprefix("file://"))
        refuse_locked_path(local)
        return os.path.isdir(local)
    scheme, place = path.split("://", 1)
    name = place.rstrip("/").rsplit("/", 1)[-1]
    return scheme in ("gs", "s3") and not any(letter in place for letter in "*?[") and not named_kind(name)


def _prepare_alone(store: Store, job: RowsJob, stop: StopRequest) -> tuple[RowsIndex, list[Skipped]]:
    """All rows, by this process, through a temporary file: the eval rows can be drawn only when their number is known.

    A corpus need not fit in memory; the file takes 5 bytes a token.
    """
    with _temporary_stream() as stream:
        skipped: list[Skipped] = []
        lines, documents = _spool_tokens(stream, store, job, stop, skipped)
        planned = plan_rows(job, stream.length, len(skipped))
        content, files = xxhash.xxh3_128(), []
        for number in range(planned.num_files):
            stop_if_asked(stop, store, kept="nothing: a small text is prepared in one go")
            records = planned.records(stream, number)
            for record in records:
                content.update(record)
            files.append(write_rows_file(store, number, records))
    text_digest = total_digest(lines, job.data, job.tokenizer)
    remember_inputs(store, job.files, text_digest)
    return rows_index(planned, documents, files, content.hexdigest(), text_digest, len(skipped)), skipped


def _spool_tokens(
    stream: SpooledStream, store: Store, job: RowsJob, stop: StopRequest, skipped: list[Skipped]
) -> tuple[list[str], int]:
    """The token stream of the text, as far as it matters: the files' lines in its digest, and the documents.

    Args:
        skipped: gets the notes of what was left out.
    """
    lines, before, documents = [], 0, 0
    with Progress("prepare", sum(file.size for file in job.files) // KB, unit="kB") as bar:
        for file in job.files:
            with InputReader(file) as reader:
                if not job.is_enough(stream.length):
                    pace = Pace(reader)
                    with closing(job.marked(file, reader, pace)) as found:
                        for marked in found:
                            if isinstance(marked, Skipped):
                                skipped.append(marked)
                                continue
                            stop_if_asked(stop, store, kept="nothing: a small text is prepared in one go")
                            # Documents that begin behind the last row do not count.
                            most = job.most_tokens
                            documents += count_begins(marked) if most is None or stream.length <= most else 0
                            stream.append(marked)
                            bar.advance((before + pace.done) // KB - bar.done)
                            if job.is_enough(stream.length):
                                break
                lines.append(reader.finish())
                before += reader.consumed
            bar.advance(before // KB - bar.done)
    stream.flush()
    return lines, documents


def _prepare_together(store: Store, job: RowsJob, config: PrepareConfig, stop: StopRequest) -> str | None:
    """Take part with this process and with its workers. Returns: the text's digest, where this process learnt it."""
    shares = [
        Share(
            config.process_id * config.workers + worker,
            config.num_processes * config.workers,
            config.claim_expiry_s,
        )
        for worker in range(config.workers)
    ]
    context = multiprocessing.get_context("spawn")  # a fork would copy threads' locks in any state
    workers = [
        context.Process(target=_work, args=(config, job, share), daemon=True, name=f"prepare-{share.process_id}")
        for share in shares[1:]
    ]
    with _safe_path():
        for worker in workers:
            worker.start()
    try:
        return prepare_shared(store, job, shares[0], stop)
    except BaseException:
        for worker in workers:
            worker.terminate()
        raise
    finally:
        for worker in workers:  # they have nothing to do any more, so one that is stuck or paused is not waited for
            worker.join(WORKER_ENDS_S)
            worker.kill()
            worker.join()


@contextmanager
def _safe_path() -> Iterator[None]:
    """Let processes that are started meanwhile import Python's own modules before those of the working folder."""
    before = os.environ.get("PYTHONSAFEPATH")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONSAFEPATH"]
        else:
            os.environ["PYTHONSAFEPATH"] = before


def _work(config: PrepareConfig, job: RowsJob, share: Share) -> None:
    """Run one worker process. On an error its work units are freed; the command's own process reports the error."""
    with using(config.storage), watch_for_stop() as stop, suppress(DistillcacheError):
        prepare_shared(Store(config.out), job, share, stop, quiet=True)


@contextmanager
def _temporary_stream() -> Iterator[SpooledStream]:
    try:
        with tempfile.TemporaryFile(prefix="distillcache-") as spool:
            yield SpooledStream(spool)
    except OSError as error:
        raise StorageError(
            "tokens cannot be kept in the temporary folder",
            {"folder": tempfile.gettempdir(), "cause": error},
            "free some space there, or set TMPDIR to another folder",
        ) from error


def finished_rows(
    store: Store, data: DataConfig, tokenizer: TextTokenizer, text_digest: str | None = None
) -> RowsIndex | None:
    """The index that is there already, if it is of the same work; None where the folder is not finished.

    Args:
        text_digest: the text's, where it is known; else it costs a reading.
    """
    stored = store.read(INDEX_KEY)
    if stored is None:
        return None
    index = from_canonical(RowsIndex, stored, store.where(INDEX_KEY))
    found_digest = text_digest or known_digest(store, data, tokenizer)
    pairs = {f"data.{name}": (getattr(index.data, name), getattr(data, name)) for name in _COMPARED}
    # Content counts, not the paths; those only tell the user which text it was.
    if index.text_digest != found_digest:
        pairs["data.path"] = (index.data.path, data.path)
        pairs["the text's digest"] = (index.text_digest, found_digest)
    pairs["the tokenizer's digest"] = (index.tokenizer_digest, tokenizer.digest)
    pairs["the tokenizer's EOS"] = (index.eos_id, tokenizer.eos_id)
    facts = {name: f"there {there!r}, here {here!r}" for name, (there, here) in pairs.items() if there != here}
    if facts:
        raise PlanMismatchError(
            "the folder contains the rows of another config",
            {"rows": store.where(INDEX_KEY), **facts},
            "name another folder, or use the config with which these rows were made",
        )
    if text_digest is None:  # a crash at the very end leaves it
        store.delete_folder(UNFINISHED)
    remove_mark(store)
    return index


def _named_tokenizer(data: DataConfig) -> TextTokenizer:
    if data.tokenizer is None:
        raise ConfigError(
            "no tokenizer is named",
            {"data.tokenizer": None},
            "set data.tokenizer to a tokenizer.json, an HF directory or a .gguf",
        )
    return load_tokenizer(data.tokenizer, eos_token=data.eos_token)
