"""A copy: the same codes where the codec stays, what a build would have given where it does not."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from distillcache.cache_builder.build import build_cache
from distillcache.cache_builder.grow.copy import copy_cache
from distillcache.schemas.cache.segment import read_manifest, read_plan
from distillcache.schemas.config import CopyConfig, DataConfig, TapConfig, TapsConfig
from distillcache.schemas.errors import ConfigError, DamageError, InputError, PlanMismatchError, StorageError
from distillcache.schemas.format import layout
from distillcache.schemas.store.store import Store
from distillcache.tools.cli import main
from distillcache.tools.look.verify import verify_cache
from distillcache.trainer.feed.cache_source import CacheSource
from tests.conftest import build_config, save_teacher
from tests.processes.command import start

INT8 = {"codec": "int8", "group": 8}
CODED = {
    "int8": {"attn_out": INT8, "resid": INT8},
    "fp8": {"attn_out": {"codec": "fp8"}, "resid": {"codec": "fp8"}},
    "int4 delta": {"attn_out": {**INT8, "codec": "int4"}, "resid": {**INT8, "delta": True, "keyframe_every": 2}},
}


def copy(src: Path, dst: Path, **values: object) -> None:
    copy_cache(CopyConfig.model_validate({"src": str(src), "dst": str(dst), **values}))


def tree(cache: Path) -> dict[str, bytes]:
    """Every file but the plan, which says what the copy was made from, what follows from it, and the shards' times."""
    found = {str(path.relative_to(cache)): path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    others = ("plan.json", "manifest.json", "times.json")
    return {name: data for name, data in found.items() if not name.endswith(others)}


def codes(cache: Path, tap: str, rows: list[int], blocks: list[int] | None = None) -> dict[str, np.ndarray]:
    return CacheSource(str(cache), (tap,), blocks)[rows][tap]


@pytest.fixture(scope="module")
def bf16_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bf16 stores what it computes as it is."""
    return save_teacher(tmp_path_factory.mktemp("bf16") / "teacher", dtype="bfloat16")


@pytest.fixture(scope="module")
def lossless(tmp_path_factory: pytest.TempPathFactory, bf16_teacher: Path, corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("lossless") / "c"
    build_cache(build_config(folder, bf16_teacher, corpus))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", CODED)
def test_transcoding_gives_what_a_build_gives(
    tmp_path: Path, lossless: Path, bf16_teacher: Path, corpus: Path, name: str
) -> None:
    copy(lossless, tmp_path / "copy", taps=CODED[name], shard_rows=8)
    build_cache(build_config(tmp_path / "built", bf16_teacher, corpus, taps=TapsConfig.model_validate(CODED[name])))
    rows = list(range(38))
    for tap in ("resid", "attn_out"):
        found, expected = codes(tmp_path / "copy", tap, rows), codes(tmp_path / "built", tap, rows)
        assert found.keys() == expected.keys()
        for part in expected:
            np.testing.assert_array_equal(found[part], expected[part])
    assert verify_cache(Store(str(tmp_path / "copy")))["findings"] == []


@pytest.mark.parametrize("name", [None, *CODED])
def test_an_unchanged_codec_keeps_the_codes(
    tmp_path: Path, cache: Path, teacher: Path, corpus: Path, name: str | None
) -> None:
    source = cache
    if name is not None:
        source = tmp_path / "coded"
        build_cache(build_config(source, teacher, corpus, taps=TapsConfig.model_validate(CODED[name])))
    copy(source, tmp_path / "copy", shard_rows=8)
    one, other = tree(tmp_path / "copy"), tree(source)
    for files in (one, other):
        files.pop("segments/0000/stats.json")  # of what is stored: not what was cast
    assert one == other


def test_rows_blocks_and_taps_can_be_chosen(tmp_path: Path, cache: Path) -> None:
    whole = CacheSource(str(cache))
    held_out = list(whole.plan.rows.eval_indices)
    train = [number for number in range(38) if number not in held_out]
    for rows, numbers in {"train": train, "eval": held_out, "5:20": list(range(5, 20))}.items():
        folder = tmp_path / rows.replace(":", "-")
        copy(cache, folder, rows=rows, blocks=[1], taps={"attn_out": None})
        source = CacheSource(str(folder), ("resid",))
        assert (source.blocks, source.slots["resid"]) == ((1,), (1, 2))
        batch, expected = source[range(len(source))], whole[numbers]
        np.testing.assert_array_equal(batch["tokens"], expected["tokens"])
        np.testing.assert_array_equal(batch["resid"]["codes"], expected["resid"]["codes"][1:3])
        assert len(CacheSource(str(folder), (), split="eval")) == len(set(numbers) & set(held_out))
        manifest = read_manifest(Store(str(folder)))
        assert manifest is not None
        assert manifest.tokens == np.count_nonzero(expected["segment_ids"])


@pytest.mark.slow
def test_segments_become_one(tmp_path: Path, teacher: Path, corpus: Path, cache: Path) -> None:
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"text": "some more text " * 12}) + "\n")
    folder = tmp_path / "c"
    delta = TapConfig.model_validate({**INT8, "delta": True, "keyframe_every": 2})
    for taps in (TapsConfig(), TapsConfig(attn_out=None, resid=None, mlp_out=TapConfig())):
        build_cache(build_config(folder, teacher, corpus, taps=taps, extend=folder.exists()))
    data = DataConfig(path=str(more), row_tokens=16, eval_rows=2)
    taps = TapsConfig(mlp_out=TapConfig())
    build_cache(build_config(folder, teacher, corpus, taps=taps, data=data, extend=True))
    copy(folder, tmp_path / "copy", taps={"resid": delta})
    copy(cache, tmp_path / "first", taps={"resid": delta, "attn_out": None})
    rows = list(range(38))
    for part, expected in codes(tmp_path / "first", "resid", rows).items():
        np.testing.assert_array_equal(codes(tmp_path / "copy", "resid", rows)[part], expected)
    names = ("attn_out", "mlp_out")
    one, other = CacheSource(str(tmp_path / "copy"), names), CacheSource(str(folder), names)
    assert len(one) == len(other) == 38 + 12
    for tap in names:
        np.testing.assert_array_equal(one[range(50)][tap]["codes"], other[range(50)][tap]["codes"])
    assert verify_cache(Store(str(tmp_path / "copy")))["findings"] == []


@pytest.mark.slow
def test_delta_coded_segments_are_joined(tmp_path: Path, teacher: Path, corpus: Path, cache: Path) -> None:
    """Coded anew, since the second segment's slots cannot lean on the first one's; the error stays the codec's."""
    taps = TapsConfig.model_validate({"resid": {**INT8, "delta": True}, "attn_out": None})
    for blocks in ([0], [1, 2]):
        build_cache(build_config(tmp_path / "c", teacher, corpus, taps=taps, blocks=blocks, extend=blocks != [0]))
    copy(tmp_path / "c", tmp_path / "copy")
    source = CacheSource(str(tmp_path / "copy"), ("resid",))
    found = np.asarray(source.codecs["resid"].decode(source[range(38)]["resid"]))
    expected = codes(cache, "resid", list(range(38)))["codes"].view(ml_dtypes.bfloat16).astype(np.float32)
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)


def test_a_stopped_copy_goes_on(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"taps": CODED["int8"], "shard_rows": 8}
    copy(cache, tmp_path / "one", **values)
    real = Store.write

    def write(store: Store, key: str, value: bytes) -> None:
        if key.startswith("segments/0000/taps/resid/c/2/"):
            raise StorageError("an object cannot be written", {"object": key})
        real(store, key, value)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", write)
        with pytest.raises(StorageError, match=r"shard +2"):
            copy(cache, tmp_path / "two", **values)
    assert read_manifest(Store(str(tmp_path / "two"))) is None
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "two").rglob("taps/attn_out/c/0/**/0")}
    assert kept
    copy(cache, tmp_path / "two", **values)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
    before = tree(tmp_path / "two")
    copy(cache, tmp_path / "two", **values)
    assert tree(tmp_path / "two") == before


def test_what_cannot_be_copied_is_refused(tmp_path: Path, cache: Path, lossless: Path) -> None:
    with pytest.raises(InputError, match="no cache here"):
        copy(tmp_path / "nothing", tmp_path / "c")
    with pytest.raises(ConfigError, match="onto itself"):
        copy(cache, cache)
    with pytest.raises(InputError, match="lacks these rows"):
        copy(cache, tmp_path / "c", rows="30:99")
    with pytest.raises(InputError, match="lacks these blocks"):
        copy(cache, tmp_path / "c", blocks=[7])
    with pytest.raises(InputError, match="lacks this tap"):
        copy(cache, tmp_path / "c", taps={"mlp_out": {"codec": "bf16"}})
    assert not (tmp_path / "c").exists()
    copy(cache, tmp_path / "c")
    with pytest.raises(PlanMismatchError, match="copied_from"):
        copy(lossless, tmp_path / "c")


def test_a_tap_that_only_some_rows_have(tmp_path: Path, bf16_teacher: Path, corpus: Path) -> None:
    """Which rows have it is said, and each step that is advised works; it was dropped where the first rows lack it."""
    source = tmp_path / "source"
    build_cache(build_config(source, bf16_teacher, corpus, taps=TapsConfig(attn_out=None)))
    few = DataConfig(path=str(corpus), row_tokens=16, eval_rows=3, max_rows=20)
    build_cache(build_config(source, bf16_teacher, corpus, data=few, extend=True))
    with pytest.raises(InputError, match="only some rows of the cache hold this tap") as caught:
        copy(source, tmp_path / "c")
    assert "copy --rows 38:58" in caught.value.next
    assert "copy --taps.attn-out null" in caught.value.next
    assert caught.value.facts["rows 0 to 37"] == "resid; blocks 0 to 2; in segments 0000"
    copy(source, tmp_path / "some", rows="38:58")
    wanted = codes(source, "resid", list(range(38, 58)))["codes"]
    np.testing.assert_array_equal(codes(tmp_path / "some", "resid", list(range(20)))["codes"], wanted)
    assert {tap.name for tap in read_plan(Store(str(tmp_path / "some")), "0000").taps} == {"attn_out", "resid"}
    copy(source, tmp_path / "without", taps={"attn_out": None})
    assert len(CacheSource(str(tmp_path / "without"), ("resid",))) == 58


def test_a_damaged_source_is_not_copied(tmp_path: Path, lossless: Path) -> None:
    source = tmp_path / "source"
    copy(lossless, source)
    victim = source / layout.object_key("0000", "resid", 0, 0)
    victim.write_bytes(bytes([victim.read_bytes()[0] ^ 1]) + victim.read_bytes()[1:])
    with pytest.raises(DamageError, match="not what was committed"):
        copy(source, tmp_path / "c")
    victim.unlink()
    with pytest.raises(DamageError, match="cannot be read"):
        copy(source, tmp_path / "c")
    assert not (tmp_path / "c" / layout.MANIFEST).exists()


def test_the_command_line(tmp_path: Path, cache: Path, console: pytest.CaptureFixture[str]) -> None:
    words = ["copy", str(cache), str(tmp_path / "c"), "--taps.resid.codec", "fp8", "--taps.attn_out", "null", "--json"]
    assert main(words) == 0
    assert json.loads(console.readouterr().out)["rows"] == 38
    assert CacheSource(str(tmp_path / "c"), ("resid",)).taps["resid"].codec == "fp8"


def damage(path: Path, place: int | None = 9) -> None:
    """Turn one byte over; without a place, delete the file."""
    data = bytearray(path.read_bytes())
    path.unlink()
    if place is not None:
        data[place] ^= 0x40
        path.write_bytes(bytes(data))


def everything(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in cache.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("taps", [{}, {**CODED["int8"], "attn_out": None}], ids=["kept", "recoded"])
def test_a_damaged_copy_is_made_again_from_its_source(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, taps: dict
) -> None:
    """By the two places alone: what was copied, and how, is in the plan."""
    copy(cache, tmp_path / "c", taps=taps, rows="3:30", shard_rows=8)
    expected = everything(tmp_path / "c")
    prefix = tmp_path / "c/segments/0000"
    damage(prefix / "taps/resid/c/2/0/0/0")
    damage(prefix / "rows/00001.array_record", None)
    before = {path: path.stat().st_mtime_ns for path in prefix.rglob("*/0") if path.is_file()}
    copy(cache, tmp_path / "c", repair=True)
    assert everything(tmp_path / "c") == expected
    assert {str(path) for path, when in before.items() if path.stat().st_mtime_ns != when} == {
        str(prefix / "taps/resid/c/2/0/0/0")
    }
    for name in ("index.bin", "stats.json", "side.safetensors", "taps/resid/zarr.json", "../../tokenizer.json"):
        damage(prefix / name, None)
    copy(cache, tmp_path / "c", repair=True)
    assert everything(tmp_path / "c") == expected
    damage(tmp_path / "c/manifest.json", None)
    copy(cache, tmp_path / "c", repair=True)
    assert everything(tmp_path / "c") == expected
    opened = "distillcache.cache_builder.repair.from_source.open_cache"
    monkeypatch.setattr(opened, lambda store: pytest.fail("the copy is whole"))
    copy(tmp_path / "gone", tmp_path / "c", repair=True)


@pytest.mark.slow
def test_a_repair_takes_the_source_as_it_was(tmp_path: Path, cache: Path, lossless: Path, teacher: Path) -> None:
    """It may have grown; another cache, other settings and a cache that is no copy are refused."""
    source = shutil.copytree(cache, tmp_path / "source")
    copy(source, tmp_path / "c")
    expected = everything(tmp_path / "c")
    more = tmp_path / "more.jsonl"
    more.write_text(json.dumps({"text": "some more text " * 12}) + "\n")
    data = DataConfig(path=str(more), row_tokens=16, eval_rows=2)
    build_cache(build_config(source, teacher, more, data=data, extend=True))
    damage(tmp_path / "c/segments/0000/taps/resid/c/0/0/0/0")
    broken = everything(tmp_path / "c")
    with pytest.raises(PlanMismatchError, match="not the cache from which the copy was made"):
        copy(lossless, tmp_path / "c", repair=True)
    with pytest.raises(PlanMismatchError, match="other settings"):
        copy(source, tmp_path / "c", repair=True, taps={"resid": INT8})
    with pytest.raises(ConfigError, match="not a copy"):
        copy(lossless, source, repair=True)
    assert everything(tmp_path / "c") == broken
    copy(source, tmp_path / "c", repair=True)
    assert everything(tmp_path / "c") == expected


@pytest.mark.slow
def test_an_unfinished_copy_is_repaired_by_going_on(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy(cache, tmp_path / "one", taps=CODED["int8"])
    with monkeypatch.context() as patch:
        patch.setattr("distillcache.cache_builder.grow.copy.finish_segment", lambda store, plan: None)
        copy(cache, tmp_path / "two", taps=CODED["int8"])
    damage(tmp_path / "two/segments/0000/taps/resid/c/0/0/0/0")
    copy(cache, tmp_path / "two", repair=True)
    assert tree(tmp_path / "two") == tree(tmp_path / "one")


@pytest.mark.slow
def test_what_is_recoded_is_said_and_recorded(
    tmp_path: Path, cache: Path, console: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where nobody asked for it: differences that begin behind their keyframe are coded anew."""
    copy(cache, tmp_path / "kept")
    assert "recoded" not in console.readouterr().err
    delta = {"resid": {**INT8, "delta": True, "keyframe_every": 2}}
    copy(cache, tmp_path / "delta", taps=delta)
    assert "resid: recoded bf16 -> int8, not bit-equal" in console.readouterr().err
    copy(tmp_path / "delta", tmp_path / "first", blocks=[0])
    assert "recoded" not in console.readouterr().err
    copy(tmp_path / "delta", tmp_path / "later", blocks=[1])
    said = console.readouterr().err
    assert "resid: recoded int8 -> int8, not bit-equal" in said
    assert "attn_out" not in said
    copy(cache, tmp_path / "wide", taps={"resid": {"codec": "f32"}})
    assert "resid: recoded bf16 -> f32, as the source decodes" in console.readouterr().err
    plans = {name: read_plan(Store(str(tmp_path / name)), "0000") for name in ("kept", "first", "later")}
    assert {name: plan is not None and plan.recoded_on is not None for name, plan in plans.items()} == {
        "kept": False,
        "first": False,
        "later": True,
    }
    later = plans["later"]
    assert later is not None
    assert later.recoded_on is not None
    assert later.recoded_on.platform == later.numerics.platform
    assert later.config["recoded"] == {"resid": "recoded int8 -> int8, not bit-equal to the source"}
    elsewhere = later.recoded_on.model_copy(update={"platform": "another"})
    monkeypatch.setattr("distillcache.cache_builder.grow.copy.describe_numerics", lambda *_: elsewhere)
    with pytest.raises(PlanMismatchError, match=r"recoded_on\.platform[\s\S]*machine where it was started"):
        copy(tmp_path / "delta", tmp_path / "later", blocks=[1])


def test_a_foreign_folder_is_refused(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "holiday"
    folder.mkdir()
    (folder / "photo.jpg").write_bytes(b"sea")
    (folder / "photo.jpg.__lock").write_bytes(b"not ours")
    before = everything(folder)
    with pytest.raises(ConfigError, match="contains something else"):
        copy(cache, folder)
    assert everything(folder) == before


def test_help_says_that_taps_are_kept(console: pytest.CaptureFixture[str]) -> None:
    assert main(["copy", "--help"]) == 0
    text = console.readouterr().out
    for tap in ("attn-out", "resid", "mlp-out"):
        assert f"--taps.{tap} keep or null or its fields:  (default: keep)" in text
        assert f"--taps.{tap}.codec bf16|f32|fp8|int8|int4  (default with its section: bf16)" in text


@pytest.mark.slow
def test_two_processes_copy_one_cache(tmp_path: Path, cache: Path) -> None:
    """Whichever way their race falls, the bytes are those of one."""
    words = ["--taps.resid.codec", "int8", "--shard-rows", "4", "--batch-rows", "4", "--num-processes", "2"]
    command = ["copy", str(cache), str(tmp_path / "two"), *words]
    children = [start(*command, "--process-id", str(number)) for number in (0, 1)]
    said = [child.communicate()[1] for child in children]
    assert [child.returncode for child in children] == [0, 0], said
    copy(cache, tmp_path / "one", taps={"resid": {"codec": "int8"}}, shard_rows=4, batch_rows=4)
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
    assert verify_cache(Store(str(tmp_path / "two")))["findings"] == []


def test_slots_that_only_some_rows_have_are_left_out_with_a_word(
    tmp_path: Path, teacher: Path, corpus: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The copy lacked them, exit 0, without a word; whoever deleted the source had lost them."""
    source, few = tmp_path / "source", DataConfig(path=str(corpus), row_tokens=16, eval_rows=3, max_rows=8)
    taps = [{"attn_out": {}, "resid": {"slots": slots}} for slots in (["last"], [1, "last"])]
    build_cache(build_config(source, teacher, corpus, taps=taps[0]))
    build_cache(build_config(source, teacher, corpus, taps=taps[1], data=few, blocks=[0, 1], extend=True))
    copy(source, tmp_path / "c")
    assert "attn_out: slot 2 is left out: only some of the rows hold it" in caplog.text
    assert "resid: slot 1 is left out: only some of the rows hold it" in caplog.text
    copied = read_plan(Store(str(tmp_path / "c")), "0000").taps
    assert {tap.name: tap.slots for tap in copied} == {"attn_out": (0, 1), "resid": (3,)}
    caplog.clear()
    copy(source, tmp_path / "few", rows="38:46")
    copy(source, tmp_path / "asked", blocks=[0], taps={"resid": None})
    assert "left out" not in caplog.text
