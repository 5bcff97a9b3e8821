"""Reading caches of several segments, and caches that are still being built."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from distillcache.cache_builder import build as build_module
from distillcache.cache_builder.build import build_cache
from distillcache.models.config import BlockKind, LayerGroup
from distillcache.schemas.cache.segment import open_cache
from distillcache.schemas.config import BuildConfig, DataConfig, TapConfig, TapsConfig
from distillcache.schemas.errors import InputError, StorageError
from distillcache.schemas.store.store import Store
from distillcache.tools.look.inspect import describe_cache
from distillcache.trainer.feed.cache_source import CacheSource, make_feed
from tests.conftest import TINY, build_config, save_teacher
from tests.rounding import assert_rounded


@pytest.fixture(scope="module")
def deep_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six blocks."""
    config = dataclasses.replace(TINY, layers=(LayerGroup((BlockKind(),), 6),))
    return save_teacher(tmp_path_factory.mktemp("six") / "teacher", config)


def in_two(folder: Path, teacher: Path, corpus: Path, taps: TapsConfig) -> None:
    """Blocks 0 to 2 in one segment, 3 to 5 in another."""
    build_cache(build_config(folder, teacher, corpus, taps=taps, blocks=[0, 1, 2]))
    build_cache(build_config(folder, teacher, corpus, taps=taps, blocks=[3, 4, 5], extend=True))


@pytest.mark.bits
@pytest.mark.parametrize("codec", ["bf16", "int8"])
def test_one_stack_from_two_segments(tmp_path: Path, deep_teacher: Path, corpus: Path, codec: str) -> None:
    config = TapConfig.model_validate({"codec": codec, "group": 8 if codec == "int8" else None})
    taps = TapsConfig(attn_out=config, resid=config)
    in_two(tmp_path / "two", deep_teacher, corpus, taps)
    build_cache(build_config(tmp_path / "one", deep_teacher, corpus, taps=taps))
    for blocks in (None, [1, 4], [5]):
        one, two = (CacheSource(str(tmp_path / name), blocks=blocks) for name in ("one", "two"))
        assert (one.blocks, one.slots, one.bytes_per_row) == (two.blocks, two.slots, two.bytes_per_row)
        found, expected = two[[30, 2, 2, 9]], one[[30, 2, 2, 9]]
        for tap in ("resid", "attn_out"):
            assert one.reads[tap].at == two.reads[tap].at
            assert found[tap].keys() == expected[tap].keys()
            assert_rounded(two.decode(found, tap), one.decode(expected, tap), codec)  # of three programs


def test_delta_coded_slots_of_two_segments_are_refused_together(
    tmp_path: Path, deep_teacher: Path, corpus: Path
) -> None:
    taps = TapsConfig(resid=TapConfig(codec="int8", delta=True, group=8))
    in_two(tmp_path / "two", deep_teacher, corpus, taps)
    for blocks in ([0, 2], [3, 5]):
        assert len(CacheSource(str(tmp_path / "two"), blocks=blocks)[[4]]["resid"]["codes"])
    with pytest.raises(InputError, match=r"several segments cannot be read together[\s\S]*segment 0001"):
        CacheSource(str(tmp_path / "two"), blocks=[2, 3])


def test_a_tap_that_only_some_rows_have_is_refused(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    folder = tmp_path / "c"
    build_cache(build_config(folder, teacher, corpus))
    first = DataConfig(path=str(corpus), row_tokens=16, eval_rows=3, max_rows=20)
    build_cache(build_config(folder, teacher, corpus, data=first, taps=TapsConfig(attn_out=None), extend=True))
    assert len(CacheSource(str(folder), ("resid",))) == 58
    with pytest.raises(InputError, match="only some rows of the cache hold this tap") as caught:
        CacheSource(str(folder))
    facts = caught.value.facts
    assert facts["rows 0 to 37"] == "attn_out, resid; blocks 0 to 2; in segments 0000"
    assert str(facts["rows 38 to 57"]).startswith("resid; blocks 0 to 2; in segments 0001-")
    with pytest.raises(InputError, match=r"lacks this tap[\s\S]*found +attn_out, resid"):
        CacheSource(str(folder), ("mlp_out",))
    described = describe_cache(Store(str(folder)))
    assert described["rows"]["count"] == 58
    assert [segment["segment"][:5] for segment in described["segments"]] == ["0000", "0001-"]


def half_built(config: BuildConfig, monkeypatch: pytest.MonkeyPatch, shard: int) -> None:
    """Build until this shard's first object, which the store does not take."""
    real = Store.write

    def write(store: Store, key: str, value: bytes) -> None:
        if f"/c/{shard}/" in key:
            raise StorageError("an object cannot be written", {"object": key})
        real(store, key, value)

    with monkeypatch.context() as patch:
        patch.setattr(build_module.Store, "write", write)
        with pytest.raises(StorageError, match="cannot be written"):
            build_cache(config)


def test_an_unfinished_cache_shows_its_committed_rows(
    tmp_path: Path,
    teacher: Path,
    corpus: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    console: pytest.CaptureFixture[str],
) -> None:
    config = build_config(tmp_path / "c", teacher, corpus)
    half_built(config, monkeypatch, 2)
    with pytest.raises(InputError, match="not finished"):
        CacheSource(config.cache)
    partial, whole = CacheSource(config.cache, partial=True), CacheSource(str(cache))
    assert "reading 16 committed rows" in console.readouterr().err
    assert len(partial) == 16
    assert "partial" in repr(partial)
    assert "partial" not in repr(CacheSource(str(cache), partial=True))
    expected = whole[range(16)]
    np.testing.assert_array_equal(partial[range(16)]["resid"]["codes"], expected["resid"]["codes"])
    held_out = CacheSource(config.cache, (), split="eval", partial=True)
    assert [held_out.row_number(place) for place in range(len(held_out))] == [
        number for number in whole.plan.rows.eval_indices if number < 16
    ]
    assert partial.digest != whole.digest
    train = CacheSource(config.cache, split="train", partial=True)
    with make_feed(train, global_batch_rows=4, seed=0) as feed:
        assert next(feed)["tokens"].shape == (4, 16)
    build_cache(config)  # the reader that was opened before goes on, receipts or not
    np.testing.assert_array_equal(partial[range(16)]["attn_out"]["codes"], expected["attn_out"]["codes"])
    assert CacheSource(config.cache).digest != partial.digest


def test_rows_are_visible_once_all_their_taps_are(
    tmp_path: Path, teacher: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build_config(tmp_path / "c", teacher, corpus)
    build_cache(config)
    taps = TapsConfig(mlp_out=TapConfig())
    half_built(build_config(tmp_path / "c", teacher, corpus, taps=taps, extend=True), monkeypatch, 3)
    assert len(CacheSource(config.cache)) == 38
    assert len(CacheSource(config.cache, partial=True)) == 38
    source = CacheSource(config.cache, ("resid", "mlp_out"), partial=True)
    assert len(source) == 24
    assert source[[23]]["mlp_out"]["codes"].shape[:2] == (3, 1)
    assert len(open_cache(Store(config.cache))) == 1
    with pytest.raises(InputError, match="lacks this tap"):
        CacheSource(config.cache, ("mlp_out",))
    assert not describe_cache(Store(config.cache))["finished"]
