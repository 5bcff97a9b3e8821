"""Reading compressed arrays: the same codes, only the bytes that are asked for, and no damage that goes unseen."""

import random
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts

from distillcache.cache_builder.build import build_cache
from distillcache.schemas.cache.segment import open_cache
from distillcache.schemas.config import TapConfig, TapsConfig
from distillcache.schemas.errors import DamageError
from distillcache.schemas.store.store import Store
from distillcache.tools.bench.synthetic_cache import synthetic_plan, write_cache
from distillcache.trainer.feed.cache_source import CacheSource
from tests.conftest import build_config

TAPS = ("resid", "attn_out")
COMPRESSIONS = ("zstd", "blosc")
OBJECT = "segments/0000/taps/resid/c/1/0/0/0"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, teacher: Path, corpus: Path) -> dict[str, Path]:
    """The tiny cache, compressed in both ways. Tests that damage a file put it back."""
    folder = tmp_path_factory.mktemp("packed")
    for compress in COMPRESSIONS:
        tap = TapConfig.model_validate({"compress": compress})
        build_cache(build_config(folder / compress, teacher, corpus, taps=TapsConfig(attn_out=tap, resid=tap)))
    return {compress: folder / compress for compress in COMPRESSIONS}


@pytest.mark.parametrize("compress", COMPRESSIONS)
def test_a_compressed_cache_holds_the_same_codes(cache: Path, packed: dict[str, Path], compress: str) -> None:
    plain = CacheSource(str(cache))
    expected = plain[range(len(plain))]
    for direct in (True, False):
        source = CacheSource(str(packed[compress]), direct=direct)
        assert source.bytes_per_row == plain.bytes_per_row
        found = source[range(len(source))]
        for tap in TAPS:
            np.testing.assert_array_equal(found[tap]["codes"], expected[tap]["codes"])


@pytest.mark.parametrize("compress", COMPRESSIONS)
def test_some_blocks_read_only_their_compressed_bytes(tmp_path: Path, compress: str) -> None:
    tap = TapConfig.model_validate({"compress": compress})
    plan = synthetic_plan(4, (16, 64, 64), {"attn_out": tap}, shard_rows=4)
    codes = np.random.default_rng(0).integers(0, 64, (4, 16, 64, 64)).astype(np.uint16)  # some 6 bits of 16
    write_cache(tmp_path, plan, lambda shard: {"attn_out": codes})
    stored = (tmp_path / "segments/0000/taps/attn_out/c/0/0/0/0").stat().st_size
    assert stored < 0.6 * codes.nbytes
    source = CacheSource(str(tmp_path), ("attn_out",), blocks=[3, 11])
    source[[2]]  # the index's record and the rows
    before = bytes_read()
    found = source[[2]]
    index = 16 * 4 * 16 + 4
    assert bytes_read() - before <= 1.2 * stored * 2 / 64 + 2 * index  # each block may fetch the object's index
    np.testing.assert_array_equal(found["attn_out"]["codes"][:, 0], codes[2, [3, 11]])


def bytes_read() -> int:
    return ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")[0]["values"][0]["value"]


@pytest.mark.parametrize("compress", COMPRESSIONS)
def test_a_flipped_byte_is_an_error_that_names_file_and_row(packed: dict[str, Path], compress: str) -> None:
    """In the compressor's headers, in the data, in the index of chunks; or nothing that is read depends on it."""
    source, path = CacheSource(str(packed[compress])), packed[compress] / OBJECT
    whole, expected = path.read_bytes(), source[range(8, 16)]["resid"]["codes"]
    index = 16 * 8 * 4 + 4
    drawn = random.Random(0)
    places = [*range(40), *drawn.sample(range(40, len(whole) - index), 60), *range(len(whole) - index, len(whole), 37)]
    versions = [whole[: len(whole) // 2], b""]
    for place in places:
        versions.append(whole[:place] + bytes([whole[place] ^ 1 << drawn.randrange(8)]) + whole[place + 1 :])
    harmless = 0
    try:
        for data in versions:
            path.write_bytes(data)
            found, error = read_or_error(source, range(8, 16))
            if error is None:
                harmless += 1
                np.testing.assert_array_equal(found, expected)
            else:
                assert str(path) in str(error)
                assert error.facts["row"] in range(8, 16)
        assert harmless <= 3  # a header's bit that decoding does not look at
    finally:
        path.write_bytes(whole)


def read_or_error(source: CacheSource, rows: range) -> tuple[np.ndarray | None, DamageError | None]:
    try:
        return source[rows]["resid"]["codes"], None
    except DamageError as error:
        return None, error


@pytest.mark.parametrize("compress", COMPRESSIONS)
def test_chunks_of_other_rows_are_not_taken_for_these(packed: dict[str, Path], compress: str) -> None:
    """An object that is readable, but of another shard."""
    path, other = packed[compress] / OBJECT, packed[compress] / OBJECT.replace("/c/1/", "/c/2/")
    whole = path.read_bytes()
    try:
        path.write_bytes(other.read_bytes())
        with pytest.raises(DamageError, match="not what was committed") as caught:
            CacheSource(str(packed[compress]))[[9]]
        assert str(path) == caught.value.facts["file"]
    finally:
        path.write_bytes(whole)


def test_segments_may_be_compressed_differently(tmp_path: Path, cache: Path, teacher: Path, corpus: Path) -> None:
    for blocks, compress in (([0], "none"), ([1, 2], "blosc")):
        tap = TapConfig.model_validate({"compress": compress})
        taps = TapsConfig(attn_out=tap, resid=None)
        build_cache(build_config(tmp_path / "c", teacher, corpus, taps=taps, blocks=blocks, extend=blocks != [0]))
    segments = open_cache(Store(str(tmp_path / "c")))
    assert [segment.plan.taps[0].compress for segment in segments] == ["none", "blosc"]
    found, expected = (CacheSource(str(folder), ("attn_out",))[[5, 30]] for folder in (tmp_path / "c", cache))
    np.testing.assert_array_equal(found["attn_out"]["codes"], expected["attn_out"]["codes"])
