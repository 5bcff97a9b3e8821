"""The feed: cached rows and taps by row number, and the Grain pipeline that turns them into batches.

A *source* is one split of a cache, indexed by row: `source[[4, 0, 9]]` is a host batch. A *slot* is a stored place on
a tap's block axis (`TapPlan.slots`). A *feed* is an endless iterator of batches: the batch at step `s` is a pure
function of the seed and `s`, so the feed's whole state is `{"seed", "next_step"}`.

Taps stay encoded, as the codec's parts: they are decoded on the device, inside the scan over blocks.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import grain
import numpy as np
import tensorstore as ts

from distillcache.schemas.cache.addressing import row_groups
from distillcache.schemas.cache.segment import DAMAGE_NEXT, Segment, open_cache
from distillcache.schemas.errors import ConfigError, DamageError, DistillcacheError, InputError
from distillcache.schemas.format.digest import digest_bytes
from distillcache.schemas.format.layout import MANIFEST
from distillcache.schemas.format.manifest import PartPlan
from distillcache.schemas.store.disk_errors import step_for
from distillcache.schemas.store.store import Store
from distillcache.trainer.feed.buffers import Buffers
from distillcache.trainer.feed.disk_cache import LocalCache
from distillcache.trainer.feed.readers.bucket import RemoteArray
from distillcache.trainer.feed.readers.local import ArrayReader, LocalArray, PendingRead, StoreArray
from distillcache.trainer.feed.readers.requests import Wanted
from distillcache.trainer.feed.slots import SegmentReads
from distillcache.trainer.feed.source import Batch as Batch
from distillcache.trainer.feed.source import Rows, Source
from distillcache.trainer.feed.source import SplitName as SplitName

log = logging.getLogger(__name__)

READ_THREADS = 4  # rows read at a time from a local disk: more than one keeps it busy, many would wait for Python
MAX_SEED = 2**32 - 1  # Grain's shuffle takes 32 bits


class CacheSource(Source):
    """One split of a cache; taps are read from it, onto the host. A cache of several segments reads like one.

    Safe to use from several threads.
    """

    def __init__(
        self,
        url: str,
        taps: Sequence[str] = ("resid", "attn_out"),
        blocks: Sequence[int] | None = None,
        split: SplitName | None = None,
        *,
        leaving: bool = True,
        integrity: bool = True,
        direct: bool = True,
        partial: bool = False,
        kept: LocalCache | None = None,
        slots: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """
        Args:
            url: the cache.
            taps: what to read beside the rows; none: rows alone.
            blocks: which blocks; None: all that are recorded.
            split: rows for training, held-out rows, or (None) all.
            leaving: read `resid` also behind the last block of every run of blocks, as `mlp_out` needs it.
            integrity: compare what is read with the cache's digests.
            direct: read without TensorStore's arrays, which is faster (feed/readers/local.py, feed/readers/bucket.py);
            False: through them.
            partial: read a cache that is still being built: the rows of its shards that are committed by now.
            kept: where what is read from a bucket is kept; a cache on a local disk needs none.
            slots: of these taps, the slots to read, ascending; default: those that the blocks need.

        Raises:
            InputError: no finished cache, or it does not hold these taps or blocks.
        """
        self._integrity, self._store = integrity, Store(url)
        segments = open_cache(self._store, partial=partial)
        self._kept = kept
        if kept is not None and RemoteArray.serves(self._store):
            for segment in segments:
                segment.kept = kept.files(segment.identity)
        super().__init__(url, row_groups(segments), taps, blocks, split, leaving, slots)
        open_array = self._opener(direct)
        self._arrays = {
            (source.segment.plan.segment, part.array): open_array(source.segment, part)
            for group in self._reads
            for reads in group.values()
            for source in reads.sources
            for part in source.tap.parts
        }
        self._buffers = Buffers()
        self.partial = any(segment.committed is not None for segment in segments)
        self.digest = cache_identity(self._store, segments)
        if self.partial:
            log.info(f"{url} is not finished: reading {len(self._rows)} committed rows")

    def _opener(self, direct: bool) -> Callable[[Segment, PartPlan], ArrayReader]:
        pool = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="feed-read")  # starts no thread before it is used
        # Nothing is cached: a batch is read once.
        context = self._store.context({"cache_pool": {"total_bytes_limit": 0}})

        def open_array(segment: Segment, part: PartPlan) -> ArrayReader:
            if direct and LocalArray.serves(self._store, part):
                return LocalArray(segment, part, integrity=self._integrity, pool=pool)
            if direct and RemoteArray.serves(self._store):
                return RemoteArray(segment, part, integrity=self._integrity, near=pool, kept=self._kept)
            return StoreArray(segment, part, integrity=self._integrity, context=context)

        return open_array

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        """The batch of these rows, in this order; a row may occur twice."""
        places = self._places(indices)
        pending = {
            name: {part.part: self._start_part(name, part, places) for part in self.taps[name].parts}
            for name in self.taps
        }
        try:
            batch = self._row_batch(places)
            for name, tap in self.taps.items():
                batch[name] = {
                    part.part: self._finish_part(name, part, places, *pending[name][part.part]) for part in tap.parts
                }
            return batch
        finally:
            for parts in pending.values():
                for _, reads in parts.values():
                    _settle(read for row in reads for read in row)

    def _start_part(
        self, name: str, part: PartPlan, places: list[tuple[int, int]]
    ) -> tuple[np.ndarray, list[list[PendingRead]]]:
        """A destination `[S, B, T, W]`, and every row's reads into it; nothing is awaited.

        Args:
            places: (group, row in it) of every row.
        """
        size = self.reads[name].size(part)
        out = self._buffers.empty((size, len(places), self.plan.rows.row_tokens, part.width), np.dtype(part.dtype))
        if len(self.reads[name].of_part(part)) < size:
            out[...] = 0  # places that no decoder looks at
        wanted: dict[ArrayReader, list[tuple[int, Wanted]]] = {}
        for k, (group, row) in enumerate(places):
            for source in self._reads[group][name].sources:
                each = Wanted(row, source.reads, out[:, k])
                wanted.setdefault(self._array(source, part), []).append((k, each))
        pending: list[list[PendingRead]] = [[] for _ in places]
        with ts.Batch():  # the requests of one batch share the shards' indexes
            for array, entries in wanted.items():
                for (k, _), reads in zip(entries, array.start([each for _, each in entries]), strict=True):
                    pending[k].extend(reads)
        return out, pending

    def _finish_part(
        self,
        name: str,
        part: PartPlan,
        places: list[tuple[int, int]],
        out: np.ndarray,
        pending: list[list[PendingRead]],
    ) -> np.ndarray:
        """Await every row's reads; what the digests say of one row is found while others are still read."""
        for k, (group, row) in enumerate(places):
            for read in pending[k]:
                failure = read.exception()
                if isinstance(failure, DistillcacheError):
                    raise failure
                if failure is not None:
                    raise _unreadable(self.url, part, row, failure) from failure
            for source in self._reads[group][name].sources:
                self._array(source, part).finish(row, source.reads, out[:, k])
        return out

    def _array(self, source: SegmentReads, part: PartPlan) -> ArrayReader:
        return self._arrays[source.segment.plan.segment, part.array]


class Feed(Iterator[Batch]):
    """Batches in training order, read ahead by threads of its own; see `make_feed`."""

    def __init__(self, source: Rows, rows: int, seed: int, next_step: int, prefetch_batches: int, threads: int) -> None:
        self.source, self.wait_s = source, 0.0
        self._rows, self._options = rows, grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch_batches)
        self._reading, self._idle = 0, threading.Condition()
        self._start(seed, next_step)

    def __next__(self) -> Batch:
        """The next batch; the time spent waiting for it is added to `wait_s`."""
        start = time.perf_counter()
        batch = next(self._batches)
        self.wait_s += time.perf_counter() - start
        self._next_step += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """Enough to continue with the same batches, on any number of processes."""
        return {"seed": self._seed, "next_step": self._next_step}

    def set_state(self, state: dict[str, int]) -> None:
        """Go on from a state that `get_state` gave."""
        self.close()
        self._start(state["seed"], state["next_step"])

    def close(self) -> None:
        """Stop the threads; reads in flight are awaited."""
        self._batches.close()
        with self._idle:
            self._idle.wait_for(lambda: self._reading == 0)

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, seed: int, next_step: int) -> None:
        self._seed, self._next_step = seed, next_step
        order = grain.MapDataset.range(len(self.source)).shuffle(seed=seed).repeat()
        # Rows repeat for ever, so there is no remainder; rounded up, the number of batches of 1 overflows in Grain.
        batches = order.batch(self._rows, drop_remainder=True, batch_fn=list).map(self._read)
        self._batches = iter(batches.to_iter_dataset(self._options))
        self._batches.set_state({"next_index": next_step})

    def _read(self, indices: list[int]) -> Batch:
        with self._idle:
            self._reading += 1
        try:
            return self.source[indices]
        finally:
            with self._idle:
                self._reading -= 1
                self._idle.notify_all()


def make_feed(
    source: Rows,
    *,
    global_batch_rows: int,
    seed: int,
    start_step: int = 0,
    prefetch_batches: int = 2,
    threads: int | None = None,
) -> Feed:
    """An endless, shuffled feed.

    Rows are drawn without replacement and reshuffled in every epoch; a batch may reach into the next epoch, so
    no row is left out, and a batch may be larger than the split.

    Args:
        global_batch_rows: rows in a batch.
        seed: of the shuffle.
        start_step: the first batch's step.
        prefetch_batches: batches held ready; 0: read when asked.
        threads: batches read at a time; default: as many as are held ready.

    Raises:
        InputError: the split holds no rows.
        ConfigError: the seed does not fit.
    """
    if len(source) == 0:
        raise InputError(
            "there are no rows to train on",
            {"cache": source.url, "split": source.split or "all"},
            "build a cache with more text, or hold out fewer rows (data.eval_rows)",
        )
    if not 0 <= seed <= MAX_SEED:
        raise ConfigError("the seed does not fit", {"seed": seed, "expected": f"0 to {MAX_SEED}"})
    wanted = prefetch_batches if threads is None else min(threads, prefetch_batches)
    return Feed(source, global_batch_rows, seed, start_step, prefetch_batches, wanted)


def cache_identity(store: Store, segments: Sequence[Segment]) -> str:
    """The digest of the manifest; where a segment is unfinished, also of its plan and the shards that it has by now."""
    known = store.read(MANIFEST) or b""
    for segment in segments:
        if segment.committed is not None:
            known += f"{segment.plan.model_dump_json()} {sorted(segment.committed)}".encode()
    return digest_bytes(known)


def _settle(reads: Iterable[PendingRead]) -> None:
    """Wait until none of these reads is under way, whether one failed or not: their memory will be lent again."""
    for read in reads:
        read.exception()


def _unreadable(url: str, part: PartPlan, row: int, cause: BaseException) -> DistillcacheError:
    return DamageError(
        "stored activations cannot be read",
        {"cache": url, "array": part.array, "row": row, "cause": str(cause).split(" [")[0]},
        step_for(str(cause), reads=True) or DAMAGE_NEXT,
    )
