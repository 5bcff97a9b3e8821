"""Compressed caches through the commands that write, check, mend and copy them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from distillcache.cache_builder.build import build_cache
from distillcache.cache_builder.grow.copy import copy_cache
from distillcache.schemas.cache.segment import open_cache
from distillcache.schemas.config import BuildConfig, CopyConfig, PlanConfig, TapsConfig
from distillcache.schemas.errors import ConfigError, PlanMismatchError
from distillcache.schemas.store.store import Store
from distillcache.tools.cli import main
from distillcache.tools.look.inspect import describe_cache
from distillcache.tools.look.verify import verify_cache
from distillcache.tools.plan import command as plan_tool
from distillcache.trainer.feed.cache_source import CacheSource
from tests.conftest import build_config

pytestmark = pytest.mark.slow  # builds, copies and repairs for every compression

SEGMENT = "segments/0000"
INT8 = {"codec": "int8", "delta": True, "keyframe_every": 2}
TAPS = {"attn_out": {"codec": "bf16", "compress": "blosc"}, "resid": {**INT8, "compress": "zstd"}}
PLAIN = {"attn_out": {}, "resid": INT8}


def config_of(folder: Path, teacher: Path, corpus: Path, **changes: object) -> BuildConfig:
    return build_config(folder, teacher, corpus, **{"taps": TapsConfig.model_validate(TAPS), **changes})


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, teacher: Path, corpus: Path) -> Path:
    """Read only."""
    folder = tmp_path_factory.mktemp("packed") / "c"
    build_cache(config_of(folder, teacher, corpus))
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, teacher: Path, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "c"
    build_cache(config_of(folder, teacher, corpus, taps=TapsConfig.model_validate(PLAIN)))
    return folder


def contents(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in cache.rglob("*") if path.is_file()}


def stored(cache: Path) -> dict[str, bytes]:
    """What does not depend on when and by which config it was made."""
    return {name: data for name, data in contents(cache).items() if "/taps/" in name or "/rows/" in name}


def same_codes(one: Path, other: Path) -> None:
    found, expected = (CacheSource(str(folder))[range(38)] for folder in (one, other))
    for tap in ("resid", "attn_out"):
        for part, codes in expected[tap].items():
            np.testing.assert_array_equal(found[tap][part], codes)


def test_two_builds_give_the_same_bytes(tmp_path: Path, teacher: Path, corpus: Path, packed: Path, plain: Path) -> None:
    build_cache(config_of(tmp_path / "c", teacher, corpus))
    assert stored(tmp_path / "c") == stored(packed)
    same_codes(packed, plain)
    sizes = {len(data) for name, data in stored(packed).items() if "/resid/c/" in name}
    assert len(sizes) > 2  # each as long as it came out


def test_another_compression_is_another_plan(tmp_path: Path, teacher: Path, corpus: Path, packed: Path) -> None:
    shutil.copytree(packed, tmp_path / "c")
    before = contents(tmp_path / "c")
    build_cache(config_of(tmp_path / "c", teacher, corpus))
    with pytest.raises(PlanMismatchError, match="taps"):
        build_cache(config_of(tmp_path / "c", teacher, corpus, taps=TapsConfig.model_validate(PLAIN)))
    assert contents(tmp_path / "c") == before


@pytest.mark.parametrize("quick", [True, False])
def test_verify_knows_compressed_objects(tmp_path: Path, packed: Path, quick: bool) -> None:
    shutil.copytree(packed, tmp_path / "c")
    store = Store(str(tmp_path / "c"))
    assert verify_cache(store, quick=quick)["findings"] == []
    path = tmp_path / "c" / f"{SEGMENT}/taps/attn_out/c/1/0/0/0"
    data = bytearray(path.read_bytes())
    data[2 if not quick else -100] ^= 0x40  # blosc's flags of row 8, block 0; the index of chunks
    path.write_bytes(data)
    (found,) = verify_cache(store, quick=quick)["findings"]
    assert (found["what"], found["rows"]) == ("damaged", [8, 16] if quick else [8, 9])
    path.write_bytes(data[:-1])
    assert [found["what"] for found in verify_cache(store, quick=quick)["findings"]] == ["truncated"]


def test_damage_is_mended_to_the_same_bytes(tmp_path: Path, teacher: Path, corpus: Path, packed: Path) -> None:
    shutil.copytree(packed, tmp_path / "c")
    for name, change in (("resid/c/2", slice(40, 44)), ("resid.key/c/0", slice(None)), ("attn_out/c/4", slice(0, 9))):
        path = tmp_path / "c" / f"{SEGMENT}/taps/{name}/0/0/0"
        data = bytearray(path.read_bytes())
        del data[change]
        path.write_bytes(data)
    assert len(verify_cache(Store(str(tmp_path / "c")))["findings"]) == 3
    build_cache(config_of(tmp_path / "c", teacher, corpus, repair=True))
    assert contents(tmp_path / "c") == contents(packed)


def test_a_copy_changes_the_compression_and_keeps_the_codes(tmp_path: Path, packed: Path, plain: Path) -> None:
    def copy(src: Path, name: str, **values: object) -> Path:
        copy_cache(CopyConfig.model_validate({"src": str(src), "dst": str(tmp_path / name), "shard_rows": 8, **values}))
        assert verify_cache(Store(str(tmp_path / name)))["findings"] == []
        return tmp_path / name

    assert stored(copy(packed, "kept")) == stored(packed)
    assert stored(copy(packed, "unpacked", compress="none")) == stored(plain)
    assert stored(copy(plain, "packed", taps=TAPS)) == stored(packed)
    blosc = copy(plain, "blosc", compress="blosc", taps={"resid": {**INT8, "compress": "zstd"}})
    assert stored(blosc) == stored(packed)
    plans = [open_cache(Store(str(tmp_path / name)))[0].plan for name in ("kept", "unpacked")]
    assert ["tensorstore" in plan.numerics.versions for plan in plans] == [True, False]


def test_compressing_a_tap_of_a_copy_asks_for_its_codec(tmp_path: Path, plain: Path) -> None:
    """The default codec would take the place of the stored one."""
    values = {"src": str(plain), "dst": str(tmp_path / "c"), "taps": {"resid": {"compress": "zstd"}}}
    with pytest.raises(ConfigError, match="--compress zstd"):
        copy_cache(CopyConfig.model_validate(values))


def test_inspect_tells_what_is_stored(packed: Path, console: pytest.CaptureFixture[str]) -> None:
    found = describe_cache(Store(str(packed)))
    by_name = {tap["name"]: tap for tap in found["taps"]}
    assert by_name["attn_out"]["codec"] == "bf16, blosc"
    assert by_name["resid"]["codec"].endswith(", zstd")
    for name, tap in by_name.items():
        objects = [len(data) for key, data in contents(packed).items() if f"/taps/{name}" in key and "/c/" in key]
        assert tap["stored_bytes"] == sum(objects)
    assert found["stored_bytes"] == sum(tap["stored_bytes"] for tap in by_name.values())
    assert main(["inspect", str(packed)]) == 0
    assert "compressed to about" in console.readouterr().out


def test_a_plan_of_a_compressed_cache_is_an_upper_limit(
    tmp_path: Path, teacher: Path, corpus: Path, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def describe(taps: dict) -> dict:
        config = config_of(tmp_path / "c", teacher, corpus, taps=TapsConfig.model_validate(taps))
        values = {**config.model_dump(exclude_unset=True), "measure": False}
        return plan_tool.describe_build(PlanConfig.model_validate(values))

    one, other = describe(PLAIN), describe(TAPS)
    assert (one["at_most"], other["at_most"]) == (False, True)
    assert one["bytes"] == other["bytes"]
    monkeypatch.setattr(plan_tool, "free_bytes", lambda cache: one["bytes"] - 1)
    assert (describe(PLAIN)["enough_room"], describe(TAPS)["enough_room"]) == (False, None)


def test_the_plan_says_at_most(
    tmp_path: Path, teacher: Path, corpus: Path, console: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["plan", "--cache", str(tmp_path / "c"), "--teacher.path", str(teacher), "--measure", "false"]
    words += ["--data.path", str(corpus), "--data.row-tokens", "16", "--data.eval-rows", "4", "--batch-rows", "4"]
    monkeypatch.setattr(plan_tool, "free_bytes", lambda cache: 1)
    assert main([*words, "--taps.resid.compress", "zstd"]) == 0
    shown = console.readouterr().out
    assert "at most" in shown
    assert "before compression" in shown
    assert "bf16, zstd" in shown
    assert "There may be too little room" in shown
    assert main([*words, "--taps.resid.compress", "zstd", "--json"]) == 0
    assert json.loads(console.readouterr().out)["taps"][1]["compress"] == "zstd"
