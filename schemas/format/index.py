"""index.bin: one fixed-width record a shard, so that any shard's digests are read by offset, never the whole file.

A record holds what the shard's receipt held: the digest and length of its rows file (if the segment has rows of its
own), and for every array the
digest of its codes, the length of each object, and the xxh3-64 of every inner chunk. It ends with the xxh3-64 of
its own bytes. A short last shard leaves the rest of its record zero.
"""

from typing import Any

import numpy as np
import xxhash

from distillcache.schemas.errors import MEND_NEXT, DamageError
from distillcache.schemas.format.digest import digest_bytes
from distillcache.schemas.format.manifest import Plan, ShardReceipt


def record_dtype(plan: Plan) -> np.dtype:
    """The layout of one record; little-endian, no padding between fields."""
    fields: list[tuple] = [] if plan.rows_of else [("rows_digest", "V16"), ("rows_length", "<u8")]
    for tap in plan.taps:
        for part in tap.parts:
            fields.append((f"{part.array}/digest", "V16"))
            fields.append((f"{part.array}/lengths", "<u8", (len(part.object_ranges()),)))
            fields.append((f"{part.array}/objects", "V16", (len(part.object_ranges()),)))
            fields.append((f"{part.array}/chunks", "<u8", (plan.shard_rows, part.slots)))
    return np.dtype([*fields, ("check", "<u8")])


def encode_record(plan: Plan, receipt: ShardReceipt) -> bytes:
    """The record of a receipt."""
    record: Any = np.zeros((), record_dtype(plan))
    if receipt.rows_file is not None:
        record["rows_digest"] = np.void(bytes.fromhex(receipt.rows_file.digest))
        record["rows_length"] = receipt.rows_file.length
    for array, part in receipt.parts.items():
        record[f"{array}/digest"] = np.void(bytes.fromhex(part.digest))
        record[f"{array}/lengths"] = [stored.length for stored in part.objects]
        record[f"{array}/objects"] = [np.void(bytes.fromhex(stored.digest)) for stored in part.objects]
        chunks = chunk_digests(part.chunks, record[f"{array}/chunks"].shape[1])
        record[f"{array}/chunks"][: len(chunks)] = chunks
    record["check"] = xxhash.xxh3_64_intdigest(record.tobytes()[:-8])
    return record.tobytes()


def decode_record(plan: Plan, data: bytes, where: str, shard: int) -> np.ndarray:
    """The record in these bytes, checked against its own digest.

    Args:
        where: how messages name the index.
        shard: whose record it is.

    Raises:
        DamageError: the bytes are short, or not what was written.
    """
    dtype = record_dtype(plan)
    if len(data) != dtype.itemsize or xxhash.xxh3_64_intdigest(data[:-8]) != int.from_bytes(data[-8:], "little"):
        raise DamageError(
            "a record of the cache's index is damaged" if data else "the index of a segment is missing or truncated",
            {"file": where, "shard": shard},
            MEND_NEXT,
        )
    return np.frombuffer(data, dtype)[0]


def check_index(plan: Plan, data: bytes, digest: str, where: str) -> bool:
    """Return whether these bytes are the whole index of this digest; False if some of its records are damaged.

    Raises:
        DamageError: every record is whole, but together they are another build's.
    """
    if digest_bytes(data) == digest:
        return True
    size = record_dtype(plan).itemsize
    try:
        for shard in range(plan.num_shards):
            decode_record(plan, data[shard * size : (shard + 1) * size], where, shard)
    except DamageError:
        return False
    raise DamageError(
        "the index of a segment is another build's",
        {"file": where, "found": f"digest {digest_bytes(data)}", "expected": f"digest {digest}"},
        MEND_NEXT,
    )


def chunk_digests(text: str, slots: int) -> np.ndarray:
    """The `[rows, slots]` uint64 digests in a receipt's string of 16 hex digits each."""
    return np.frombuffer(bytes.fromhex(text), ">u8").astype(np.uint64).reshape(-1, slots)
