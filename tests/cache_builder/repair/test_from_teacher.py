"""`build --repair`: exactly what is damaged is computed again, to the bytes that were there before."""

import random
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from distillcache.cache_builder.build import build_cache
from distillcache.cache_builder.record import loop as loop_module
from distillcache.cache_builder.record.pipeline import ShardWriter
from distillcache.cache_builder.repair import from_teacher as repair_module
from distillcache.cache_builder.repair import restore as mend_module
from distillcache.schemas.cache.segment import read_manifest
from distillcache.schemas.config import BuildConfig
from distillcache.schemas.errors import DamageError, InputError, Interrupted, PlanMismatchError
from distillcache.schemas.store.store import Store
from distillcache.tools.look.verify import verify_cache
from distillcache.trainer.feed.cache_source import CacheSource
from tests.conftest import build_config, save_teacher

SEGMENT = "segments/0000"
ATTN_OUT = f"{SEGMENT}/taps/attn_out"


@pytest.fixture
def config(cache: Path, tmp_path: Path, teacher: Path, corpus: Path) -> BuildConfig:
    """Of a copy of the finished cache, with `repair`."""
    shutil.copytree(cache, tmp_path / "c")
    return build_config(tmp_path / "c", teacher, corpus, repair=True)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first rows of the batches that the teacher is given."""
    seen, real = [], mend_module.unit_batches

    def batches(*arguments):
        for first, rows in real(*arguments):
            seen.append(first)
            yield first, rows

    monkeypatch.setattr(mend_module, "unit_batches", batches)
    return seen


def contents(cache: Path | str) -> dict[str, bytes]:
    """Every file but the shards' times, which cannot be reconstructed."""
    files = {str(path.relative_to(cache)): path for path in Path(cache).rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if path.name != "times.json"}


def damage(config: BuildConfig, name: str, place: int | None = None) -> None:
    """Turn one byte over; without a place, delete the file."""
    path = Path(config.cache) / name
    data = bytearray(path.read_bytes())
    path.unlink()
    if place is not None:
        data[place] ^= 0x40
        path.write_bytes(bytes(data))


def is_whole(config: BuildConfig) -> bool:
    return verify_cache(Store(config.cache))["ok"]


def test_exactly_the_damaged_shards_are_computed(config: BuildConfig, cache: Path, computed: list[int]) -> None:
    damage(config, f"{ATTN_OUT}/c/1/0/0/0", 500)
    damage(config, f"{SEGMENT}/taps/resid/c/4/0/0/0")
    before = {path: path.stat().st_mtime_ns for path in Path(config.cache).rglob("*") if path.is_file()}
    assert build_cache(config) == read_manifest(Store(str(cache)))
    assert computed == [8, 12, 32, 36]
    assert contents(config.cache) == contents(cache)
    changed = {path for path, when in before.items() if path.stat().st_mtime_ns != when}
    assert changed == {Path(config.cache) / ATTN_OUT / "c/1/0/0/0"}


def test_a_whole_cache_is_left_alone(config: BuildConfig, computed: list[int]) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(config.cache).rglob("*")}
    build_cache(config)
    assert computed == []
    assert before == {path: path.stat().st_mtime_ns for path in Path(config.cache).rglob("*")}


@pytest.mark.parametrize("place", [None, 0, 3000])
def test_rows_come_from_the_text_where_theirs_are_lost(
    config: BuildConfig, cache: Path, computed: list[int], place: int | None
) -> None:
    damage(config, f"{SEGMENT}/rows/00003.array_record", place)
    build_cache(config)
    assert computed == [24, 28]
    assert contents(config.cache) == contents(cache)


def test_the_text_is_not_prepared_for_whole_rows(config: BuildConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repair_module, "open_or_prepare", lambda *_: pytest.fail("the rows are whole"))
    damage(config, f"{ATTN_OUT}/c/0/0/0/0", 0)
    build_cache(config)
    assert is_whole(config)


@pytest.mark.parametrize("place", [None, 0, 1200, -1])
def test_a_lost_index_record_costs_its_shard(
    config: BuildConfig, cache: Path, computed: list[int], place: int | None
) -> None:
    damage(config, f"{SEGMENT}/index.bin", place)
    build_cache(config)
    assert contents(config.cache) == contents(cache)
    assert len(computed) == (10 if place is None else 2)


def test_a_truncated_and_a_longer_index(config: BuildConfig, cache: Path, computed: list[int]) -> None:
    index = Path(config.cache) / SEGMENT / "index.bin"
    data = index.read_bytes()
    index.write_bytes(data + b"more")
    build_cache(config)
    assert computed == []
    index.write_bytes(data[: len(data) * 3 // 5 + 1])
    build_cache(config)
    assert computed == [24, 28, 32, 36]
    size = len(data) // 5
    index.write_bytes(data[size : 2 * size] + data[:size] + data[2 * size :])
    build_cache(config)
    assert contents(config.cache) == contents(cache)


def test_small_files_are_written_again(config: BuildConfig, cache: Path, computed: list[int]) -> None:
    for name in ("tokenizer.json", f"{SEGMENT}/side.safetensors", f"{ATTN_OUT}/zarr.json"):
        damage(config, name, 20)
    build_cache(config)
    assert computed == []
    assert contents(config.cache) == contents(cache)


def test_lost_statistics_take_every_shard_and_write_nothing_else(
    config: BuildConfig, cache: Path, computed: list[int]
) -> None:
    damage(config, f"{SEGMENT}/stats.json", 20)
    before = {path: path.stat().st_mtime_ns for path in Path(config.cache).rglob("taps/**/*")}
    build_cache(config)
    assert len(computed) == 10
    assert contents(config.cache) == contents(cache)
    assert before == {path: path.stat().st_mtime_ns for path in Path(config.cache).rglob("taps/**/*")}


def test_damaged_times_are_dropped(config: BuildConfig) -> None:
    """Nobody can tell any more how long the shards took."""
    times = Path(config.cache) / SEGMENT / "times.json"
    damage(config, f"{SEGMENT}/times.json", 30)
    assert not is_whole(config)
    build_cache(config.model_copy(update={"repair": True}))
    assert is_whole(config)
    assert not times.exists()


@pytest.mark.parametrize("shard_rows", [2, 8])
def test_everything_at_once(tmp_path: Path, teacher: Path, corpus: Path, shard_rows: int) -> None:
    """Shards smaller than a teacher batch, too: their neighbours are computed with them, and left alone."""
    config = build_config(tmp_path / "c", teacher, corpus, shard_rows=shard_rows)
    build_cache(config)
    before = contents(config.cache)
    drawn = random.Random(shard_rows)
    spared = ("manifest.json", f"{SEGMENT}/plan.json")
    for name in drawn.sample(sorted(set(before) - set(spared)), len(before) // 2):
        damage(config, name, drawn.choice([None, drawn.randrange(len(before[name]))]))
    assert not is_whole(config)
    build_cache(config.model_copy(update={"repair": True}))
    assert contents(config.cache) == before


@pytest.mark.parametrize("place", [None, 30])
def test_a_lost_plan_cannot_be_computed(config: BuildConfig, place: int | None) -> None:
    damage(config, f"{SEGMENT}/plan.json", place)
    before = contents(config.cache)
    with pytest.raises(DamageError) as caught:
        build_cache(config)
    assert f"copy {SEGMENT}/plan.json back" in caught.value.next
    assert contents(config.cache) == before


@pytest.mark.parametrize("place", [None, 30])
def test_a_lost_manifest_is_made_again(
    config: BuildConfig, cache: Path, computed: list[int], place: int | None
) -> None:
    damage(config, "manifest.json", place)
    assert build_cache(config) == read_manifest(Store(str(cache)))
    assert contents(config.cache) == contents(cache)
    assert computed == []


@pytest.mark.parametrize(
    "name",
    [
        f"{ATTN_OUT}/c/1/0/0/0",
        f"{ATTN_OUT}/zarr.json",
        f"{SEGMENT}/index.bin",
        f"{SEGMENT}/rows/00002.array_record",
        f"{SEGMENT}/side.safetensors",
        f"{SEGMENT}/stats.json",
        "tokenizer.json",
    ],
)
@pytest.mark.parametrize("place", [None, 40])
def test_a_lost_manifest_is_not_guessed(config: BuildConfig, cache: Path, name: str, place: int | None) -> None:
    """Whatever else is damaged, no manifest vouches for it; the advice in the message works."""
    if name.endswith("index.bin") and place is None:
        pytest.skip("then nothing tells it from a cache that was never finished, and it is built like one")
    damage(config, "manifest.json")
    damage(config, name, place)
    before = contents(config.cache)
    with pytest.raises(DamageError, match=r"cannot be reconstructed[\s\S]*build without --repair"):
        build_cache(config)
    assert contents(config.cache) == before
    build_cache(config.model_copy(update={"repair": False}))
    assert contents(config.cache) == contents(cache)


def test_a_longer_index_or_swapped_records_give_no_manifest(config: BuildConfig) -> None:
    index = Path(config.cache) / SEGMENT / "index.bin"
    data, size = index.read_bytes(), index.stat().st_size // 5
    damage(config, "manifest.json")
    for wrong in (data + b"more", data[size : 2 * size] + data[:size] + data[2 * size :]):
        index.write_bytes(wrong)
        with pytest.raises(DamageError, match="cannot be reconstructed"):
            build_cache(config)
    index.write_bytes(data)
    build_cache(config)
    assert is_whole(config)


def test_foreign_files_are_left_and_leftovers_removed(
    config: BuildConfig, cache: Path, console: pytest.CaptureFixture[str]
) -> None:
    for name in ("notes.txt", f"{SEGMENT}/prepared/rows.json"):
        path = Path(config.cache) / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("?")
    build_cache(config)
    assert "notes.txt does not belong to the cache" in console.readouterr().err
    assert contents(config.cache) == {**contents(cache), "notes.txt": b"?"}


def test_another_config_or_text_is_refused(config: BuildConfig, corpus: Path, tmp_path: Path) -> None:
    damage(config, f"{SEGMENT}/rows/00001.array_record", 0)
    before = contents(config.cache)
    for wrong in ({"batch_rows": 2}, {"data": config.data.model_copy(update={"row_tokens": 8})}):
        with pytest.raises(PlanMismatchError, match="another config"):
            build_cache(config.model_copy(update=wrong))
    other = config.teacher.model_copy(update={"path": str(save_teacher(tmp_path / "other", seed=1))})
    with pytest.raises(PlanMismatchError, match="another teacher"):
        build_cache(config.model_copy(update={"teacher": other}))
    assert contents(config.cache) == before
    with pytest.raises(InputError, match="no cache here"):
        build_cache(config.model_copy(update={"cache": str(tmp_path / "nowhere")}))


def test_other_bits_are_never_put_in_place(config: BuildConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that computes other bits must not replace the whole objects of a damaged shard, nor the damaged."""
    damage(config, f"{ATTN_OUT}/c/2/0/0/0", 0)
    before = contents(config.cache)
    real = ShardWriter.add

    def add(self, shard, rows, codes, *more):
        real(self, shard, rows, {array: values + 1 for array, values in codes.items()}, *more)

    monkeypatch.setattr(ShardWriter, "add", add)
    with pytest.raises(PlanMismatchError, match="not what was committed"):
        build_cache(config)
    assert contents(config.cache) == before


@pytest.mark.parametrize("lost", ["index.bin", "stats.json", "rows/00002.array_record"])
def test_an_interrupted_repair_goes_on(
    config: BuildConfig, cache: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    """At every write in turn: meanwhile readers get errors or the committed bytes."""
    expected, real = contents(cache), Store.write
    source = CacheSource(str(cache))
    batch = source[range(len(source))]

    def repair_until(stop_at: int) -> int:
        count = 0

        def write(self: Store, key: str, value: bytes) -> None:
            nonlocal count
            count += 1
            if count == stop_at:
                raise Interrupted("killed")
            real(self, key, value)

        with monkeypatch.context() as patch:
            patch.setattr(Store, "write", write)
            build_cache(config)
        return count

    damage(config, f"{SEGMENT}/{lost}", 20)
    damage(config, f"{ATTN_OUT}/c/3/0/0/0")
    for stop_at in (1, 2, 4, 7):
        with suppress(Interrupted):
            repair_until(stop_at)
        assert_reads_are_true(config, batch)
    repair_until(0)
    assert contents(config.cache) == expected


def assert_reads_are_true(config: BuildConfig, batch: dict) -> None:
    for row in range(len(batch["tokens"])):
        try:
            found = CacheSource(config.cache)[[row]]
        except DamageError:
            continue
        assert (found["tokens"][0] == batch["tokens"][row]).all()
        for tap in ("attn_out", "resid"):
            assert (found[tap]["codes"][:, 0] == batch[tap]["codes"][:, row]).all()


def test_an_unfinished_cache_builds_its_damaged_shards_again(
    tmp_path: Path, teacher: Path, corpus: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build_config(tmp_path / "c", teacher, corpus)
    with monkeypatch.context() as patch:
        patch.setattr(loop_module, "finish_segment", lambda store, plan: None)
        build_cache(config)
    damage(config, f"{ATTN_OUT}/c/1/0/0/0", 9)
    damage(config, f"{SEGMENT}/receipts/00003.json", 9)
    receipts = Path(config.cache) / SEGMENT / "receipts"
    whole = {path: path.stat().st_mtime_ns for path in receipts.iterdir() if path.name[4] not in "13"}
    with monkeypatch.context() as patch:
        patch.setattr(loop_module, "finish_segment", lambda store, plan: None)
        build_cache(config.model_copy(update={"repair": True}))
    assert whole.items() <= {path: path.stat().st_mtime_ns for path in receipts.iterdir()}.items()
    build_cache(config)
    assert is_whole(config)
    names = ("plan.json", "manifest.json")
    assert [data for name, data in sorted(contents(config.cache).items()) if not name.endswith(names)] == [
        data for name, data in sorted(contents(cache).items()) if not name.endswith(names)
    ]
