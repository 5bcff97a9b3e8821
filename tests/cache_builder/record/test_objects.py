"""Objects made here are those that TensorStore writes, byte for byte."""

import numpy as np
import pytest

from distillcache.cache_builder.record.objects import crc32c, encode_object, joined_chunks, written_chunks
from distillcache.schemas.config import TapConfig
from distillcache.tools.bench.synthetic_cache import synthetic_plan

DTYPES = {"bf16": "uint16", "f32": "float32", "fp8": "uint8", "int8": "int8", "int4": "uint8"}
SLOTS, TOKENS, HIDDEN, SHARD_ROWS = 5, 4, 32, 3


def test_checksum_of_the_standards_example() -> None:
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C (RFC 3720 and the CRC catalogue)
    assert crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, appendix B.4
    assert crc32c(b"\xff" * 32) == 0x62A8AB43


@pytest.mark.parametrize("slots_per_object", [1, 2, 5])
@pytest.mark.parametrize("rows", [1, SHARD_ROWS])
@pytest.mark.parametrize("codec", DTYPES)
def test_the_same_bytes_as_tensorstores(codec: str, rows: int, slots_per_object: int) -> None:
    """Of whole and short shards, whole objects and short last ones, with a chunk of zeros."""
    plan = synthetic_plan(2 * SHARD_ROWS, (SLOTS, TOKENS, HIDDEN), {"attn_out": codec}, SHARD_ROWS)
    for part in (part.model_copy(update={"slots_per_object": slots_per_object}) for part in plan.taps[0].parts):
        shape = (rows, SLOTS, TOKENS, part.width)
        noise = np.random.default_rng(0).bytes(int(np.prod(shape)) * np.dtype(part.dtype).itemsize)
        codes = np.frombuffer(noise, part.dtype).reshape(shape).copy()
        codes[0, 1] = 0
        for start, stop in part.object_ranges():
            ours = joined_chunks(plan, part, codes[:, start:stop])
            assert ours == written_chunks(plan, part, codes[:, start:stop])
            assert encode_object(plan, part, codes[:, start:stop]) == ours


def test_compressed_objects_are_tensorstores() -> None:
    tap = TapConfig.model_validate({"codec": "bf16", "compress": "zstd"})
    plan = synthetic_plan(SHARD_ROWS, (SLOTS, TOKENS, HIDDEN), {"attn_out": tap}, SHARD_ROWS)
    (part,) = plan.taps[0].parts
    codes = np.zeros((SHARD_ROWS, SLOTS, TOKENS, part.width), part.dtype)
    assert encode_object(plan, part, codes) == written_chunks(plan, part, codes)
    assert len(encode_object(plan, part, codes)) < codes.nbytes
