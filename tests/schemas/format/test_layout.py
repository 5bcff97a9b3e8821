"""The zarr3 metadata of tap arrays: what it says, and that what is written by it is read back to the bit."""

from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
import zarr

from distillcache.cache_builder.record.fixed_files import array_files
from distillcache.cache_builder.record.objects import encode_object
from distillcache.schemas.config import TapConfig
from distillcache.schemas.format import layout
from distillcache.schemas.format.manifest import PartPlan, Plan
from distillcache.tools.bench.synthetic_cache import synthetic_plan, write_cache

DTYPES = {"bf16": "uint16", "f32": "float32", "fp8": "uint8", "int8": "int8", "int4": "uint8"}
ROWS, SHARD_ROWS = 5, 2  # the last shard is short
SHAPE = (3, 8, 32)  # L, T, D


def plan_of(codec: str, compress: str) -> Plan:
    tap = TapConfig.model_validate({"codec": codec, "compress": compress})
    return synthetic_plan(ROWS, SHAPE, {"attn_out": tap}, SHARD_ROWS)


def parts_of(plan: Plan) -> list[PartPlan]:
    return [part for tap in plan.taps for part in tap.parts]


def shard_codes(plan: Plan, shard: int) -> dict[str, np.ndarray]:
    """Chunks of noise, which no compressor makes smaller, of zeros, and of one number after the other."""
    start, stop = plan.shard_range(shard)
    codes = {}
    for part in parts_of(plan):
        shape = (stop - start, part.slots, plan.rows.row_tokens, part.width)
        noise = np.random.default_rng(shard).bytes(int(np.prod(shape)) * layout.ITEM_BYTES[part.dtype])
        codes[part.array] = np.frombuffer(noise, part.dtype).reshape(shape).copy()
        codes[part.array][:, 1] = 0
        codes[part.array][:, 2] = np.arange(np.prod(shape[2:])).reshape(shape[2:]) % 100
    return codes


def whole_array(folder: Path, array: str, library: str) -> np.ndarray:
    path = folder / layout.array_folder("0000", array)
    if library == "zarr":
        return np.asarray(zarr.open_array(path, mode="r")[...])
    return ts.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/"}}).result().read().result()


def test_metadata_names_the_compressor_behind_the_bytes() -> None:
    def codecs(dtype: str, *compress: layout.Compression) -> list:
        metadata = layout.array_metadata((5, 3, 8, 32), dtype, (2, 3), None, *compress)
        (sharding,) = metadata["codecs"]
        assert sharding["configuration"]["chunk_shape"] == [1, 1, 8, 32]
        assert [codec["name"] for codec in sharding["configuration"]["index_codecs"]] == ["bytes", "crc32c"]
        return sharding["configuration"]["codecs"]

    assert codecs("int8") == codecs("int8", "none") == [{"name": "bytes"}]
    assert [codec["name"] for codec in codecs("int8", "zstd")] == ["bytes", "zstd"]
    sizes = {dtype: codecs(dtype, "blosc")[1]["configuration"]["typesize"] for dtype in layout.ITEM_BYTES}
    assert sizes == layout.ITEM_BYTES


def test_a_plan_without_compression_does_not_name_it() -> None:
    """So plans of caches that were made before there was any are still canonical."""
    plain, packed = (plan_of("bf16", compress).model_dump(mode="json") for compress in ("none", "zstd"))
    assert "compress" not in str(plain)
    assert packed["taps"][0]["parts"][0]["compress"] == "zstd"
    assert "tensorstore" not in plain["numerics"]["versions"]
    assert packed["numerics"]["versions"]["tensorstore"] == version("tensorstore")


@pytest.mark.parametrize("compress", ["none", "zstd", "blosc"])
@pytest.mark.parametrize("codec", DTYPES)
def test_both_libraries_read_what_was_written(tmp_path: Path, codec: str, compress: str) -> None:
    plan = plan_of(codec, compress)
    (folder := tmp_path / "c").mkdir()
    write_cache(folder, plan, lambda shard: shard_codes(plan, shard))
    for key, data in array_files(plan).items():
        (folder / key).write_bytes(data)
    for part in parts_of(plan):
        if part.part == "codes":
            assert part.dtype == DTYPES[codec]
        written = np.concatenate([shard_codes(plan, shard)[part.array] for shard in range(plan.num_shards)])
        for library in ("tensorstore", "zarr"):
            found = whole_array(folder, part.array, library)
            assert found.dtype == np.dtype(part.dtype)
            np.testing.assert_array_equal(found.view(np.uint8), written.view(np.uint8), library)  # f32 noise has NaN


@pytest.mark.parametrize("compress", ["zstd", "blosc"])
def test_sizes_and_bytes_of_compressed_objects(compress: str) -> None:
    plain, packed = plan_of("bf16", "none"), plan_of("bf16", compress)
    (part,), (packed_part,) = parts_of(plain), parts_of(packed)

    def size(*slots: int) -> int:
        codes = shard_codes(plain, 0)["attn_out"][:, slots, :, :]
        whole = np.repeat(codes, 3 // len(slots), axis=1)
        once, again = (encode_object(packed, packed_part, whole) for _ in range(2))
        assert once == again
        return len(once) - len(encode_object(plain, part, whole))

    chunks = SHARD_ROWS * 3
    assert 0 < size(0) <= 32 * chunks  # noise grows by a header alone
    assert size(1) < -0.8 * chunks * 512  # zeros are stored, in a few bytes
    assert size(2) < 0
