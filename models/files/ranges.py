"""Byte ranges of objects in a bucket: a known sequence of them, prefetched ahead of the reader.

A *span* is a stretch of one object, for instance a tensor. Long spans are fetched in chunks, several at once, into one
buffer; short ones by one request each, whose bytes are handed on as they are.
"""

import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from distillcache.schemas.errors import CheckpointError
from distillcache.schemas.store.path import Location, ObjectPath

CHUNK_BYTES = 16 * 2**20  # a quarter of a second of one GCS connection: what a failed request costs
REQUESTS = 16  # at once; some 1 GB/s from GCS
AHEAD_BYTES = CHUNK_BYTES * REQUESTS  # fetched and not yet read, at most, beside the span that is read
AHEAD_SPANS = 4 * REQUESTS  # likewise: of small ones more would only wait


class RemoteFile:
    """An object that is read by ranges, all of one version of it."""

    def __init__(self, path: ObjectPath) -> None:
        self.path = path
        self._generation = b""
        self._lock = threading.Lock()

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop).

        Raises:
            CheckpointError: the object ends before `stop`, is missing, or has been replaced since the first read.
        """
        value = self.read_or_none(start, stop)
        if value is None:
            truncated(self.path, f"it ends before byte {stop}")
        return value

    def read_or_none(self, start: int, stop: int) -> bytes | None:
        """Bytes [start, stop); None where there are not so many, or there is no such object."""
        value, generation = self.path.read_range(start, stop)
        if value is None or len(value) != stop - start:
            return None
        with self._lock:
            self._generation = self._generation or generation
            if generation not in (b"", self._generation):
                raise CheckpointError(
                    "a file of the checkpoint was replaced while it was read",
                    {"file": self.path},
                    "run the same command again when nothing writes it any more",
                )
        return value

    @property
    def generation(self) -> bytes:
        """Which version of the object this is. Asks for its first byte if nothing was read yet."""
        if not self._generation:
            self.read(0, 1)
        return self._generation

    def has(self, length: int) -> bool:
        """Return whether the object has at least this many bytes, by reading one byte."""
        return length == 0 or self.read_or_none(length - 1, length) is not None

    def length(self, expected: int) -> int:
        """The object's length, of which a store tells only whether a byte exists; two requests if it is as expected."""
        if not self.has(expected):
            low, high = 0, expected
        elif not self.has(expected + 1):
            return expected
        else:
            low, high = expected + 1, 2 * expected + 2
            while self.has(high):
                low, high = high, 2 * high
        while low + 1 < high:  # has(low), not has(high)
            middle = (low + high) // 2
            low, high = (middle, high) if self.has(middle) else (low, middle)
        return low


def truncated(path: Location, found: object) -> NoReturn:
    """Raise the error for an incomplete weight file."""
    raise CheckpointError(
        "a weight file is damaged, truncated or not a safetensors file",
        {"file": path, "found": found},
        "copy the file again",
    )


@dataclass(frozen=True)
class Span:
    """Bytes [start, stop) of a file."""

    file: RemoteFile
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class _Pending:
    """A span that is being fetched. Chunks of a long one are copied to their place as they come."""

    def __init__(self, span: Span, pool: ThreadPoolExecutor) -> None:
        self._buffer = np.empty(span.size, np.uint8) if span.size > CHUNK_BYTES else None
        if self._buffer is None:
            self._parts: list[Future] = [pool.submit(span.file.read, span.start, span.stop)]
            return
        starts = range(span.start, span.stop, CHUNK_BYTES)
        self._parts = [pool.submit(self._fill, span, start, self._buffer) for start in starts]

    def _fill(self, span: Span, start: int, buffer: np.ndarray) -> None:
        stop = min(start + CHUNK_BYTES, span.stop)
        buffer[start - span.start : stop - span.start] = np.frombuffer(span.file.read(start, stop), np.uint8)

    def result(self) -> np.ndarray:
        found = [part.result() for part in self._parts]
        return np.frombuffer(found[0], np.uint8) if self._buffer is None else self._buffer


class SpanReader:
    """Reads spans; those that were announced are fetched ahead, up to `AHEAD_BYTES`. Close it: it owns threads."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(REQUESTS, thread_name_prefix="ranges")
        self._coming: deque[Span] = deque()
        self._pending: deque[tuple[Span, _Pending]] = deque()

    def announce(self, spans: Iterable[Span]) -> None:
        """These will be read next, in this order."""
        self._coming, self._pending = deque(spans), deque()

    def read(self, span: Span) -> np.ndarray:
        """The span's bytes, `[size]` uint8, perhaps not writable."""
        if not self._pending and (not self._coming or self._coming[0] != span):
            return _Pending(span, self._pool).result()
        self._fetch_ahead(0)
        first, pending = self._pending.popleft()
        if first != span:
            raise ValueError("spans are read in another order than they were announced")
        self._fetch_ahead(span.size)
        return pending.result()

    def close(self) -> None:
        """Drop unread data, and stop the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _fetch_ahead(self, reading: int) -> None:
        """Ask for what comes next, while `reading` bytes are being read."""
        waiting = reading + sum(span.size for span, _ in self._pending)
        while self._coming and len(self._pending) < AHEAD_SPANS:
            if waiting and waiting + self._coming[0].size > AHEAD_BYTES:
                return
            span = self._coming.popleft()
            self._pending.append((span, _Pending(span, self._pool)))
            waiting += span.size
