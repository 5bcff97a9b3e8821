"""The write pipeline: the main thread fills shards, another thread writes them, bounded in bytes."""

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from distillcache.cache_builder.record.writer import ShardBuffer, commit_shard
from distillcache.models.recorder import SlotSums
from distillcache.schemas.format.manifest import NumericsPlan, Plan
from distillcache.schemas.format.rows import Row
from distillcache.schemas.store.store import Store


class ByteBudget:
    """At most `limit` bytes at a time; a single request larger than the limit waits until it is alone."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used = limit, 0
        self._changed = threading.Condition()

    def acquire(self, count: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._used == 0 or self._used + count <= self._limit)
            self._used += count

    def release(self, count: int) -> None:
        with self._changed:
            self._used -= count
            self._changed.notify_all()


class ShardWriter:
    """Collects rows into shards and commits full ones in the background, one at a time.

    The first failure is kept: nothing is written after it, and `add`, `check` and `close` raise it.

    before_wait: hands over, by `add`, what has been computed and not been added yet; `wait` calls it.
    """

    def __init__(
        self,
        store: Store,
        plan: Plan,
        *,
        max_bytes: int,
        numerics: NumericsPlan | None,
        on_commit: Callable[[int], None],
        commit: Callable[[Store, ShardBuffer, NumericsPlan | None], object] = commit_shard,
    ) -> None:
        """`on_commit(shard)` is called in the writing thread, after `commit`, which makes a full shard durable."""
        self._commit_shard = commit
        self._store, self._plan, self._numerics, self._on_commit = store, plan, numerics, on_commit
        self._budget = ByteBudget(max_bytes)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="shard-writer")
        self._filling: dict[int, ShardBuffer] = {}
        self._writing: list[Future[None]] = []
        self._failed = threading.Event()
        self._idle_since = 0.0
        self.before_wait: Callable[[], None] = lambda: None

    def add(
        self,
        shard: int,
        rows: list[Row],
        codes: Mapping[str, np.ndarray],
        sums: Mapping[str, SlotSums],
        seconds: float = 0.0,
    ) -> None:
        """Append rows to their shard (arrays `[rows, S, T, W]`); waits while too much is in flight.

        Args:
            seconds: of waiting for these numbers.
        """
        self.check()
        if shard not in self._filling:
            begun = time.perf_counter() - seconds
            self._budget.acquire(self._shard_bytes(shard))
            self.check()
            self._filling[shard] = ShardBuffer(shard, self._plan, begun=begun)
        buffer = self._filling[shard]
        buffer.computing += seconds
        buffer.put(rows, codes, sums)
        if buffer.is_full:
            self._writing.append(self._pool.submit(self._commit, self._filling.pop(shard)))
        self._idle_since = time.perf_counter()

    def waited(self, begun: float) -> float:
        """Seconds spent on numbers that have just come, `begun` at that time: since then, or since the last `add`."""
        return time.perf_counter() - max(begun, self._idle_since)

    def check(self) -> None:
        """Raise the failure of any write so far."""
        done = [future for future in self._writing if future.done()]
        self._writing = [future for future in self._writing if future not in done]
        for future in done:
            future.result()

    def wait(self) -> None:
        """Block until all full shards are committed, with what `before_wait` hands over."""
        self.before_wait()
        for future in self._writing:
            future.result()
        self._writing = []

    def close(self) -> None:
        """Finish the shards that are full, drop the ones that are not, and end the thread."""
        self._pool.shutdown(wait=True)
        self._filling.clear()

    def _commit(self, buffer: ShardBuffer) -> None:
        try:
            if not self._failed.is_set():
                self._commit_shard(self._store, buffer, self._numerics)
                self._on_commit(buffer.shard)
        except BaseException:
            self._failed.set()
            raise
        finally:
            self._budget.release(self._shard_bytes(buffer.shard))

    def _shard_bytes(self, shard: int) -> int:
        start, stop = self._plan.shard_range(shard)
        return (stop - start) * self._plan.bytes_per_row
