"""Checks of one stored object of a shard: its bytes against the committed digests."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorstore as ts
import xxhash
from jaxtyping import Bool, UInt64

from distillcache.cache_builder.repair.finding import Finding, What
from distillcache.schemas.cache.segment import part_metadata
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import DamageError, StorageError
from distillcache.schemas.format import layout
from distillcache.schemas.format.digest import digest_bytes
from distillcache.schemas.format.manifest import PartPlan, Plan, TapPlan
from distillcache.schemas.format.rows import decode_row, unpack_rows
from distillcache.schemas.store.disk_errors import is_in_the_way
from distillcache.schemas.store.store import Store

LOCAL_READ_BYTES = 1 << 20  # measured: ten times as fast as whole objects, which go into fresh memory
BUCKET_READ_BYTES = 32 << 20  # a request's latency must not count
NOT_STORED = 2**64 - 1  # how a shard index marks an inner chunk that is not there (zarr3 sharding codec)


@dataclass(frozen=True, eq=False)
class TapObject:
    """The part of a tap's array that one object holds.

    first: the object's first place on the array's slot axis.
    chunks: the xxh3-64 of every inner chunk that was committed.
    """

    tap: TapPlan
    part: PartPlan
    first: int
    chunks: UInt64[np.ndarray, "rows slots"]


@dataclass(frozen=True, eq=False)
class StoredObject:
    """The committed facts about one object of a shard, or (without a tap object) about its file of rows.

    rows: those of the cache that it serves.
    """

    key: str
    shard: int
    rows: tuple[int, int]
    length: int
    digest: str
    tap_object: TapObject | None = None


@dataclass(frozen=True)
class Fault:
    """A finding, and the digest of the stored bytes: the digest of another object means that the two were swapped."""

    finding: Finding
    found_digest: str = ""


def stored_objects(plan: Plan, first_row: int, shard: int, record: Any) -> Iterator[StoredObject]:
    """The file of rows and every object of a shard, from its index record.

    Args:
        first_row: the cache's number of the segment's first row.
        record: of `index.record_dtype`.
    """
    start, stop = plan.shard_range(shard)
    rows = (first_row + start, first_row + stop)
    if plan.rows_of is None:
        key = layout.rows_key(plan.segment, shard)
        yield StoredObject(key, shard, rows, int(record["rows_length"]), bytes(record["rows_digest"]).hex())
    for tap in plan.taps:
        for part in tap.parts:
            for group, (first, last) in enumerate(part.object_ranges()):
                chunks = record[f"{part.array}/chunks"][: stop - start, first:last]
                yield StoredObject(
                    key=layout.object_key(plan.segment, part.array, shard, group),
                    shard=shard,
                    rows=rows,
                    length=int(record[f"{part.array}/lengths"][group]),
                    digest=bytes(record[f"{part.array}/objects"][group]).hex(),
                    tap_object=TapObject(tap, part, first, chunks),
                )


def check_object(store: Store, plan: Plan, stored: StoredObject, quick: bool) -> Fault | None:
    """Check a stored object; returns its fault, or None.

    Args:
        quick: look at its length and its shard index only.
    """
    try:
        return _check_quickly(store, plan, stored) if quick else _check_bytes(store, plan, stored)
    except StorageError as error:
        cause = str(error.facts.get("cause", error.what))
        what = "damaged" if is_in_the_way(cause) else "unreadable"  # which a repair replaces, or another try reads
        return Fault(_finding(plan, stored, what, cause))


def _check_bytes(store: Store, plan: Plan, stored: StoredObject) -> Fault | None:
    if stored.tap_object is not None and _stream_digest(store, stored) == stored.digest:
        return None
    data = store.read(stored.key)
    if data is None:
        return Fault(_finding(plan, stored, "missing", f"{stored.length:,} bytes were committed"))
    found = digest_bytes(data)
    if found == stored.digest:
        return None if stored.tap_object is not None else _check_rows(plan, stored, data)
    if len(data) != stored.length:
        return Fault(_length_finding(plan, stored, len(data)), found)
    if stored.tap_object is None:
        return Fault(_finding(plan, stored, "damaged", f"digest {found}, committed {stored.digest}"), found)
    right, readable = _compare_chunks(plan, stored.tap_object, data)
    if readable.all() and right.size > 1 and not right.any():
        return Fault(_finding(plan, stored, "stale", "all of its chunks are readable, and none was committed"), found)
    detail = f"{np.count_nonzero(~right)} of {counted(right.size, 'chunk')} are not what was committed"
    return Fault(_finding(plan, stored, "damaged", detail, ~right), found)


def _stream_digest(store: Store, stored: StoredObject) -> str | None:
    """The digest of an object, read in chunks; None where it is not there in its full length."""
    if not store.length_is(stored.key, stored.length):
        return None
    step = LOCAL_READ_BYTES if store.local is not None else BUCKET_READ_BYTES
    digest = xxhash.xxh3_128()
    for start in range(0, stored.length, step):
        data = store.read(stored.key, slice(start, min(start + step, stored.length)))
        if data is None:
            return None
        digest.update(data)
    return digest.hexdigest()


def _check_rows(plan: Plan, stored: StoredObject, data: bytes) -> Fault | None:
    """Check a file of rows whose bytes are the committed ones: a fault means that it was written wrong."""
    try:
        for record in unpack_rows(data, stored.rows[1] - stored.rows[0]):
            if (length := len(decode_row(record).tokens)) != plan.rows.row_tokens:
                detail = f"its rows have {counted(length, 'token')}, by the plan {plan.rows.row_tokens}"
                return Fault(_finding(plan, stored, "damaged", detail))
    except DamageError as error:
        detail = f"its bytes are the committed ones, but they are no rows: {error.what}"
        return Fault(_finding(plan, stored, "damaged", detail))
    return None


def _compare_chunks(
    plan: Plan, tap_object: TapObject, data: bytes
) -> tuple[Bool[np.ndarray, "rows slots"], Bool[np.ndarray, "rows slots"]]:
    """Compare every inner chunk in an object's bytes with the committed one, and check that it can be read at all."""
    rows, slots = tap_object.chunks.shape
    metadata = {
        **part_metadata(plan, tap_object.part),
        "shape": [rows, slots, plan.rows.row_tokens, tap_object.part.width],
    }
    array = _memory_array(data, "c/0/0/0/0", metadata)
    right, readable = np.zeros((rows, slots), bool), np.zeros((rows, slots), bool)
    for row in range(rows):
        with ts.Batch():  # the chunks of a row share one reading of the shard index
            reads = [array[row, slot].read() for slot in range(slots)]
        for slot, read in enumerate(reads):
            readable[row, slot] = read.exception() is None
            if readable[row, slot]:
                codes = np.ascontiguousarray(read.result())
                right[row, slot] = xxhash.xxh3_64_intdigest(codes.data) == int(tap_object.chunks[row, slot])
    return right, readable


def _check_quickly(store: Store, plan: Plan, stored: StoredObject) -> Fault | None:
    if store.read(stored.key, slice(0, 0)) is None:
        return Fault(_finding(plan, stored, "missing", f"{stored.length:,} bytes were committed"))
    if not store.length_is(stored.key, stored.length):
        return Fault(_length_finding(plan, stored, len(store.read(stored.key) or b"")))
    if stored.tap_object is None:
        return None
    fault = _shard_index_fault(store, plan, stored, stored.tap_object)
    return None if fault is None else Fault(_finding(plan, stored, "damaged", fault))


def _shard_index_fault(store: Store, plan: Plan, stored: StoredObject, tap_object: TapObject) -> str | None:
    """Check an object's shard index: the zarr3 sharding codec encodes it as an array of its own.

    `[R, Lc, 1, 1, 2]` uint64: offset and length of every inner chunk. It ends the object.
    """
    metadata = part_metadata(plan, tap_object.part)
    shape = [plan.shard_rows, tap_object.part.slots_per_object, 2]
    size = 8 * math.prod(shape) + 4  # the crc32c
    tail = store.read(stored.key, slice(stored.length - size, stored.length)) or b""
    index = _memory_array(
        tail,
        "c/0/0/0",
        {
            **metadata,
            "shape": shape,
            "data_type": "uint64",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shape}},
            "codecs": metadata["codecs"][0]["configuration"]["index_codecs"],
            "dimension_names": ["row", "block", "span"],
        },
    )
    reading = index.read()
    if reading.exception() is not None:
        return "its shard index does not fit its crc32c"
    rows, slots = tap_object.chunks.shape
    offsets, lengths = np.moveaxis(reading.result()[:rows, :slots], 2, 0)
    if (offsets == NOT_STORED).any():
        return f"not stored: {counted(int(np.count_nonzero(offsets == NOT_STORED)), 'chunk')}"
    if (offsets + lengths > stored.length - size).any():
        return "its shard index points outside of it"
    return None


def _memory_array(data: bytes, key: str, metadata: dict[str, Any]) -> ts.TensorStore:
    """A zarr3 array whose only chunk is these bytes."""
    context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
    memory = {"driver": "memory", "path": "object/"}
    ts.KvStore.open(memory, context=context).result().write(key, data).result()
    spec = layout.array_spec(memory, metadata)
    return ts.open(spec, read=True, open=True, assume_metadata=True, context=context).result()


def _length_finding(plan: Plan, stored: StoredObject, length: int) -> Finding:
    what = "truncated" if length < stored.length else "damaged"
    return _finding(plan, stored, what, f"{counted(length, 'byte')}, {stored.length:,} were committed")


def _finding(
    plan: Plan, stored: StoredObject, what: What, detail: str, wrong: Bool[np.ndarray, "rows slots"] | None = None
) -> Finding:
    """`wrong`: which inner chunks cannot be trusted; None: none of them can."""
    rows, tap_object = stored.rows, stored.tap_object
    if tap_object is not None and wrong is not None:
        places = np.flatnonzero(wrong.any(axis=1))
        rows = (rows[0] + int(places[0]), rows[0] + int(places[-1]) + 1) if len(places) else None
    return Finding(
        what=what,
        object=stored.key,
        detail=detail,
        segment=plan.segment,
        shard=stored.shard,
        rows=rows,
        tap=tap_object.tap.name if tap_object is not None else None,
        slots=() if tap_object is None else _affected_slots(tap_object, wrong),
    )


def _affected_slots(tap_object: TapObject, wrong: Bool[np.ndarray, "rows slots"] | None) -> tuple[int, ...]:
    """The tap's slots whose numbers depend on these chunks: with delta coding, all up to the next keyframe."""
    tap, every = tap_object.tap, tap_object.part.every
    hit = np.arange(tap_object.chunks.shape[1]) if wrong is None else np.flatnonzero(wrong.any(axis=0))
    stored = [(tap_object.first + int(place)) * every for place in hit]
    if not tap.delta:
        return tuple(tap.slots[place] for place in stored)
    group = tap.keyframe_every or len(tap.slots)
    affected = {later for place in stored for later in range(place, (place // group + 1) * group)}
    return tuple(tap.slots[place] for place in sorted(affected) if place < len(tap.slots))
