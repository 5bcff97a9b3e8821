"""Paths inside a cache, and the sizes of its shards and objects.

Pure functions of names and sizes; no I/O. Axis letters: N rows, L blocks, T tokens, R rows in a shard, Lc slots in
an object.
"""

from typing import Any, Literal

from distillcache.schemas.errors import ConfigError

Compression = Literal["none", "zstd", "blosc"]

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
HEAD_FILE = "head.safetensors"
ITEM_BYTES = {"uint8": 1, "int8": 1, "uint16": 2, "int32": 4, "float32": 4}  # what tap arrays are stored as
NO_CHUNK = 2**64 - 1  # in the index of an object: of a chunk that does not exist, as behind a short last shard
MAX_PUT_BYTES = 5 * 10**9  # one PUT on S3 ends at 5 GB
# What a plan's word for a compression stands for. An entry never changes, since a resumed build must give the same
# bytes: another setting is another word. Chosen on SmolLM2-135M's bf16 activations (docs/cache.md): of zstd, levels 3
# and 6 were slower and no smaller; of blosc, lz4 over shuffled bits was smaller than over shuffled bytes (0.80-0.83 of
# bf16 against 0.87-0.90), and zstd over shuffled bytes reached 0.71, but at 20 to 45 MB/s.
COMPRESSORS: dict[str, dict[str, Any]] = {
    "zstd": {"name": "zstd", "configuration": {"level": 1, "checksum": False}},  # digests check the codes
    "blosc": {
        "name": "blosc",
        "configuration": {"cname": "lz4", "clevel": 5, "shuffle": "bitshuffle", "blocksize": 0},  # 0: blosc's choice
    },
}


DEMO_MARKER = "demo.json"  # in the folder above the demo's cache: says that it is a demo's, and what its stages took


def segment_prefix(segment: str) -> str:
    """The folder of a segment."""
    return f"segments/{segment}"


def prepared_prefix(number: int) -> str:
    """The folder in which rows of this segment are prepared before there is a plan; one subfolder for each text."""
    return f"segments/{number:04d}.prepared"


def plan_key(segment: str) -> str:
    return f"{segment_prefix(segment)}/plan.json"


def rows_key(segment: str, shard: int) -> str:
    return f"{segment_prefix(segment)}/rows/{shard:05d}.array_record"


def receipt_key(segment: str, shard: int) -> str:
    return f"{segment_prefix(segment)}/receipts/{shard:05d}.json"


def times_key(segment: str) -> str:
    """The key of the time that the shards of a finished segment took. Nothing depends on it, and it may be missing."""
    return f"{segment_prefix(segment)}/times.json"


def head_key(segment: str) -> str:
    """The key of the teacher's last norm and head, where a segment keeps them (`TapPlan.head`)."""
    return f"{segment_prefix(segment)}/{HEAD_FILE}"


def skipped_key(segment: str) -> str:
    """The key of the records that `data.on_error: skip` left out of a segment's text. Nothing depends on it, and it
    may be missing.
    """
    return f"{segment_prefix(segment)}/skipped.jsonl"


def lease_key(segment: str, unit: int) -> str:
    return f"{segment_prefix(segment)}/claims/{unit:05d}.json"


def finish_lease_key(segment: str, _unit: int) -> str:
    """The lease of the process that finishes the segment; there is one such work unit."""
    return f"{segment_prefix(segment)}/claims/finish.json"


def job_lease_key(segment: str, _unit: int) -> str:
    """The lease of the job whose processes build the segment in lockstep."""
    return f"{segment_prefix(segment)}/claims/job.json"


def array_folder(segment: str, array: str) -> str:
    return f"{segment_prefix(segment)}/taps/{array}"


def object_key(segment: str, array: str, shard: int, slot_group: int) -> str:
    """The zarr3 chunk key of one object: outer chunk (shard, slot group, 0, 0)."""
    return f"{array_folder(segment, array)}/c/{shard}/{slot_group}/0/0"


def choose_shard_rows(row_bytes: int, rows: int, batch_rows: int, shard_mib: int, shard_rows: int | None) -> int:
    """R, the rows of a shard: near `shard_mib`, and a multiple or a divisor of `batch_rows`.

    So a teacher call fills whole shards or a shard is filled by whole calls, and no call but the last is padded.
    """
    if shard_rows is not None:
        if shard_rows % batch_rows and batch_rows % shard_rows:
            raise ConfigError(
                "a shard and a teacher batch do not fit together",
                {"shard_rows": shard_rows, "batch_rows": batch_rows},
                "make one a multiple of the other",
            )
        return shard_rows
    wanted = max(1, (shard_mib << 20) // row_bytes)
    if wanted >= batch_rows:
        enough = -(-rows // batch_rows)
        return batch_rows * min(wanted // batch_rows, enough)
    return max(size for size in range(1, wanted + 1) if batch_rows % size == 0)


def choose_slots_per_object(slot_bytes: int, slots: int, object_mib: int, array: str) -> int:
    """Lc: as few, equally filled objects of at most `object_mib` as the slots of a shard need.

    Args:
        slot_bytes: bytes of one slot of a whole shard.
        slots: how many slots the tap stores.
    """
    if slot_bytes > MAX_PUT_BYTES:
        raise ConfigError(
            "an object would be larger than a store accepts in one write",
            {"array": array, "one block of one shard": f"{slot_bytes} bytes", "limit": f"{MAX_PUT_BYTES} bytes"},
            "lower shard_rows or shard_mib",
        )
    most = min(slots, max(1, (object_mib << 20) // slot_bytes))
    return -(-slots // -(-slots // most))


def array_metadata(
    shape: tuple[int, int, int, int],
    dtype: str,
    outer: tuple[int, int],
    bits_of: str | None,
    compress: Compression = "none",
) -> dict[str, Any]:
    """zarr3 metadata of one tap array `[N, slots, T, width]`; outer chunk `[R, Lc, T, width]`, inner one row's slot.

    Args:
        outer: (R, Lc).
        compress: of every inner chunk by itself, so that some blocks are still read without the others.
    """
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    plain = {"name": "bytes"} if dtype in ("uint8", "int8") else little
    sharding = {
        "chunk_shape": [1, 1, *shape[2:]],
        "codecs": [plain, *_compressors(compress, ITEM_BYTES[dtype])],
        "index_codecs": [little, {"name": "crc32c"}],
        "index_location": "end",
    }
    return {
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [*outer, *shape[2:]]}},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "fill_value": 0,
        "attributes": {"bits_of": bits_of} if bits_of else {},
        "dimension_names": ["row", "block", "token", "feature"],
    }


def _compressors(compress: Compression, item_bytes: int) -> list[dict[str, Any]]:
    """The zarr3 codecs behind `bytes`; blosc shuffles the bits of numbers of a known size."""
    if compress == "none":
        return []
    chosen = COMPRESSORS[compress]
    typesize = {"typesize": item_bytes} if compress == "blosc" else {}
    return [{"name": chosen["name"], "configuration": {**chosen["configuration"], **typesize}}]


def array_spec(kvstore: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    """TensorStore spec of a tap array. A hole is an error, and a chunk of zeros is stored like any other."""
    return {
        "driver": "zarr3",
        "kvstore": kvstore,
        "metadata": metadata,
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
    }
