"""`build --repair` of caches with several segments: every one by its own plan, whatever config the command is given."""

import json
import random
import shutil
from pathlib import Path

import pytest

from distillcache.cache_builder.build import build_cache
from distillcache.cache_builder.grow.copy import copy_cache
from distillcache.cache_builder.record import work_units as units_module
from distillcache.cache_builder.repair import restore as mend_module
from distillcache.schemas.cache.segment import read_manifest
from distillcache.schemas.config import BuildConfig, CopyConfig, DataConfig, TapConfig, TapsConfig, TeacherConfig
from distillcache.schemas.errors import ConfigError, DamageError, Interrupted, PlanMismatchError
from distillcache.schemas.store.store import Store
from distillcache.tools.cli import main
from distillcache.tools.look.verify import verify_cache
from tests.conftest import build_config

pytestmark = pytest.mark.slow  # each test repairs a cache of four segments

BASE = TapsConfig(resid=TapConfig(codec="int8", delta=True, keyframe_every=2))
THREE = BASE.model_copy(update={"mlp_out": TapConfig()})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, teacher: Path, corpus: Path) -> Path:
    """A folder with a teacher, two texts and a cache of four segments.

    0000: rows of the first text. 0001: rows of the second. 0002 and 0003: another tap of each, in shards of 4 rows.
    """
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(teacher, folder / "teacher")
    shutil.copy(corpus, folder / "one.jsonl")
    texts = ("and then some more " * 9, "quite short")
    (folder / "two.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for config in configs(folder):
        build_cache(config)
    return folder


@pytest.fixture
def copied(place: Path, tmp_path: Path) -> Path:
    """The place, to be damaged. Its plans still name the paths of the first one."""
    return shutil.copytree(place, tmp_path / "place")


def configs(place: Path) -> list[BuildConfig]:
    """One for each segment, as a user gave them."""

    def config(text: str, taps: TapsConfig, **changes: object) -> BuildConfig:
        data = DataConfig(path=str(place / text), row_tokens=16, eval_rows=4)
        return build_config(place / "c", place / "teacher", place, data=data, taps=taps, **changes)

    first = config("one.jsonl", BASE)
    second = config("two.jsonl", BASE, extend=True)
    return [
        first,
        second,
        config("one.jsonl", THREE, extend=True, shard_rows=4),
        config("two.jsonl", THREE, extend=True, shard_rows=4),
    ]


def contents(cache: Path) -> dict[str, bytes]:
    """Every file but the shards' times, which cannot be reconstructed."""
    files = (path for path in cache.rglob("*") if path.is_file() and path.name != "times.json")
    return {str(path.relative_to(cache)): path.read_bytes() for path in files}


def damage(path: Path, place: int | None = 9) -> None:
    """Turn one byte over; without a place, delete the file."""
    data = bytearray(path.read_bytes())
    path.unlink()
    if place is not None:
        data[place] ^= 0x40
        path.write_bytes(bytes(data))


def repair(config: BuildConfig, **changes: object) -> None:
    build_cache(config.model_copy(update={"repair": True, "extend": False, **changes}))


def segment(cache: Path, number: int) -> Path:
    """The folder of a segment, whatever plan it is named by."""
    (found,) = cache.glob(f"segments/{number:04d}*")
    return found


@pytest.mark.parametrize("number", [0, 3])
def test_the_config_of_any_segment_repairs_all(place: Path, copied: Path, number: int) -> None:
    """Half of all files, by turns with the config of each segment."""
    cache, expected = copied / "c", contents(place / "c")
    drawn = random.Random(number)
    spared = {name for name in expected if name.endswith(("manifest.json", "plan.json"))}
    for name in drawn.sample(sorted(set(expected) - spared), len(expected) // 2):
        damage(cache / name, drawn.choice([None, drawn.randrange(len(expected[name]))]))
    repair(configs(copied)[number])
    assert contents(cache) == expected


def test_the_cache_is_all_that_a_repair_needs(place: Path, copied: Path, console: pytest.CaptureFixture[str]) -> None:
    expected = contents(place / "c")
    for number in range(4):
        damage(next((segment(copied / "c", number) / "taps").rglob("c/1/0/0/0")))
        damage(segment(copied / "c", number) / "index.bin", None if number % 2 else 100)
    damage(segment(copied / "c", 1) / "rows/00000.array_record")
    assert main(["build", "--repair", "--cache", str(copied / "c"), "--json"]) == 0
    assert json.loads(console.readouterr().out)["rows"] == read_manifest(Store(str(place / "c"))).rows  # type: ignore[union-attr]
    assert contents(copied / "c") == expected
    assert main(["build", "--repair", "--cache", str(copied / "nothing")]) == 2
    assert "there is no cache here" in console.readouterr().err


def test_exactly_what_is_damaged_is_computed(place: Path, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def batches(job, writer, unit):
        for first, rows in units_module.unit_batches(job, writer, unit):
            seen.append((job.plan.segment, first))
            yield first, rows

    monkeypatch.setattr(mend_module, "unit_batches", batches)
    damage(segment(copied / "c", 1) / "taps/attn_out/c/1/0/0/0")
    damage(segment(copied / "c", 2) / "taps/mlp_out/c/3/0/0/0")
    before = {path: path.stat().st_mtime_ns for path in (copied / "c").rglob("*") if path.is_file()}
    repair(configs(copied)[0])
    assert [(name[:4], first) for name, first in seen] == [("0001", 8), ("0002", 12)]
    changed = {path.parts[-6] for path, when in before.items() if path.stat().st_mtime_ns != when}
    assert changed == {"attn_out", "mlp_out"}
    assert contents(copied / "c") == contents(place / "c")


def test_added_taps_take_their_rows_from_the_segment_that_has_them(
    place: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where those are damaged themselves; no text is needed for the others."""
    monkeypatch.setattr("distillcache.cache_builder.repair.from_teacher._text_digest", lambda data: "gone")
    damage(segment(copied / "c", 2) / "index.bin", None)
    damage(segment(copied / "c", 3) / "taps/mlp_out/c/0/0/0/0")
    repair(configs(copied)[2])
    assert contents(copied / "c") == contents(place / "c")
    damage(copied / "c/segments/0000/rows/00001.array_record")
    damage(segment(copied / "c", 2) / "taps/mlp_out/c/2/0/0/0")
    monkeypatch.undo()
    repair(configs(copied)[3])
    assert contents(copied / "c") == contents(place / "c")


def test_text_and_teacher_that_have_moved(tmp_path: Path, place: Path) -> None:
    """The plan's own paths lead nowhere: the command's do."""
    here = shutil.copytree(place, tmp_path / "here", ignore=shutil.ignore_patterns("c"))
    config = configs(here)[1].model_copy(update={"extend": False})
    build_cache(config)
    expected = contents(here / "c")
    damage(here / "c/segments/0000/rows/00000.array_record")
    there = here.rename(tmp_path / "there")
    words = ["build", "--repair", "--cache", str(there / "c")]
    assert main(words) == 2
    assert main([*words, "--teacher.path", str(there / "teacher")]) == 2
    assert main([*words, "--teacher.path", str(there / "teacher"), "--data.path", str(there / "two.jsonl")]) == 0
    assert contents(there / "c") == expected


def test_a_text_that_has_changed_is_refused_where_it_is_needed(
    tmp_path: Path, place: Path, console: pytest.CaptureFixture[str]
) -> None:
    here = shutil.copytree(place, tmp_path / "here", ignore=shutil.ignore_patterns("c"))
    config = configs(here)[1].model_copy(update={"extend": False})
    build_cache(config)
    (here / "two.jsonl").write_text(json.dumps({"text": "another text " * 20}))
    damage(here / "c/segments/0000/taps/attn_out/c/0/0/0/0")
    repair(config)
    damage(here / "c/segments/0000/rows/00000.array_record")
    before = contents(here / "c")
    with pytest.raises(PlanMismatchError, match="text is missing") as caught:
        repair(config)
    assert "--data.path" in caught.value.next
    assert contents(here / "c") == before


def test_prepared_rows_with_other_settings_than_the_defaults(tmp_path: Path, place: Path) -> None:
    """The plan's config holds defaults that the user never stated; the rows were made with others."""
    rows = tmp_path / "rows"
    stated = ["--data.path", str(place / "two.jsonl"), "--data.row-tokens", "16", "--data.eval-rows", "3"]
    assert main(["prepare", "--out", str(rows), *stated, "--data.tokenizer", str(place / "teacher")]) == 0
    words = ["build", "--cache", str(tmp_path / "c"), "--teacher.path", str(place / "teacher"), "--batch-rows", "4"]
    assert main([*words, "--data.path", str(rows)]) == 0
    expected = contents(tmp_path / "c")
    damage(tmp_path / "c/segments/0000/rows/00000.array_record")
    assert main(["build", "--repair", "--cache", str(tmp_path / "c")]) == 0
    assert contents(tmp_path / "c") == expected


def test_a_manifest_of_many_segments_is_made_again(place: Path, copied: Path) -> None:
    damage(copied / "c/manifest.json", None)
    damage(segment(copied / "c", 3) / "taps/mlp_out/c/0/0/0/0")
    before = contents(copied / "c")
    with pytest.raises(DamageError, match=r"cannot be reconstructed[\s\S]*0003"):
        repair(configs(copied)[0])
    assert contents(copied / "c") == before
    shutil.copy(segment(place / "c", 3) / "taps/mlp_out/c/0/0/0/0", segment(copied / "c", 3) / "taps/mlp_out/c/0/0/0/0")
    repair(configs(copied)[0])
    assert contents(copied / "c") == contents(place / "c")


def test_an_unfinished_extension_is_made_ready(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch, console: pytest.CaptureFixture[str]
) -> None:
    """The finished segment is repaired, the other one loses the receipt of its damaged shard, and goes on."""
    here = shutil.copytree(place, tmp_path / "here", ignore=shutil.ignore_patterns("000[123]"))
    shutil.rmtree(here / "c")
    first, _, third, _ = configs(here)
    build_cache(first)
    with monkeypatch.context() as patch:
        patch.setattr("distillcache.cache_builder.record.loop.finish_segment", lambda store, plan: None)
        build_cache(third)
    damage(here / "c/segments/0000/taps/attn_out/c/2/0/0/0")
    damage(segment(here / "c", 1) / "taps/mlp_out/c/2/0/0/0")
    receipts = segment(here / "c", 1) / "receipts"
    count = len(list(receipts.iterdir()))
    repair(first)
    assert "not finished: segment 0001" in console.readouterr().err
    assert len(list(receipts.iterdir())) == count - 1
    assert not (receipts / "00002.json").exists()
    build_cache(third)
    assert verify_cache(Store(str(here / "c")))["findings"] == []
    found, expected = contents(here / "c"), contents(place / "c")
    there, now = segment(place / "c", 2).name, segment(here / "c", 1).name
    taps = [name for name in expected if f"{there}/taps/" in name]
    assert taps
    for name in taps:
        assert found[name.replace(there, now)] == expected[name]


def test_an_interrupted_repair_of_many_segments_goes_on(
    place: Path, copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        damage(segment(copied / "c", number) / "index.bin", None)
        damage(segment(copied / "c", number) / "stats.json")
    real = Store.put_once
    for stop_at in (2, 12, 40):
        count = 0

        def write(self: Store, key: str, value: bytes, stop_at: int = stop_at) -> None:
            nonlocal count
            count += 1
            if count == stop_at:
                raise Interrupted("killed")
            real(self, key, value)

        with monkeypatch.context() as patch:
            patch.setattr(Store, "put_once", write)
            with pytest.raises(Interrupted):
                repair(configs(copied)[0])
    repair(configs(copied)[0])
    assert contents(copied / "c") == contents(place / "c")


def test_a_copied_segment_is_left_to_copy(place: Path, tmp_path: Path, console: pytest.CaptureFixture[str]) -> None:
    """An extension of a copy is the teacher's; the copy itself names the command that repairs it."""
    copy = tmp_path / "copy"
    copy_cache(CopyConfig(src=str(place / "c"), dst=str(copy), rows="0:38"))
    assert main(["build", "--repair", "--cache", str(copy)]) == 2
    assert f"distillcache copy {place / 'c'} {copy} --repair" in console.readouterr().err
    second = configs(place)[1]
    data = second.data.model_copy(update={"max_rows": 6})  # rows that the copy does not hold
    added = second.model_copy(update={"cache": str(copy), "data": data, "taps": THREE})
    build_cache(added)
    expected = contents(copy)
    damage(segment(copy, 1) / "taps/attn_out/c/0/0/0/0")
    repair(added)
    assert contents(copy) == expected
    damage(segment(copy, 1) / "taps/attn_out/c/0/0/0/0")
    damage(copy / "segments/0000/taps/attn_out/c/0/0/0/0")
    with pytest.raises(ConfigError, match="from its source"):
        repair(added)
    copy_cache(CopyConfig(src=str(place / "c"), dst=str(copy), repair=True))
    assert "not repaired: segment 0001" in console.readouterr().err
    assert main(["build", "--repair", "--cache", str(copy)]) == 0
    assert contents(copy) == expected


def test_another_config_names_the_way(copied: Path) -> None:
    config = configs(copied)[0].model_copy(update={"teacher": TeacherConfig(path="nowhere"), "shard_rows": 2})
    with pytest.raises(PlanMismatchError, match=r"shard_rows[\s\S]*build --repair --cache"):
        repair(config)
