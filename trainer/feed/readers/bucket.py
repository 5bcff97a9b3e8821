"""One stored array in a bucket, read by rows into a batch: few requests, each for the bytes that are wanted.

TensorStore's own way through a sharded array asks for an object's index of chunks with every batch. Here it is
remembered, and where nothing is compressed not even asked for: TensorStore writes chunks row by row, so where one lies
follows from the plan, and its digest tells whether that was so. What differs from its digest is read again, from where
the object's own index says, before it is called damaged: bytes may be cut or flipped on their way.

Where a local cache is given, what was read is kept there, unpacked, and read from there the next time.
"""

import os
from collections.abc import Sequence
from concurrent.futures import Executor, Future

import numpy as np

from distillcache.schemas.cache.segment import DAMAGE_NEXT, Segment
from distillcache.schemas.errors import DamageError
from distillcache.schemas.format import layout
from distillcache.schemas.format.manifest import PartPlan
from distillcache.schemas.store.single_flight import Remembered
from distillcache.schemas.store.store import Store
from distillcache.trainer.feed.disk_cache import LocalCache
from distillcache.trainer.feed.readers.local import INDEX_CHECKSUM, check_chunks, joined, read_into
from distillcache.trainer.feed.readers.requests import Run, Wanted, byte_ranges, order_in_object, runs_of, together
from distillcache.trainer.feed.readers.threads import far_pool
from distillcache.trainer.feed.readers.unpack import Unpacker
from distillcache.trainer.feed.slots import SlotReads

INDEX_BYTES = 8 << 20  # of the objects' indexes that an array remembers: with 8 MiB chunks, those of 4 TB


class RemoteArray:
    """From a bucket, or from what a local cache keeps of it."""

    def __init__(
        self, segment: Segment, part: PartPlan, *, integrity: bool, near: Executor, kept: LocalCache | None = None
    ) -> None:
        """`near`: the threads that read local files. What a local cache keeps is always checked."""
        self._segment, self._part, self._integrity = segment, part, integrity
        self._near, self._kept = near, kept
        plan = segment.plan
        self._shard_rows = plan.shard_rows
        self._chunk_bytes = plan.rows.row_tokens * part.width * layout.ITEM_BYTES[part.dtype]
        self._index_bytes = 16 * plan.shard_rows * part.slots_per_object + INDEX_CHECKSUM
        self._indexes: Remembered[tuple[int, int], np.ndarray] = Remembered(max(1, INDEX_BYTES // self._index_bytes))
        self._unpacker = None if part.compress == "none" else Unpacker(part, plan.rows.row_tokens)
        self._in_order = self._unpacker is None and integrity  # whether places may be told from the plan
        self._folder = f"{segment.identity}/taps/{part.array}"

    @staticmethod
    def serves(store: Store) -> bool:
        """Return whether the store is one where every request takes its time, and its share of a network."""
        return store.is_bucket

    def start(self, wanted: Sequence[Wanted]) -> list[list[Future[None]]]:
        pending: list[list[Future[None]]] = [[] for _ in wanted]
        far: list[Run] = []
        for number, each in enumerate(wanted):
            for run in runs_of(number, each, self._part, self._chunk_bytes):
                if self._kept is not None and self._kept.has(self._name(run)):
                    pending[number].append(self._near.submit(self._read_kept, self._kept, run))
                else:
                    far.append(run)
        for runs in together(far, self._part, self._shard_rows, self._chunk_bytes):
            read = far_pool().submit(self._fetch, runs)
            for number in {run.number for run in runs}:
                pending[number].append(read)
        return pending

    def finish(self, row: int, reads: SlotReads, stack: np.ndarray) -> None:
        pass  # checked as it was read

    def _name(self, run: Run) -> str:
        """In the local cache; a folder for every 4,096 rows."""
        return f"{self._folder}/{run.row >> 12}/{run.row}.{run.slot}+{len(run.memories)}"

    def _read_kept(self, kept: LocalCache, run: Run) -> None:
        """From the local cache; from the bucket, where that has lost or damaged it."""
        name = self._name(run)
        descriptor = kept.open(name)
        if descriptor is None:
            return self._fetch([run])
        try:
            digests = self._segment.chunk_digests(self._part.array, run.row)
            chunks = [(place * self._chunk_bytes, *chunk) for place, chunk in enumerate(run.chunks)]
            for offset, some in joined(chunks, self._chunk_bytes):
                if not read_into(descriptor, [memory for _, memory in some], offset):
                    raise self._damage(name, "too short")
                check_chunks(self._segment, self._part, run.row, some, digests)
        except (DamageError, OSError):
            kept.drop(name)
            self._fetch([run])
        finally:
            os.close(descriptor)

    def _fetch(self, runs: Sequence[Run]) -> None:
        """From the bucket, in one request as a rule; then to the local cache."""
        place = runs[0].row // self._shard_rows, runs[0].slot // self._part.slots_per_object
        from_plan = self._in_order
        for last in self._segment.store.tries():
            try:
                self._fetch_once(place, runs, from_plan=from_plan)
                break
            except DamageError:
                self._indexes.forget(place)
                from_plan = False
                if last:
                    raise
        if self._kept is not None:
            for run in runs:
                self._kept.keep(self._name(run), run.memories)

    def _fetch_once(self, place: tuple[int, int], runs: Sequence[Run], *, from_plan: bool) -> None:
        key = layout.object_key(self._segment.plan.segment, self._part.array, *place)
        chunks = [(run.row, slot, memory) for run in runs for slot, memory in run.chunks]
        if from_plan:
            orders = [order_in_object(row % self._shard_rows, slot, self._part) for row, slot, _ in chunks]
            spans = [(order * self._chunk_bytes, self._chunk_bytes) for order in orders]
        else:
            index = self._indexes.get(place, lambda: self._read_index(key, place))
            spans = [self._span(index, key, row, slot) for row, slot, _ in chunks]
        checked = {run.row for run in runs} if self._integrity else ()
        digests = {row: self._segment.chunk_digests(self._part.array, row) for row in checked}
        for start, stop in byte_ranges(spans):
            data = memoryview(self._read(key, start, stop))
            for (row, slot, memory), (offset, length) in zip(chunks, spans, strict=True):
                if start <= offset < stop:
                    self._place(row, slot, data[offset - start : offset - start + length], memory)
                    if digests:
                        check_chunks(self._segment, self._part, row, [(slot, memory)], digests[row])

    def _place(self, row: int, slot: int, data: memoryview, memory: memoryview) -> None:
        """Put a chunk where it is wanted."""
        if self._unpacker is not None:
            if not self._unpacker.unpack(data, memory):
                raise self._segment.chunk_damage(self._part.array, row, slot)
        else:
            np.copyto(np.frombuffer(memory, np.uint8), np.frombuffer(data, np.uint8))  # does not hold Python's lock

    def _read_index(self, key: str, place: tuple[int, int]) -> np.ndarray:
        """(offset, length) of an object's chunks, `[R, Lc, 2]`."""
        shard, group = place
        length = int(self._segment.record(shard)[f"{self._part.array}/lengths"][group])
        data = self._read(key, length - self._index_bytes, length)[:-INDEX_CHECKSUM]
        return np.frombuffer(data, "<u8").reshape(self._shard_rows, self._part.slots_per_object, 2)

    def _span(self, index: np.ndarray, key: str, row: int, slot: int) -> tuple[int, int]:
        offset, length = index[row % self._shard_rows, slot % self._part.slots_per_object].tolist()
        if length > layout.MAX_PUT_BYTES or (self._unpacker is None and length != self._chunk_bytes):
            raise self._damage(key, "an index of chunks of other lengths")
        return offset, length

    def _read(self, key: str, start: int, stop: int) -> bytes:
        """A range of an object.

        Raises:
            DamageError: it does not exist, or is too short.
            StorageError: the bucket cannot be read.
        """
        data, generation = self._segment.store.read_range(key, start, stop) if 0 <= start < stop else (b"", b"")
        if data is None or len(data) != stop - start:
            raise self._damage(key, "no such object" if generation else f"it ends before byte {stop}")
        return data

    def _damage(self, key: str, found: str) -> DamageError:
        return DamageError(
            "a stored object is damaged", {"file": self._segment.store.where(key), "found": found}, DAMAGE_NEXT
        )
