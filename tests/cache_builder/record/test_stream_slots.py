"""Chosen slots of the stream, and the teacher's head beside them."""

from pathlib import Path

import numpy as np
import pytest

from distillcache.cache_builder.build import build_cache
from distillcache.cache_builder.grow.copy import copy_cache
from distillcache.models.checkpoint import load_pretrained
from distillcache.models.head import head_of_decoder, read_head
from distillcache.schemas.cache.segment import open_cache
from distillcache.schemas.config import BuildConfig, CopyConfig
from distillcache.schemas.errors import ConfigError, DamageError
from distillcache.schemas.store.store import Store
from distillcache.tools.look.inspect import describe_cache
from distillcache.tools.look.inspect_print import print_cache
from distillcache.tools.look.verify import verify_cache
from distillcache.trainer.feed.cache_source import CacheSource
from tests.conftest import build_config

LAST = 3
ONLY_LAST = {"attn_out": None, "resid": {"slots": ["last"], "head": True}}


@pytest.fixture(scope="module")
def last(tmp_path_factory: pytest.TempPathFactory, teacher: Path, corpus: Path) -> BuildConfig:
    """A cache of the last slot alone, with the head. Read only."""
    config = build_config(tmp_path_factory.mktemp("c") / "last", teacher, corpus, taps=ONLY_LAST)
    build_cache(config)
    return config


def stream(cache: object, slots: list[int]) -> np.ndarray:
    source = CacheSource(str(cache), taps=("resid",), slots={"resid": slots})
    return source.decode(source[list(range(len(source)))], "resid")


def head_file(config: BuildConfig) -> Path:
    (found,) = Path(config.cache).glob("segments/0000*/head.safetensors")
    return found


@pytest.mark.parametrize("codec", [{}, {"codec": "int8", "delta": True, "keyframe_every": 2}])
@pytest.mark.parametrize("slots", [["last"], [0], [0, 2, "last"]])
def test_chosen_slots_are_those_of_a_whole_stream(
    tmp_path: Path, teacher: Path, corpus: Path, cache: Path, codec: dict[str, object], slots: list[int | str]
) -> None:
    config = build_config(
        tmp_path / "some", teacher, corpus, taps={"attn_out": None, "resid": {"slots": slots, **codec}}
    )
    build_cache(config)
    numbers = [LAST if slot == "last" else int(slot) for slot in slots]
    found, whole = stream(config.cache, numbers), stream(cache, numbers)
    np.testing.assert_allclose(found, whole, atol=0 if not codec else 0.04 * np.abs(whole).max())
    assert open_cache(Store(config.cache))[0].plan.taps[0].slots == tuple(numbers)


def test_a_delta_codec_reads_one_of_its_slots(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    taps = {"resid": {"codec": "int8", "delta": True, "keyframe_every": 3}}
    config = build_config(tmp_path / "delta", teacher, corpus, taps=taps)
    build_cache(config)
    whole = CacheSource(config.cache, taps=("resid",))
    expected = whole.decode(whole[[0, 5]], "resid")
    one = CacheSource(config.cache, taps=("resid",), slots={"resid": [2]})
    np.testing.assert_array_equal(one.decode(one[[0, 5]], "resid")[0], expected[2])


def test_the_kept_head_is_the_teachers(last: BuildConfig, teacher: Path) -> None:
    (segment,) = open_cache(Store(last.cache))
    found, expected = read_head(segment), head_of_decoder(load_pretrained(teacher, dtype="float32"))
    np.testing.assert_array_equal(found.weight, expected.weight)
    np.testing.assert_array_equal(found.norm, expected.norm)
    assert (found.norm_eps, found.divisor, found.softcap) == (expected.norm_eps, 1.0, None)


def test_inspect_says_that_the_head_is_kept(last: BuildConfig, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder, kept in ((last.cache, True), (str(cache), False)):
        found = describe_cache(Store(folder))
        assert found["keeps_head"] is kept
        print_cache(found)
        assert ("last norm and LM head" in capsys.readouterr().out) is kept


def test_a_damaged_head_is_found_and_mended(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    config = build_config(tmp_path / "c", teacher, corpus, taps=ONLY_LAST)
    build_cache(config)
    file = head_file(config)
    good = file.read_bytes()
    for data in (good[:-9] + b"x" + good[-8:], b"", None):
        file.unlink()
        if data is not None:
            file.write_bytes(data)
        with pytest.raises(DamageError):
            read_head(open_cache(Store(config.cache))[0])
        found = verify_cache(Store(config.cache))["findings"]
        assert [finding["object"] for finding in found] == [str(file.relative_to(config.cache))]
        with pytest.raises(DamageError, match=r"head\.safetensors"):
            build_cache(config)
        build_cache(config.model_copy(update={"repair": True}))
        assert file.read_bytes() == good


def test_a_copy_keeps_slots_and_head(tmp_path: Path, last: BuildConfig) -> None:
    for number, taps in enumerate([{}, {"resid": {"codec": "int8"}}]):
        copy = tmp_path / f"copy{number}"
        copy_cache(CopyConfig.model_validate({"src": last.cache, "dst": str(copy), "taps": taps}))
        np.testing.assert_allclose(stream(copy, [LAST]), stream(last.cache, [LAST]), atol=0.08 if taps else 0)
        assert head_file(build_config(copy, copy, copy)).read_bytes() == head_file(last).read_bytes()


def test_an_extension_adds_the_rest_and_no_second_head(
    tmp_path: Path, teacher: Path, corpus: Path, cache: Path, last: BuildConfig
) -> None:
    config = build_config(tmp_path / "c", teacher, corpus, taps=ONLY_LAST)
    build_cache(config)
    build_cache(config.model_copy(update={"taps": build_config("", teacher, corpus).taps, "extend": True}))
    np.testing.assert_array_equal(stream(config.cache, [0, 1, 2, 3]), stream(cache, [0, 1, 2, 3]))
    assert [segment.plan.keeps_head for segment in open_cache(Store(config.cache))] == [True, False]
    assert not verify_cache(Store(config.cache))["findings"]


def test_a_head_is_not_added_to_slots_that_are_there(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    config = build_config(tmp_path / "c", teacher, corpus)
    build_cache(config)
    with pytest.raises(ConfigError, match="hold all of them"):
        build_cache(build_config(config.cache, teacher, corpus, extend=True, taps={"resid": {"head": True}}))


@pytest.mark.parametrize(
    ("resid", "told"),
    [
        ({"slots": [4]}, "some of 0 to 3; last is 3"),
        ({"slots": []}, "some of 0 to 3; last is 3"),
        ({"slots": [0, 1], "head": True}, "add last to taps.resid.slots"),
    ],
)
def test_slots_that_cannot_be(tmp_path: Path, teacher: Path, corpus: Path, resid: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_cache(build_config(tmp_path / "c", teacher, corpus, taps={"resid": resid}))
    assert told in str(caught.value)
    assert not (tmp_path / "c").exists()
