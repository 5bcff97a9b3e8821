"""A cache that grew equals one that was built at once: same codes, nothing rewritten, whatever interrupted it."""

import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

import distillcache.schemas.cache.lease_file as leases_module
from distillcache.cache_builder.build import build_cache
from distillcache.cache_builder.record import finish as finish_module
from distillcache.schemas.cache.segment import open_cache, read_manifest, segment_names, segment_number
from distillcache.schemas.config import BuildConfig, DataConfig, TapConfig, TapsConfig
from distillcache.schemas.errors import ConfigError, InputError, PlanMismatchError, StorageError
from distillcache.schemas.format import layout
from distillcache.schemas.format.canonical import to_canonical
from distillcache.schemas.store.store import Store
from distillcache.tools.look.verify import verify_cache
from distillcache.trainer.feed.cache_source import CacheSource
from tests.conftest import build_config, save_teacher
from tests.rounding import assert_rounded

THREE = TapsConfig(mlp_out=TapConfig())
TAPS = ("resid", "attn_out", "mlp_out")


def files(cache: Path) -> dict[str, tuple[int, bytes]]:
    """Every file with its time and its bytes."""
    return {
        str(path.relative_to(cache)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in cache.rglob("*")
        if path.is_file()
    }


def assert_only_grown(before: dict[str, tuple[int, bytes]], cache: Path) -> None:
    after = files(cache)
    assert {name: after[name] for name in before if name != layout.MANIFEST} == {
        name: found for name, found in before.items() if name != layout.MANIFEST
    }


def assert_reads_like(grown: Path, whole: Path, taps: tuple[str, ...] = TAPS) -> None:
    one, other = CacheSource(str(grown), taps), CacheSource(str(whole), taps)
    assert (len(one), one.blocks, one.slots) == (len(other), other.blocks, other.slots)
    found, expected = one[range(len(one))], other[range(len(other))]
    np.testing.assert_array_equal(found["tokens"], expected["tokens"])
    for tap in taps:  # what records the rest alone is another program
        assert_rounded(one.decode(found, tap), other.decode(expected, tap), one.taps[tap].codec)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, teacher: Path, corpus: Path) -> Path:
    """All taps of all blocks, built at once."""
    folder = tmp_path_factory.mktemp("whole") / "c"
    build_cache(build_config(folder, teacher, corpus, taps=THREE))
    return folder


@pytest.fixture(scope="module")
def more_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("more") / "more.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("and then some more " * 9, "quite short")))
    return file


@pytest.fixture
def grown(tmp_path: Path, cache: Path) -> Path:
    """A copy of the finished cache, to be extended."""
    return shutil.copytree(cache, tmp_path / "c")


def with_mlp(grown: Path, teacher: Path, corpus: Path, **changes: object) -> BuildConfig:
    return build_config(grown, teacher, corpus, taps=THREE, extend=True, **changes)


def test_another_tap(grown: Path, whole: Path, teacher: Path, corpus: Path) -> None:
    before = files(grown)
    manifest = build_cache(with_mlp(grown, teacher, corpus))
    names = [(segment_number(entry.segment), entry.rows_of) for entry in manifest.segments]
    assert names == [(0, None), (1, "0000")]
    assert (manifest.rows, manifest.tokens) == (38, 596)
    assert_only_grown(before, grown)
    added = open_cache(Store(str(grown)))[1]
    assert [tap.name for tap in added.plan.taps] == ["mlp_out"]
    assert not (grown / "segments" / added.plan.segment / "rows").exists()
    assert_reads_like(grown, whole)
    assert verify_cache(Store(str(grown)))["findings"] == []


def test_doing_it_again_changes_nothing(grown: Path, teacher: Path, corpus: Path) -> None:
    first = build_cache(with_mlp(grown, teacher, corpus))
    before = files(grown)
    assert build_cache(with_mlp(grown, teacher, corpus)) == first
    assert build_cache(build_config(grown, teacher, corpus)) == first  # the first config finds its work done, too
    assert files(grown) == before


@pytest.mark.bits
def test_other_blocks(tmp_path: Path, whole: Path, teacher: Path, corpus: Path) -> None:
    folder = tmp_path / "c"
    build_cache(build_config(folder, teacher, corpus, taps=THREE, blocks=[0]))
    before = files(folder)
    build_cache(build_config(folder, teacher, corpus, taps=THREE, blocks="all", extend=True))
    assert_only_grown(before, folder)
    slots = {tap.name: tap.slots for tap in open_cache(Store(str(folder)))[1].plan.taps}
    assert slots == {"attn_out": (1, 2), "resid": (2, 3), "mlp_out": (1, 2)}  # nothing twice
    assert_reads_like(folder, whole)


@pytest.mark.bits
def test_more_rows(grown: Path, cache: Path, tmp_path: Path, teacher: Path, corpus: Path, more_text: Path) -> None:
    before = files(grown)
    data = DataConfig(path=str(more_text), row_tokens=16, eval_rows=2)
    manifest = build_cache(build_config(grown, teacher, corpus, data=data, extend=True))
    assert_only_grown(before, grown)
    build_cache(build_config(tmp_path / "more", teacher, corpus, data=data))
    old, new, both = (CacheSource(str(folder)) for folder in (cache, tmp_path / "more", grown))
    assert manifest.rows == len(both) == len(old) + len(new)
    found = both[range(len(both))]
    expected = [source[range(len(source))] for source in (old, new)]
    np.testing.assert_array_equal(found["tokens"], np.concatenate([batch["tokens"] for batch in expected]))
    for tap in ("resid", "attn_out"):
        codes = np.concatenate([batch[tap]["codes"] for batch in expected], axis=1)
        np.testing.assert_array_equal(found[tap]["codes"], codes)
    held_out = CacheSource(str(grown), split="eval")
    assert [held_out.row_number(place) for place in range(len(held_out))] == [
        *old.plan.rows.eval_indices,
        *(len(old) + number for number in new.plan.rows.eval_indices),
    ]
    assert verify_cache(Store(str(grown)))["findings"] == []


def test_a_reader_keeps_reading_by_the_old_manifest(grown: Path, cache: Path, teacher: Path, more_text: Path) -> None:
    source = CacheSource(str(grown))
    build_cache(build_config(grown, teacher, more_text, extend=True))
    assert len(source) == 38
    np.testing.assert_array_equal(source[[37, 3]]["resid"]["codes"], CacheSource(str(cache))[[37, 3]]["resid"]["codes"])


class Killed(BaseException):
    """Stands for a SIGKILL: nothing of ours catches it."""


@pytest.mark.parametrize("after", [False, True])
def test_a_crash_at_the_manifest(
    grown: Path, whole: Path, teacher: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    """Before its replacement the cache is the old one; after it, only tidying up is left."""
    old = read_manifest(Store(str(grown)))
    real = Store.replace_whole

    def replace(store: Store, key: str, value: bytes, generation: bytes) -> bool:
        if key == layout.MANIFEST:
            if after:
                real(store, key, value, generation)
            raise Killed
        return real(store, key, value, generation)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "replace_whole", replace)
        with pytest.raises(Killed):
            build_cache(with_mlp(grown, teacher, corpus))
    assert (read_manifest(Store(str(grown))) == old) is not after
    assert list(grown.rglob("receipts/*.json"))
    build_cache(with_mlp(grown, teacher, corpus))
    assert not list(grown.rglob("receipts/*")) + list(grown.rglob("claims/*")) + list(grown.rglob("*.__lock"))
    assert_reads_like(grown, whole)


def test_a_failing_store_is_gone_on_from(
    grown: Path, whole: Path, teacher: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Store.write

    def write(store: Store, key: str, value: bytes) -> None:
        if re.match("segments/0001-[0-9a-f]{16}/taps/mlp_out/c/2/", key):
            raise StorageError("an object cannot be written", {"object": key})
        real(store, key, value)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", write)
        with pytest.raises(StorageError, match=r"shard +2"):
            build_cache(with_mlp(grown, teacher, corpus))
    kept = {name: found for name, found in files(grown).items() if "/taps/mlp_out/c/" in name}
    assert kept
    build_cache(with_mlp(grown, teacher, corpus))
    assert {name: files(grown)[name] for name in kept} == kept
    assert_reads_like(grown, whole)


def test_two_extensions_at_once_keep_each_other(grown: Path, teacher: Path, corpus: Path) -> None:
    """The loser of the race at the manifest reads it anew instead of overwriting it."""
    store = Store(str(grown))
    manifest = build_cache(with_mlp(grown, teacher, corpus))
    entry, plan = manifest.segments[1], open_cache(store)[1].plan
    assert finish_module._list_segment(store, plan, entry) == manifest
    other = plan.model_copy(update={"segment": "0002"})
    both = finish_module._list_segment(store, other, entry.model_copy(update={"segment": "0002"}))
    assert [each.segment for each in both.segments] == ["0000", plan.segment, "0002"]


def test_what_does_not_belong_is_refused(
    grown: Path, tmp_path: Path, teacher: Path, corpus: Path, more_text: Path
) -> None:
    before = files(grown)
    other = save_teacher(tmp_path / "other", seed=1)
    with pytest.raises(PlanMismatchError, match=r"another teacher[\s\S]*weights"):
        build_cache(with_mlp(grown, other, corpus))
    codec = TapsConfig(attn_out=TapConfig(codec="int8"))
    with pytest.raises(ConfigError, match=r"another codec[\s\S]*taps.attn_out.codec +there 'bf16', here 'int8'"):
        build_cache(build_config(grown, teacher, corpus, taps=codec, extend=True))
    with pytest.raises(PlanMismatchError, match=r"numerics\.dtype"):
        build_cache(with_mlp(grown, teacher, corpus, dtype="bfloat16"))
    with pytest.raises(InputError, match="no finished cache"):
        build_cache(with_mlp(tmp_path / "nothing", teacher, corpus))
    longer = DataConfig(path=str(more_text), row_tokens=32)
    with pytest.raises(ConfigError, match="one length"):
        build_cache(build_config(grown, teacher, corpus, data=longer, extend=True))
    with pytest.raises(PlanMismatchError, match="--extend"):
        build_cache(build_config(grown, teacher, corpus, taps=THREE))
    assert files(grown) == before


@pytest.fixture
def abandoned(grown: Path, teacher: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache whose extension by a tap was killed after some shards."""
    real = Store.write

    def write(store: Store, key: str, value: bytes) -> None:
        if re.match("segments/0001-[0-9a-f]{16}/taps/mlp_out/c/3/", key):
            raise Killed
        real(store, key, value)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", write)
        with pytest.raises(Killed):
            build_cache(with_mlp(grown, teacher, corpus))
    (segment,) = grown.glob("segments/0001-*")
    (segment / "taps/mlp_out/c/3/0/0").mkdir(parents=True, exist_ok=True)
    (segment / "taps/mlp_out/c/3/0/0/0.__lock").write_bytes(b"half")
    return grown


def test_an_unwanted_extension_is_named_and_deleted(
    abandoned: Path, cache: Path, tmp_path: Path, teacher: Path, corpus: Path, more_text: Path
) -> None:
    data = DataConfig(path=str(more_text), row_tokens=16, eval_rows=2)
    other = build_config(abandoned, teacher, corpus, data=data, extend=True)
    before = files(abandoned)
    for config in (other, with_mlp(abandoned, teacher, corpus, shard_rows=4)):
        with pytest.raises(PlanMismatchError, match=r"segments/0001[\s\S]*--abandon"):
            build_cache(config)
        after = files(abandoned)
        assert {name: after[name] for name in before if not name.endswith("__lock")} == {
            name: found for name, found in before.items() if not name.endswith("__lock")
        }
    manifest = build_cache(other.model_copy(update={"abandon": True}))
    assert [entry.rows_of for entry in manifest.segments] == [None, None]
    assert verify_cache(Store(str(abandoned)))["findings"] == []
    build_cache(build_config(tmp_path / "clean", teacher, corpus))
    build_cache(other.model_copy(update={"cache": str(tmp_path / "clean")}))
    assert set(files(abandoned)) == set(files(tmp_path / "clean"))


def test_the_first_config_does_away_with_an_extension(
    abandoned: Path, cache: Path, teacher: Path, corpus: Path
) -> None:
    """Without adding anything; until then `--extend` by what is there leaves its receipts alone."""
    before = files(abandoned)
    build_cache(build_config(abandoned, teacher, corpus, extend=True))
    assert {name for name in before if "/receipts/" in name} <= set(files(abandoned))
    build_cache(build_config(abandoned, teacher, corpus, abandon=True))
    assert {name: data for name, (_, data) in files(abandoned).items()} == {
        name: data for name, (_, data) in files(cache).items()
    }
    assert not list(abandoned.glob("segments/0001*"))
    build_cache(build_config(abandoned, teacher, corpus, abandon=True))  # nothing left to delete
    with pytest.raises(InputError, match="no finished cache"):
        build_cache(build_config(abandoned / "nowhere", teacher, corpus, abandon=True))


def test_an_extension_that_is_a_link_goes_without_its_target(
    abandoned: Path, cache: Path, tmp_path: Path, teacher: Path, corpus: Path
) -> None:
    (segment,) = abandoned.glob("segments/0001-*")
    outside = tmp_path / "outside"
    segment.rename(outside)
    segment.symlink_to(outside)
    before = files(outside)
    build_cache(build_config(abandoned, teacher, corpus, abandon=True))
    assert files(outside) == before
    assert not segment.is_symlink()
    assert set(files(abandoned)) == set(files(cache))


def test_an_extension_that_is_being_built_is_not_deleted(abandoned: Path, teacher: Path, corpus: Path) -> None:
    builder = subprocess.Popen(["sleep", "60"])
    started = leases_module._process_start(builder.pid)
    lease = leases_module.this_process_lease(time.time() + 60)
    lease = lease.model_copy(update={"pid": builder.pid, "started": started})
    Store(str(abandoned)).write(layout.lease_key(segment_names(Store(str(abandoned)), 1)[0], 3), to_canonical(lease))
    before = files(abandoned)
    with pytest.raises(ConfigError, match="working on the extension"):
        build_cache(build_config(abandoned, teacher, corpus, abandon=True))
    assert files(abandoned) == before
    builder.kill()
    builder.wait()
    build_cache(build_config(abandoned, teacher, corpus, abandon=True))
    assert not list(abandoned.glob("segments/0001*"))


def test_a_deletion_that_is_killed_is_gone_on_with(
    abandoned: Path, cache: Path, teacher: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any moment what is left is an unfinished segment whose receipts are true."""
    real = Store.delete
    for allowed in (1, 3, 2):
        left = [allowed]

        def delete(store: Store, key: str, left: list[int] = left) -> None:
            if not left[0]:
                raise Killed
            left[0] -= 1
            real(store, key)

        with monkeypatch.context() as patch:
            patch.setattr(Store, "delete", delete)
            with pytest.raises(Killed):
                build_cache(build_config(abandoned, teacher, corpus, abandon=True))
        assert list(abandoned.glob("segments/0001-*/plan.json"))
        assert [one for one in verify_cache(Store(str(abandoned)))["findings"] if one["what"] != "foreign"] == []
    build_cache(build_config(abandoned, teacher, corpus, abandon=True))
    assert set(files(abandoned)) == set(files(cache))
