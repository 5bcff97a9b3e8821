"""One stored array, read by rows into a batch: directly from a local disk, or through TensorStore's own arrays.

TensorStore's own way through a chunk costs some 17 microseconds, and a mapped file a page fault every 64 KiB; `preadv`
into memory that is there already costs neither, and a chunk's digest is taken while it lies in the CPU's cache. The
layout is that of `layout.array_metadata`, which TensorStore writes; the tests compare the readers. Compressed chunks on
a local disk are read through TensorStore's arrays; what lies in a bucket, by bucket.py.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from itertools import groupby
from operator import attrgetter
from typing import Protocol

import numpy as np
import tensorstore as ts
import xxhash

from distillcache.schemas.cache.segment import DAMAGE_NEXT, Segment
from distillcache.schemas.errors import DamageError
from distillcache.schemas.format import layout
from distillcache.schemas.format.manifest import PartPlan
from distillcache.schemas.store.store import Store
from distillcache.trainer.feed.readers.requests import Wanted
from distillcache.trainer.feed.slots import SlotReads

INDEX_CHECKSUM = 4  # bytes of crc32c behind the index of an object's chunks
LENGTH = attrgetter("nbytes")
READ_BYTES = 1 << 20  # in one call: small chunks together, but no more than stays in a CPU cache until it is checked


class PendingRead(Protocol):
    """A future of TensorStore or of `concurrent.futures`."""

    def exception(self) -> BaseException | None:
        """Wait, and return the error, if any."""
        ...


class ArrayReader(Protocol):
    """Reads rows of one array."""

    def start(self, wanted: Sequence[Wanted]) -> Sequence[Sequence[PendingRead]]:
        """Begin to read these to their places; for each of them, the reads that it waits for."""
        ...

    def finish(self, row: int, reads: SlotReads, stack: np.ndarray) -> None:
        """After all reads of a row have succeeded: raise `DamageError` if digests are checked and one differs."""
        ...


class StoreArray:
    """Through TensorStore."""

    def __init__(self, segment: Segment, part: PartPlan, *, integrity: bool, context: ts.Context) -> None:
        self._segment, self._part, self._integrity = segment, part, integrity
        self._array = segment.open_array(part, context)

    def start(self, wanted: Sequence[Wanted]) -> list[list[PendingRead]]:
        return [self._start_row(each, ts.array(each.stack)) for each in wanted]

    def _start_row(self, wanted: Wanted, target: ts.TensorStore) -> list[PendingRead]:
        self._segment.check_row_inside(self._part, wanted.row)
        runs = wanted.reads.runs(self._part)
        return [target[place].write(self._array[wanted.row, slot]) for place, slot in runs]

    def finish(self, row: int, reads: SlotReads, stack: np.ndarray) -> None:
        if self._integrity:
            chunks = [(slot, np.ascontiguousarray(stack[place]).data) for place, slot in reads.of_part(self._part)]
            check_chunks(self._segment, self._part, row, chunks, self._segment.chunk_digests(self._part.array, row))


class LocalArray:
    """From the files themselves, a row at a time in the threads of a pool; digests are checked there too."""

    def __init__(self, segment: Segment, part: PartPlan, *, integrity: bool, pool: Executor) -> None:
        self._segment, self._part, self._integrity, self._pool = segment, part, integrity, pool
        self._shard_rows, self._slots = segment.plan.shard_rows, part.slots_per_object
        self._chunk_bytes = segment.plan.rows.row_tokens * part.width * layout.ITEM_BYTES[part.dtype]
        self._lengths = [self._chunk_bytes] * self._slots  # of a row's chunks, in the index of an object

    @staticmethod
    def serves(store: Store, part: PartPlan) -> bool:
        """Return whether an array can be read so: on a local disk, uncompressed, by a machine that has numbers as
        stored.
        """
        return store.local is not None and part.compress == "none" and sys.byteorder == "little"

    def start(self, wanted: Sequence[Wanted]) -> list[list[Future[None]]]:
        found = {id(reads): self._objects(reads) for reads in {id(each.reads): each.reads for each in wanted}.values()}
        return [[self._pool.submit(self._read_row, each.row, found[id(each.reads)], each.stack)] for each in wanted]

    def _objects(self, reads: SlotReads) -> list[tuple[int, list[tuple[int, int]]]]:
        """(object's number, its (place, stored slot)) of what is read of a row: the same for all rows of a batch."""
        pairs = groupby(reads.of_part(self._part), key=lambda pair: pair[1] // self._slots)
        return [(group, list(wanted)) for group, wanted in pairs]

    def finish(self, row: int, reads: SlotReads, stack: np.ndarray) -> None:
        pass  # checked as it was read

    def _read_row(self, row: int, objects: Sequence[tuple[int, Sequence[tuple[int, int]]]], stack: np.ndarray) -> None:
        """Read chunks `(place, slot)`, some together, and compare each with its digest while it is still in cache."""
        shard, inside = divmod(row, self._shard_rows)
        digests = self._segment.chunk_digests(self._part.array, row) if self._integrity else []
        for group, wanted in objects:
            self._segment.check_objects_inside(self._part.array, shard, (group,))
            key = layout.object_key(self._segment.plan.segment, self._part.array, shard, group)
            descriptor = os.open(f"{self._segment.store.local}/{key}", os.O_RDONLY)
            try:
                spans = self._spans(descriptor, key, inside)
                chunks = [(spans[slot % self._slots], slot, stack[place].data) for place, slot in wanted]
                for offset, together in joined(chunks, self._chunk_bytes):
                    if not read_into(descriptor, [memory for _, memory in together], offset):
                        raise self._damage(key, f"the file ends within the chunks of row {row}")
                    if self._integrity:
                        check_chunks(self._segment, self._part, row, together, digests)
            finally:
                os.close(descriptor)

    def _spans(self, descriptor: int, key: str, inside: int) -> list[int]:
        """Return the offsets of the chunks of one of the shard's rows: zarr's sharding_indexed, index at the end."""
        index = np.empty((self._slots, 2), "<u8")  # of this row's chunks alone
        start = os.fstat(descriptor).st_size - INDEX_CHECKSUM - self._shard_rows * index.nbytes
        if start < 0 or not read_into(descriptor, [index.data], start + inside * index.nbytes):
            raise self._damage(key, "shorter than the index of its chunks")
        offsets, lengths = index.T.tolist()
        if lengths != self._lengths:
            there = (length for at, length in zip(offsets, lengths, strict=True) if at != layout.NO_CHUNK)
            if any(length != self._chunk_bytes for length in there):
                raise self._damage(key, "an index of chunks of other lengths")
        return offsets

    def _damage(self, key: str, found: str) -> DamageError:
        return DamageError(
            "a stored object is damaged", {"file": self._segment.store.where(key), "found": found}, DAMAGE_NEXT
        )


def check_chunks(
    segment: Segment, part: PartPlan, row: int, chunks: Sequence[tuple[int, memoryview]], digests: Sequence[int]
) -> None:
    """Raise unless these chunks `(stored slot, codes)` of a row are the ones that were committed.

    Args:
        digests: of all the row's chunks, by stored slot.
    """
    for slot, memory in chunks:
        if xxhash.xxh3_64_intdigest(memory) != digests[slot]:
            raise segment.chunk_damage(part.array, row, slot)


def joined(
    chunks: Sequence[tuple[int, int, memoryview]], size: int
) -> Iterator[tuple[int, list[tuple[int, memoryview]]]]:
    """(offset, chunks `(slot, memory)` that lie together there), of `(offset, slot, memory)`, each `size` bytes."""
    most, start = max(1, READ_BYTES // size), 0
    offsets, found = [chunk[0] for chunk in chunks], [chunk[1:] for chunk in chunks]
    while start < len(chunks):
        stop, last = start + 1, min(start + most, len(chunks))
        while stop < last and offsets[stop] - offsets[stop - 1] == size:
            stop += 1
        yield offsets[start], found[start:stop]
        start = stop


def read_into(descriptor: int, memories: Sequence[memoryview], offset: int) -> bool:
    """Fill these memories, in order, from one place of a file; False where the file ends before."""
    count = os.preadv(descriptor, memories, offset)  # type: ignore[arg-type]  # raises where one is not contiguous
    if count == sum(map(LENGTH, memories)):
        return True
    left = [memory.cast("B") for memory in memories]
    while left:
        count = os.preadv(descriptor, left, offset)
        if not count:
            return False
        offset += count
        while left and count >= len(left[0]):
            count -= len(left.pop(0))
        if left:
            left[0] = left[0][count:]
    return True
