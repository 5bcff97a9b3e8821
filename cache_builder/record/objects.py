"""The bytes of one stored object: an outer zarr3 chunk (`sharding_indexed`) with the index of its inner chunks.

Uncompressed, they are the codes themselves, row by row, then the index, then its CRC-32C: one copy, made here.
TensorStore's zarr3 driver, which compresses, writes the same bytes (the tests compare them), at 0.66 GB/s for bf16.
"""

import sys
from functools import cache

import numpy as np
import tensorstore as ts

from distillcache.schemas.format import layout
from distillcache.schemas.format.manifest import PartPlan, Plan

CASTAGNOLI = 0x82F63B78  # the polynomial of CRC-32C, bits reversed (RFC 3720, appendix B.4)


def encode_object(plan: Plan, part: PartPlan, codes: np.ndarray) -> bytes:
    """The bytes of one outer zarr3 chunk that holds `[rows, slots, T, W]` codes."""
    if part.compress == "none" and sys.byteorder == "little":
        return joined_chunks(plan, part, codes)
    return written_chunks(plan, part, codes)


def joined_chunks(plan: Plan, part: PartPlan, codes: np.ndarray) -> bytes:
    """`encode_object` without compression, on a machine that has numbers as they are stored."""
    rows, slots = codes.shape[:2]
    chunk_bytes = codes[0, 0].nbytes
    index = np.full((plan.shard_rows, part.slots_per_object, 2), layout.NO_CHUNK, "<u8")
    index[:rows, :slots, 0] = chunk_bytes * np.arange(rows * slots).reshape(rows, slots)
    index[:rows, :slots, 1] = chunk_bytes
    ending = index.tobytes()
    # Some slots of a row lie together whatever the object leaves out, so each byte is copied once.
    memory = [np.ascontiguousarray(row).data.cast("B") for row in codes]
    return b"".join([*memory, ending, crc32c(ending).to_bytes(4, "little")])


def written_chunks(plan: Plan, part: PartPlan, codes: np.ndarray) -> bytes:
    """`encode_object` by TensorStore."""
    outer = (plan.shard_rows, part.slots_per_object)
    metadata = layout.array_metadata(codes.shape, part.dtype, outer, part.bits_of, part.compress)  # type: ignore[arg-type]
    context = ts.Context()
    memory = {"driver": "memory", "path": "object/"}
    array = ts.open(layout.array_spec(memory, metadata), create=True, open=True, context=context).result()
    array.write(codes).result()
    return ts.KvStore.open(memory, context=context).result().read("c/0/0/0/0").result().value


def crc32c(data: bytes) -> int:
    """The checksum of an object's index: short, 16 bytes a chunk, so a table of bytes is fast enough."""
    table, crc = _table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 255] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


@cache
def _table() -> tuple[int, ...]:
    entries = []
    for entry in range(256):
        for _ in range(8):
            entry = entry >> 1 ^ (CASTAGNOLI if entry & 1 else 0)
        entries.append(entry)
    return tuple(entries)
