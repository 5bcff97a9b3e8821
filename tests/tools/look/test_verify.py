"""`distillcache verify`: whatever is changed under a cache is found, named, and refused by the reader that meets it."""

import json
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from distillcache.cache_builder.build import build_cache
from distillcache.cache_builder.record import loop as loop_module
from distillcache.cache_builder.repair.check_shard import check_object, stored_objects
from distillcache.schemas.cache.segment import open_cache, read_plan
from distillcache.schemas.config import DataConfig, TapConfig, TapsConfig
from distillcache.schemas.errors import DamageError, InputError, Interrupted, StorageError
from distillcache.schemas.format import layout
from distillcache.schemas.format.canonical import to_canonical
from distillcache.schemas.store.stale_locks import lock_as_tensorstore
from distillcache.schemas.store.store import Store
from distillcache.tools.cli import main
from distillcache.tools.look.verify import verify_cache
from distillcache.trainer.feed.cache_source import CacheSource
from tests.conftest import build_config, save_teacher

SEGMENT = "segments/0000"
ATTN_OUT = f"{SEGMENT}/taps/attn_out"


@pytest.fixture
def copy(cache: Path, tmp_path: Path) -> Path:
    shutil.copytree(cache, tmp_path / "c")
    return tmp_path / "c"


def files_of(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file())


@contextmanager
def flipped(path: Path, place: int, bit: int = 0) -> Iterator[None]:
    """One bit of a file turned over, and turned back."""
    with path.open("r+b", buffering=0) as file:
        (byte,) = os.pread(file.fileno(), 1, place)
        os.pwrite(file.fileno(), bytes([byte ^ (1 << bit)]), place)
        yield
        os.pwrite(file.fileno(), bytes([byte]), place)


def findings_of(cache: Path, *, quick: bool = False) -> list[tuple]:
    """(what, object, shard, rows, tap, slots) of every finding."""
    keys = ("what", "object", "shard", "rows", "tap", "slots")
    return [tuple(found[key] for key in keys) for found in verify_cache(Store(str(cache)), quick=quick)["findings"]]


def test_a_whole_cache_has_no_findings(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags in ([], ["--quick"]):
        assert main(["verify", str(cache), "--json", *flags]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["ok"]
        assert found["finished"]
        assert found["findings"] == []
        assert found["checked"] == {"files": 8, "shards": 5, "objects": 10, "rows_files": 5}
        assert main(["verify", str(cache), *flags]) == 0
        printed = capsys.readouterr().out
        assert ("Every byte is as committed" in printed) == (not flags)
        assert f"distillcache fidelity {cache}" in printed


@pytest.mark.parametrize("codec", ["f32", "int8"])
def test_other_codecs_are_whole_too(tmp_path: Path, teacher: Path, corpus: Path, codec: str) -> None:
    taps = TapsConfig(attn_out=TapConfig(codec=codec), resid=TapConfig(codec=codec, delta=codec == "int8"))
    build_cache(build_config(tmp_path / "c", teacher, corpus, taps=taps))
    for quick in (False, True):
        assert findings_of(tmp_path / "c", quick=quick) == []


def test_a_flipped_byte_of_any_file_is_found(copy: Path) -> None:
    drawn = random.Random(0)
    for path in files_of(copy):
        size = path.stat().st_size
        for place in {0, size - 1, *(drawn.randrange(size) for _ in range(2))}:
            with flipped(path, place, drawn.randrange(8)):
                named = {found[1] for found in findings_of(copy)}
                assert named == {str(path.relative_to(copy))}, place
    assert findings_of(copy) == []


@pytest.mark.slow  # every 29th byte; with steps of 13, 5 and 1 all were found as well
@pytest.mark.longest
def test_bytes_throughout_the_small_files_count(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    """In a cache of two shards: each look at it reads all of them."""
    cache = tmp_path / "c"
    build_cache(build_config(cache, teacher, corpus, shard_rows=24))
    for number, path in enumerate(files_of(cache)):
        for place in range(number % 29, path.stat().st_size if path.stat().st_size < 4000 else 0, 29):
            with flipped(path, place, place % 8):
                assert {found[1] for found in findings_of(cache, quick=True)} == {str(path.relative_to(cache))}, place


@pytest.mark.slow
def test_bytes_throughout_an_object_count(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    """Rows of four tokens: objects of as many chunks as others have, each of fewer bytes."""
    data = DataConfig(path=str(corpus), row_tokens=4, eval_rows=2, max_rows=22)
    build_cache(build_config(tmp_path / "c", teacher, corpus, data=data))
    segment = open_cache(Store(str(tmp_path / "c")))[0]
    for stored in stored_objects(segment.plan, 0, 2, segment.record(2)):  # the last, of six rows
        path = tmp_path / "c" / stored.key
        for place in range(0, path.stat().st_size, 11 if stored.tap_object is not None else 89):
            with flipped(path, place, place % 8):
                assert check_object(segment.store, segment.plan, stored, quick=False) is not None, place


def test_the_reader_that_meets_a_flipped_byte_raises(copy: Path) -> None:
    """Every file that holds or vouches for rows or taps; the others are not read for a batch.

    The one exception are bytes of an object's index that nobody needs to find the chunks, such as its checksum: what is
    read then is what was committed.
    """
    drawn = random.Random(1)
    beside = {"stats.json", "times.json", "side.safetensors", "tokenizer.json", "zarr.json"}
    whole = read_everything(copy)
    for path in files_of(copy):
        size = path.stat().st_size
        data_ends = size - 16 * 8 * 4 - 4 if "/c/" in str(path) else size  # 8 rows of at most 4 slots
        for place in {0, size - 1, *(drawn.randrange(size) for _ in range(2))} if path.name not in beside else ():
            with flipped(path, place, drawn.randrange(8)):
                try:
                    found = read_everything(copy)
                except DamageError:
                    continue
            assert place >= data_ends, f"{path} byte {place}"
            for name in ("resid", "attn_out"):
                np.testing.assert_array_equal(found[name]["codes"], whole[name]["codes"])


def read_everything(cache: Path) -> dict:
    source = CacheSource(str(cache))
    return source[range(len(source))]


def test_a_damaged_chunk_names_its_row_and_slot(copy: Path) -> None:
    # Inner chunks of 16 x 24 bf16 lie row by row, slot by slot: the seventh is row 2, slot 1 of three.
    with flipped(copy / ATTN_OUT / "c/1/0/0/0", 7 * 16 * 24 * 2 + 100):
        expected = ("damaged", f"{ATTN_OUT}/c/1/0/0/0", 1, [10, 11], "attn_out", [1])
        assert findings_of(copy) == [expected]
        source = CacheSource(str(copy))
        source[[index for index in range(len(source)) if index != 10]]
        with pytest.raises(DamageError, match=r"row +10\n"):
            source[[10]]


def test_delta_coding_carries_damage_to_the_next_keyframe(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    cache = tmp_path / "c"
    resid = TapConfig(codec="int8", delta=True, keyframe_every=2)
    build_cache(build_config(cache, teacher, corpus, taps=TapsConfig(resid=resid)))
    with flipped(cache / f"{SEGMENT}/taps/resid/c/0/0/0/0", 0):
        assert [found[4:] for found in findings_of(cache)] == [("resid", [0, 1])]


def test_missing_truncated_and_longer_files_are_told_apart(copy: Path) -> None:
    for path in files_of(copy):
        name, data = str(path.relative_to(copy)), path.read_bytes()
        # Small files are known by their digests alone.
        large = path.suffix == ".array_record" or path.parent.name == "0"
        for changed, expected in ((data[:-1], "truncated"), (b"", "truncated"), (data + b"x", "damaged")):
            path.write_bytes(changed)
            for quick in (False, True):
                found = findings_of(copy, quick=quick)
                assert {one[1] for one in found} == {name}, (expected, quick)
                assert not large or found[0][0] == expected
        path.unlink()
        missing = set() if path.name == "times.json" else {("missing", name)}  # caches of before have none
        for quick in (False, True):
            assert {one[:2] for one in findings_of(copy, quick=quick)} == missing
        path.write_bytes(data)


def test_swapped_objects_are_named_with_their_owners(copy: Path) -> None:
    one, other = (copy / ATTN_OUT / f"c/{shard}/0/0/0" for shard in (1, 2))
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    assert findings_of(copy) == [
        ("swapped", f"{ATTN_OUT}/c/1/0/0/0", 1, [8, 16], "attn_out", [0, 1, 2]),
        ("swapped", f"{ATTN_OUT}/c/2/0/0/0", 2, [16, 24], "attn_out", [0, 1, 2]),
    ]
    found = verify_cache(Store(str(copy)))["findings"]
    assert found[0]["detail"] == f"it holds what belongs to {ATTN_OUT}/c/2/0/0/0"


def test_swapped_rows_and_index_records_are_found(copy: Path) -> None:
    rows = [copy / f"{SEGMENT}/rows/0000{shard}.array_record" for shard in (0, 1)]
    rows[0].write_bytes(rows[1].read_bytes())
    assert findings_of(copy) == [("swapped", f"{SEGMENT}/rows/00000.array_record", 0, [0, 8], None, [])]
    index = copy / f"{SEGMENT}/index.bin"
    size = index.stat().st_size // 5
    data = index.read_bytes()
    index.write_bytes(data[size : 2 * size] + data[:size] + data[2 * size :])
    assert ("stale", f"{SEGMENT}/index.bin", None, [0, 38], None, []) in findings_of(copy, quick=True)


def test_an_object_of_another_build_is_stale(tmp_path: Path, copy: Path, corpus: Path) -> None:
    build_cache(build_config(tmp_path / "other", save_teacher(tmp_path / "teacher", seed=1), corpus))
    for name in (f"{ATTN_OUT}/c/3/0/0/0", f"{SEGMENT}/stats.json"):
        shutil.copy(tmp_path / "other" / name, copy / name)
    assert findings_of(copy) == [
        ("stale", f"{SEGMENT}/stats.json", None, None, None, []),
        ("stale", f"{ATTN_OUT}/c/3/0/0/0", 3, [24, 32], "attn_out", [0, 1, 2]),
    ]


def test_foreign_files_are_named(copy: Path) -> None:
    names = [
        "notes.txt",
        f"{SEGMENT}/receipts/00000.json",
        f"{SEGMENT}/rows/00005.array_record",
        f"{SEGMENT}/rows/1.array_record",
        f"{ATTN_OUT}/c/0/1/0/0",
        "segments/0001/rows/00000.array_record",
    ]
    for name in names:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("?")
    for quick in (False, True):
        found = findings_of(copy, quick=quick)
        assert {one[0] for one in found} == {"foreign"}
        assert sorted(one[1] for one in found) == sorted(names)


def test_quick_reads_no_data(copy: Path) -> None:
    """It sees a damaged shard index, and not a damaged chunk."""
    path = copy / ATTN_OUT / "c/0/0/0/0"
    with flipped(path, 0):
        assert findings_of(copy, quick=True) == []
    for place in (-1, -200):
        with flipped(path, path.stat().st_size + place):
            expected = ("damaged", f"{ATTN_OUT}/c/0/0/0/0", 0, [0, 8], "attn_out", [0, 1, 2])
            assert findings_of(copy, quick=True) == [expected]


def test_an_unreadable_object_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad sector ends neither the check nor the list."""
    name, real = f"{ATTN_OUT}/c/0/0/0/0", Store.read

    def read(self: Store, key: str, byte_range: slice | None = None) -> bytes | None:
        if key == name:
            raise StorageError("an object cannot be read", {"object": key, "cause": "Input/output error"})
        return real(self, key, byte_range)

    monkeypatch.setattr(Store, "read", read)
    assert [found[:2] for found in findings_of(cache)] == [("unreadable", name)]


def test_the_report_and_the_exit_code(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with flipped(copy / ATTN_OUT / "c/1/0/0/0", 0):
        assert main(["verify", str(copy), "--json"]) == 2
        out = capsys.readouterr().out
        assert json.loads(out)["findings"][0]["rows"] == [8, 9]
        assert out.count("\n") == 1
        assert main(["verify", str(copy)]) == 2
        shown = capsys.readouterr()
        assert "c/1/0/0/0 1 8 attn_out 0 1 of" in " ".join(shown.out.split())
        assert "1 damaged; 1 of 38 rows cannot be trusted" in shown.out
        assert "build --repair" in shown.err
    with pytest.raises(InputError, match="no cache here"):
        verify_cache(Store(str(copy / "nowhere")))


def test_a_lost_manifest_with_other_damage_is_not_sent_to_a_repair_that_refuses(
    copy: Path, teacher: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "manifest.json").unlink()
    assert main(["verify", str(copy)]) == 2
    assert "build --repair" in capsys.readouterr().err  # of a lost manifest alone, it helps
    with flipped(copy / ATTN_OUT / "c/1/0/0/0", 0):
        assert main(["verify", str(copy)]) == 2
        said = capsys.readouterr().err
        repair = build_config(copy, teacher, corpus, repair=True)
        with pytest.raises(DamageError) as caught:
            build_cache(repair)
    assert "build without --repair" in said
    assert caught.value.next in " ".join(said.split())


@pytest.fixture
def unfinished(tmp_path: Path, teacher: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A build that stopped after some shards."""
    real, commits = loop_module.ShardWriter.add, []

    def add(self, shard, *arguments):
        real(self, shard, *arguments)
        commits.append(shard)
        if len(commits) > 4:
            raise Interrupted("enough")

    with monkeypatch.context() as patch:
        patch.setattr(loop_module.ShardWriter, "add", add)
        with pytest.raises(Interrupted):
            build_cache(build_config(tmp_path / "c", teacher, corpus))
    return tmp_path / "c"


def test_an_unfinished_cache_is_checked_by_its_receipts(unfinished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = verify_cache(Store(str(unfinished)))
    assert (found["ok"], found["finished"], found["checked"]["shards"]) == (True, False, 2)
    assert main(["verify", str(unfinished)]) == 0
    assert "only its committed shards" in capsys.readouterr().out
    with flipped(unfinished / ATTN_OUT / "c/1/0/0/0", 0):
        assert [one[:4] for one in findings_of(unfinished)] == [("damaged", f"{ATTN_OUT}/c/1/0/0/0", 1, [8, 9])]
    receipt = unfinished / f"{SEGMENT}/receipts/00001.json"
    with flipped(receipt, 40):
        assert [one[:3] for one in findings_of(unfinished)] == [("damaged", f"{SEGMENT}/receipts/00001.json", 1)]
    shutil.copy(unfinished / f"{SEGMENT}/receipts/00000.json", receipt)
    assert [one[:3] for one in findings_of(unfinished)] == [("stale", f"{SEGMENT}/receipts/00001.json", 1)]


def test_a_plan_of_another_build_is_stale(copy: Path) -> None:
    store = Store(str(copy))
    plan = read_plan(store, "0000")
    assert plan is not None
    store.write(layout.plan_key("0000"), to_canonical(plan.model_copy(update={"created": {}})))
    assert [one[:4] for one in findings_of(copy)] == [("stale", f"{SEGMENT}/plan.json", None, [0, 38])]


def test_memory_and_order_do_not_depend_on_the_threads(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for path in files_of(copy):
        if path.parent.name == "0":
            path.write_bytes(rng.bytes(path.stat().st_size))
    found = findings_of(copy)
    monkeypatch.setattr("distillcache.cache_builder.repair.check.WORKERS", 1)
    assert found == findings_of(copy)
    assert len(found) == 10


def test_a_foreign_receipt_is_named_and_ignored(unfinished: Path, teacher: Path, corpus: Path) -> None:
    """Neither `verify` nor readers nor the build that goes on take it for a shard's."""
    names = ["notes.txt", "00000.json.bak", "x.json", "1.json", "00099.json", "-0001.json"]
    for name in names:
        (unfinished / f"{SEGMENT}/receipts/{name}").write_text("?")
    found = verify_cache(Store(str(unfinished)))
    assert sorted((one["what"], one["object"]) for one in found["findings"]) == sorted(
        ("foreign", f"{SEGMENT}/receipts/{name}") for name in names
    )
    assert found["checked"]["shards"] == 2
    (segment,) = open_cache(Store(str(unfinished)), partial=True)
    assert segment.committed == {0, 1}
    build_cache(build_config(unfinished, teacher, corpus))
    assert findings_of(unfinished) == []


def test_lock_files_of_a_build_are_its_own(unfinished: Path) -> None:
    """It clears them before it writes."""
    (unfinished / f"{ATTN_OUT}/c/0/0/0/0.__lock").write_bytes(b"half")
    assert findings_of(unfinished) == []


def test_lock_files_of_dead_writers_are_foreign(copy: Path) -> None:
    """Those that a live writer holds are not."""
    dead = [f"{ATTN_OUT}/c/0/0/0/0.__lock", "manifest.json.__lock"]
    held = copy / f"{SEGMENT}/stats.json.__lock"
    for path in (*(copy / name for name in dead), held):
        path.write_bytes(b"half")
    with held.open("r+b") as file:
        lock_as_tensorstore(file.fileno())
        for quick in (False, True):
            found = findings_of(copy, quick=quick)
            assert sorted(one[:2] for one in found) == sorted(("foreign", name) for name in dead)
    assert len(findings_of(copy)) == 3
    assert held.read_bytes() == b"half"
