"""Writing and reading of a run's metrics.

On a disk lines are added to `metrics.jsonl`. An object in a bucket cannot grow, and should not be written again and
again: there the lines go into `metrics/<first step>.jsonl`, a new object for every half minute, checkpoint or
evaluation, so that a killed process loses no line that a checkpoint counts on. TensorBoard's event files are made in a
temporary folder and brought there alike.

Everything is written by the thread that logs: a full disk ends the run with one message. A writer's own thread would
die of it, and the run would wait for that thread for ever.
"""

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, model_validator
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # type: ignore[attr-defined]

from distillcache.schemas.errors import DamageError, DistillcacheError, StorageError
from distillcache.schemas.format.checkpoint import FiguresDigest
from distillcache.schemas.format.run import digest_entries, newest_record
from distillcache.schemas.store.store import Store
from distillcache.schemas.store.whole_file import sync_folder

LINES = "metrics"
LOADS = "router"  # every expert's share of the tokens, at checkpoints and evaluations
TENSORBOARD = "tensorboard"
PIXELS = 8  # of an expert in an image, on each side
FLUSH_S = 30.0
SHOWN = 60  # bytes of a damaged line in a message


class _Line(BaseModel):
    """A line of metrics: a step, and numbers by name."""

    model_config = ConfigDict(extra="allow", strict=True)
    __pydantic_extra__: dict[str, float]
    step: int = Field(ge=0)


class _LoadLine(BaseModel):
    """A line of experts' shares, `[Lm][E]`."""

    model_config = ConfigDict(extra="forbid", strict=True)
    step: int = Field(ge=0)
    blocks: list[int]
    share: list[list[float]] = Field(min_length=1)

    @model_validator(mode="after")
    def _is_a_table(self) -> "_LoadLine":
        if len(self.share) != len(self.blocks) or len({len(row) for row in self.share}) != 1:
            raise ValueError("not as many shares for every block")
        return self


class MetricsLog:
    """A run's metrics. Lines past `last_step` are cut first: the steps that a killed run repeats.

    Every method raises `StorageError` where the disk is full or cannot be written.
    """

    def __init__(self, store: Store, last_step: int) -> None:
        self._store, self._failed = store, False
        with self._told():
            self._open(store, last_step)

    def _open(self, store: Store, last_step: int) -> None:
        self._lines, self._loads = _Lines(store, LINES, last_step), _Lines(store, LOADS, last_step)
        self._tensorboard = _Tensorboard(store, last_step + 1)
        self._flushed = time.monotonic()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Add the metrics after `step` steps."""
        with self._told():
            self._lines.add({"step": step, **values})
            for name, value in values.items():
                self._tensorboard.add(summary.scalar(name, value), step)
        if time.monotonic() - self._flushed > FLUSH_S:
            self.flush()

    def log_load(self, step: int, blocks: Sequence[int], load: Float[np.ndarray, "Lm E"]) -> None:
        """Add every expert's share of the tokens after `step` steps, as a line and as an image.

        In the image a row is a block and a column an expert; black has no token, grey the mean, white twice it or more.
        """
        share = load / np.maximum(load.sum(axis=1, keepdims=True), 1.0)
        rows = [[round(float(value), 6) for value in row] for row in share]
        grey = np.clip(share * load.shape[1] / 2, 0, 1)
        image = np.kron(grey, np.ones((PIXELS, PIXELS)))[None]
        with self._told():
            self._loads.add({"step": step, "blocks": list(blocks), "share": rows})
            self._tensorboard.add(summary.image("router/load", image), step)

    def digests(self) -> dict[str, FiguresDigest]:
        """The digests of all lines by the names of their files, for the checkpoint that counts on them."""
        return {_file(each.name): each.digest() for each in (self._lines, self._loads)}

    def flush(self) -> None:
        """Make all logged lines durable and readable by others."""
        with self._told():
            for each in (self._lines, self._loads, self._tensorboard):
                each.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flush and close. After a failure, which was raised already, only close."""
        with contextlib.ExitStack() as stack:
            for each in (self._lines, self._loads, self._tensorboard):
                stack.callback(self._close, each)

    def _close(self, each: "_Lines | _Tensorboard") -> None:
        if self._failed:
            with contextlib.suppress(OSError, DistillcacheError):
                each.close()
        else:
            with self._told():
                each.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._failed = True
            raise StorageError(
                "the run's metrics cannot be written",
                {"run": self._store.url, "cause": error.strerror or error},
                "make room, then start the same command again: it resumes from its last checkpoint",
            ) from error
        except DistillcacheError:
            self._failed = True
            raise


class _Lines:
    """A file of JSON lines, each with a step, that grows."""

    def __init__(self, store: Store, name: str, last_step: int) -> None:
        self._store, self.name = store, name
        self._new: list[dict[str, Any]] = []
        self._file: FileIO | None = None
        self._count, self._digest = 0, xxhash.xxh3_128()
        self._cut(last_step)

    def digest(self) -> FiguresDigest:
        """The digest of all lines, those that were kept from before among them (`digest_entries`)."""
        return FiguresDigest(count=self._count, digest=self._digest.hexdigest())

    def add(self, line: dict[str, Any]) -> None:
        self._new.append(line)
        self._note([line])
        if self._store.local is not None:
            self._write_new()

    def flush(self) -> None:
        """Make the lines durable: a checkpoint counts on those before it, also after the power was cut."""
        self._write_new()
        if self._file is not None:
            os.fsync(self._file.fileno())

    def _write_new(self) -> None:
        if not self._new:
            return
        text = "".join(map(_spell, self._new))
        if self._store.local is not None:
            self._file = self._file or self._opened(self._store.local)
            self._append(text.encode())
        else:
            self._store.write(_part(self.name, self._new[0]["step"]), text.encode())
        self._new = []

    def _opened(self, folder: Path) -> FileIO:
        path = folder / f"{self.name}.jsonl"
        is_new = not path.exists()
        self._store.check_inside(path.name)
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(path.open("ab", buffering=0))
            self._store.check_may_write()  # now: what is opened of another process's run gets no line
            stack.pop_all()
        if is_new:
            sync_folder(folder)
        return file

    def _append(self, data: bytes) -> None:
        """All of the data at the file's end, or none of it: a full disk must leave no half line behind."""
        assert self._file is not None
        length = os.fstat(self._file.fileno()).st_size
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError:
            os.ftruncate(self._file.fileno(), length)
            raise

    def close(self) -> None:
        try:
            self.flush()
        finally:
            if self._file is not None:
                self._file.close()

    def _cut(self, last_step: int) -> None:
        """Forget the lines past `last_step`, and one that a killed process left unfinished."""
        if self._store.local is not None:
            # Replaced as a whole: whatever ends this process, the steps that a checkpoint counts on stay readable.
            key = f"{self.name}.jsonl"
            before = self._store.read(key)
            kept = [line for line in self._read(key, before or b"") if line["step"] <= last_step]
            self._note(kept)
            if before is not None and before != (after := "".join(map(_spell, kept)).encode()):
                self._store.write(key, after)
            return
        for key in self._store.keys(f"{self.name}/"):
            lines = self._read(key, self._store.read(key) or b"")
            kept = [line for line in lines if line["step"] <= last_step]
            self._note(kept)
            if not kept:
                self._store.delete(key)
            elif len(kept) < len(lines):
                self._store.write(key, "".join(map(_spell, kept)).encode())

    def _note(self, lines: Sequence[dict[str, Any]]) -> None:
        self._count += len(lines)
        for line in lines:
            self._digest.update(_spell(line).encode())

    def _read(self, key: str, data: bytes) -> list[dict[str, Any]]:
        return _lines(data, self._store.where(key), self.name)


class _Tensorboard:
    """Event files. TensorBoard drops what an earlier process wrote from the purged step on."""

    def __init__(self, store: Store, purge_step: int) -> None:
        self._store, self._files = store, 0
        self._folder = tempfile.mkdtemp(prefix="distillcache-events-") if store.local is None else None
        store.check_inside(TENSORBOARD)
        folder = Path(self._folder) if store.local is None else store.local / TENSORBOARD  # type: ignore[arg-type]
        folder.mkdir(parents=True, exist_ok=True)
        # A resumed run within the same second writes a file of its own.
        self._prefix, self._suffix = str(folder / "events"), f".{purge_step}"
        self._writer = EventsWriter(self._prefix, self._suffix)
        self._write(Event(step=purge_step, session_log=SessionLog(status=SessionLog.START)))

    def add(self, values: Any, step: int) -> None:
        """Add a summary of tensorboardX."""
        self._write(Event(step=step, summary=values))

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)

    def flush(self) -> None:
        """In a bucket: bring what was written there as a file of its own, and begin another."""
        if self._folder is None:
            self._writer.flush()
            return
        self._writer.close()
        for file in sorted(Path(self._folder).iterdir()):
            self._files += 1
            self._store.write(f"{TENSORBOARD}/{file.name}.{self._files:06d}", file.read_bytes())
            file.unlink()
        self._writer = EventsWriter(self._prefix, self._suffix)

    def close(self) -> None:
        try:
            self.flush()
        finally:
            with contextlib.suppress(OSError):  # a buffer that could not be flushed; that was raised by then
                self._writer.close()
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The lines of a run, in order; a last line that a killed run left unfinished is not one."""
    return _read(Store(str(run)), LINES)


def read_loads(run: str | Path) -> list[dict[str, Any]]:
    """Every expert's share of the tokens, in order: `step`, `blocks`, `share` `[Lm][E]`."""
    return _read(Store(str(run)), LOADS)


@dataclass(frozen=True)
class LostLines:
    """A file whose lines up to the newest checkpoint are not those that were written.

    name: `LINES` or `LOADS`. found, expected: how many.
    """

    name: str
    where: str
    up_to: int
    found: int
    expected: int

    def __str__(self) -> str:
        if self.found == self.expected:
            what = "lines are not as they were written"
        elif self.found < self.expected:
            what = f"{self.expected - self.found:,} of {self.expected:,} lines are missing"
        else:
            what = f"there are {self.found:,} lines instead of {self.expected:,}"
        return f"{self.where}: up to step {self.up_to:,}, {what}"


def find_lost_lines(store: Store) -> list[LostLines]:
    """The files of a run's metrics that differ from what its newest checkpoint says of them.

    Nothing is known where there is no checkpoint, or only those of earlier versions.

    Raises:
        DamageError: a line is not what a run writes.
    """
    record = newest_record(store)
    if record is None or record.figures is None:
        return []
    lost = []
    for name in (LINES, LOADS):
        expected = record.figures.get(_file(name))
        if expected is None:
            continue
        raw = [line for key in _keys(store, name) for line in (store.read(key) or b"").split(b"\n")[:-1]]
        if digest_entries(raw[: expected.count]) == expected:
            continue
        found = [line for line in _read(store, name) if line["step"] <= record.step]
        where = store.where(_file(name) if store.local is not None else f"{name}/")
        lost.append(LostLines(name, where, record.step, len(found), expected.count))
    return lost


def _file(name: str) -> str:
    return f"{name}.jsonl"


def _keys(store: Store, name: str) -> list[str]:
    return [_file(name)] if store.local is not None else store.keys(f"{name}/")


def _read(store: Store, name: str) -> list[dict[str, Any]]:
    return [line for key in _keys(store, name) for line in _lines(store.read(key) or b"", store.where(key), name)]


def _part(name: str, step: int) -> str:
    return f"{name}/{step:08d}.jsonl"


def _lines(data: bytes, where: str, name: str) -> list[dict[str, Any]]:
    """The lines of a file; a last one without an end was being written by a process that was killed, and is none.

    Args:
        name: `LINES` or `LOADS`.

    Raises:
        DamageError: another line is not what a run writes.
    """
    found, kind = [], _Line if name == LINES else _LoadLine
    for number, line in enumerate(data.split(b"\n")[:-1], 1):
        try:
            value = json.loads(line.decode())
            kind.model_validate(value)
        except (ValueError, RecursionError) as error:
            raise DamageError(
                "a line of a run's metrics is damaged",
                {"file": where, "line": number, "found": _shortened(line)},
                f"delete line {number}, or restore it: only that step's figures are lost",
            ) from error
        found.append(value)
    return found


def _shortened(line: bytes) -> str:
    text = line[:SHOWN].decode("utf-8", "backslashreplace")
    return repr(text) + (f", and {len(line) - SHOWN} more bytes" if len(line) > SHOWN else "")


def _spell(line: dict[str, Any]) -> str:
    return json.dumps(line, allow_nan=False) + "\n"
