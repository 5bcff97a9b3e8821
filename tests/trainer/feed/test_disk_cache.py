"""The folder of the local cache: within its limit, whole files only, whoever is killed and whatever goes wrong."""

import contextlib
import errno
import fcntl
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distillcache.schemas.config.feed import LocalCacheConfig
from distillcache.schemas.errors import StorageError
from distillcache.trainer.feed import disk_cache
from distillcache.trainer.feed.disk_cache import FRESH_S, LocalCache, open_local_cache

KIB = 1 << 10


def sizes(folder: Path) -> dict[str, int]:
    """Of the files that count, by name."""
    inside = folder / "distillcache-feed"
    found: dict[int, tuple[str, int]] = {}  # by inode: a file may be renamed while the folder is listed
    with (inside / "lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in inside.glob("*/**/*"):
            with contextlib.suppress(FileNotFoundError):
                facts = path.stat()
                if not path.is_dir():
                    found[facts.st_ino] = path.relative_to(inside).as_posix(), facts.st_size
    return dict(found.values())


def keep(cache: LocalCache, name: str, size: int = KIB, value: int = 1, used: float | None = None) -> None:
    cache.keep(name, [memoryview(bytes([value]) * (size // 2))] * 2)
    if used is not None and (cache.folder / name).exists():
        os.utime(cache.folder / name, (used, used))


def read(cache: LocalCache, name: str) -> bytes | None:
    descriptor = cache.open(name)
    if descriptor is None:
        return None
    with os.fdopen(descriptor, "rb") as file:
        return file.read()


def test_what_is_kept_is_read_back(tmp_path: Path) -> None:
    cache = LocalCache(str(tmp_path), 10 * KIB)
    cache.keep("a/taps/x/0/1.0+2", [memoryview(b"one "), memoryview(b"two")])
    assert read(cache, "a/taps/x/0/1.0+2") == b"one two"
    assert read(LocalCache(str(tmp_path), 10 * KIB), "a/taps/x/0/1.0+2") == b"one two"
    cache.drop("a/taps/x/0/1.0+2")
    assert read(cache, "a/taps/x/0/1.0+2") is None
    small = cache.files("a")
    small.put("index/0", b"record")
    assert small.get("index/0") == b"record"
    small.drop("index/0")
    assert small.get("index/0") is None


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache, now = LocalCache(str(tmp_path), 4 * KIB + 200), time.time()
    for number in range(4):
        keep(cache, f"old/{number}", used=now - 100 * number)
    descriptor = cache.open("old/3")  # the oldest is used again; it stays open
    assert descriptor is not None
    keep(cache, "new/0")
    assert sizes(tmp_path).keys() == {"old/0", "old/1", "old/3", "new/0"}
    keep(cache, "new/1", 3 * KIB)
    assert sizes(tmp_path).keys() == {"new/1", "new/0"}
    assert os.pread(descriptor, 1, 0) == b"\x01"
    os.close(descriptor)


def test_what_is_being_read_is_not_removed_for_more_of_the_same(tmp_path: Path) -> None:
    """Each row comes once in an epoch: to remove what was used longest ago would remove what comes next."""
    cache, now = LocalCache(str(tmp_path), 4 * KIB), time.time()
    for number in range(6):
        keep(cache, f"mine/{number}", used=now - 100 * number)
    assert sizes(tmp_path).keys() == {f"mine/{number}" for number in range(4)}
    os.utime(cache.folder / "mine/0", (now - FRESH_S - 9,) * 2)  # but what was not used for a day may go
    again = LocalCache(str(tmp_path), 4 * KIB)
    keep(again, "mine/7")
    assert sizes(tmp_path).keys() == {f"mine/{number}" for number in (1, 2, 3, 7)}


def test_what_does_not_fit_is_not_kept(tmp_path: Path) -> None:
    cache = LocalCache(str(tmp_path), 4 * KIB)
    keep(cache, "a/large", 5 * KIB)
    keep(cache, "a/0")
    assert sizes(tmp_path) == {}  # nor is the folder listed again at once
    keep(LocalCache(str(tmp_path), 4 * KIB), "a/0")
    assert sizes(tmp_path) == {"a/0": KIB}


def test_a_lower_limit_holds_from_the_start(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(bytes(100 * KIB))  # not ours
    cache = LocalCache(str(tmp_path), 64 * KIB)
    for number in range(50):
        keep(cache, f"a/{number}")
    LocalCache(str(tmp_path), 10 * KIB)
    assert 8 * KIB <= sum(sizes(tmp_path).values()) <= 10 * KIB
    assert (tmp_path / "precious").exists()


def test_threads_stay_within_the_limit(tmp_path: Path) -> None:
    caches = [LocalCache(str(tmp_path), 20 * KIB) for _ in range(2)]
    with ThreadPoolExecutor(8) as pool:
        list(
            pool.map(lambda number: keep(caches[number % 2], f"{number % 3}/{number}", value=number % 256), range(300))
        )
    found = sizes(tmp_path)
    assert 10 * KIB < sum(found.values()) <= 20 * KIB
    for name in found:
        assert read(caches[0], name) == bytes([int(name.partition("/")[2]) % 256]) * KIB


def test_leftovers_of_the_dead_are_removed_and_files_being_written_count(tmp_path: Path) -> None:
    cache = LocalCache(str(tmp_path), 10 * KIB)
    with cache._alone():
        cache._set_count(0)
    descriptor = cache._begin(str(cache.folder / "a/0.1.1.new"), 8 * KIB, "a")
    assert descriptor is not None
    other = LocalCache(str(tmp_path), 10 * KIB)
    keep(other, "b/0", 4 * KIB)
    assert sizes(tmp_path) == {"a/0.1.1.new": 8 * KIB}  # no room beside it, and it is not removed
    os.close(descriptor)  # as the kernel does it for a killed writer
    third = LocalCache(str(tmp_path), 10 * KIB)
    assert sizes(tmp_path) == {}
    keep(third, "b/0", 4 * KIB)
    assert sizes(tmp_path) == {"b/0": 4 * KIB}


def test_a_folder_that_is_removed_under_our_hands(tmp_path: Path) -> None:
    cache = LocalCache(str(tmp_path / "x"), 10 * KIB)
    keep(cache, "a/0")
    shutil.rmtree(tmp_path / "x")
    assert read(cache, "a/0") is None
    keep(cache, "a/1")
    assert read(cache, "a/1") == bytes([1]) * KIB


def test_a_full_disk_is_told_once_and_reading_goes_on(tmp_path: Path, monkeypatch, console) -> None:
    cache = LocalCache(str(tmp_path), 10 * KIB)
    keep(cache, "a/0")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk_cache, "_write", full)
    for number in range(1, 4):
        keep(cache, f"a/{number}")
    told = console.readouterr().err
    assert told.count("warning") == 1
    assert "No space left on device" in told
    assert "max_gib" in told
    assert sizes(tmp_path) == {"a/0": KIB}
    assert read(cache, "a/0") is not None


def test_a_folder_that_cannot_be_used_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be used"):
        LocalCache(str(tmp_path / "file" / "cache"), KIB)
    with pytest.raises(StorageError, match="not local"):
        LocalCache("gs://bucket/cache", KIB)


def test_a_cache_on_a_local_disk_needs_none(tmp_path: Path, console) -> None:
    config = LocalCacheConfig(dir=str(tmp_path / "kept"), max_gib=0.5)
    assert open_local_cache(config, "caches/mine") is None
    assert "is on a local disk" in console.readouterr().err
    assert not (tmp_path / "kept").exists()
    assert open_local_cache(LocalCacheConfig(), "gs://bucket/cache") is None
    assert open_local_cache(config, "gs://bucket/cache") is not None


WRITER = """
import random, sys
from distillcache.trainer.feed.disk_cache import LocalCache
cache, seed = LocalCache(sys.argv[1], int(sys.argv[2])), int(sys.argv[3])
drawn = random.Random(seed)
print("started", flush=True)
while True:
    number = drawn.randrange(400)
    cache.keep(f"{number % 3}/{number}", [memoryview(bytes([number % 251]) * (1000 + 97 * number))])
"""


@pytest.mark.slow
def test_processes_killed_at_any_moment_leave_whole_files_within_the_limit(tmp_path: Path) -> None:
    limit, drawn, highest = 2_000_000, random.Random(0), 0
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}

    def start(seed: int) -> subprocess.Popen:
        command = [sys.executable, "-c", WRITER, str(tmp_path), str(limit), str(seed)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)

    writers = [start(seed) for seed in range(3)]
    try:
        for writer in writers:
            assert writer.stdout is not None
            writer.stdout.readline()
        for seed in range(3, 9):
            until = time.monotonic() + drawn.uniform(0.1, 0.5)
            while time.monotonic() < until:
                highest = max(highest, sum(sizes(tmp_path).values()))
            killed = writers.pop(0)
            killed.send_signal(signal.SIGKILL)
            killed.communicate()
            writers.append(start(seed))
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()
    cache = LocalCache(str(tmp_path), limit)
    found = sizes(tmp_path)
    assert limit / 2 < sum(found.values()) <= limit
    assert highest <= limit
    for name in found:
        number = int(name.partition("/")[2])
        assert read(cache, name) == bytes([number % 251]) * (1000 + 97 * number)


@pytest.mark.parametrize("name", ["", "lock", "used"])
def test_a_folder_with_a_link_for_its_own_files_is_refused(tmp_path: Path, name: str) -> None:
    """Also one that is a link itself: what it leads to may be anybody's, and old files are removed there."""
    outside, inside = tmp_path / "outside", tmp_path / "d" / "distillcache-feed"
    (outside / "old").mkdir(parents=True)
    (outside / "old" / "precious").write_bytes(b"keep me")
    (inside / name).parent.mkdir(parents=True)
    (inside / name).symlink_to(outside / "old" / "precious" if name else outside)
    with pytest.raises(StorageError, match="cannot be used"):
        LocalCache(str(tmp_path / "d"), 1)
    assert (outside / "old" / "precious").read_bytes() == b"keep me"
    assert [path.name for path in outside.iterdir()] == ["old"]


def test_the_named_folder_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    cache = LocalCache(str(tmp_path / "link"), 10 * KIB)
    keep(cache, "a/x")
    assert cache.has("a/x")
    assert read(LocalCache(str(tmp_path / "real"), 10 * KIB), "a/x") == bytes([1]) * KIB


@pytest.mark.parametrize("place", ["a", "a/taps", "a/taps/x"])
def test_no_link_inside_is_followed(tmp_path: Path, console: pytest.CaptureFixture[str], place: str) -> None:
    """Neither read, nor written, nor deleted through; what is sought there comes from the cache again."""
    outside = tmp_path / "outside"
    kept = outside / "a/taps/x".removeprefix(place).lstrip("/") if place != "a/taps/x" else outside
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_bytes(b"keep me")
    cache = LocalCache(str(tmp_path), 10 * KIB)
    (cache.folder / place).parent.mkdir(parents=True, exist_ok=True)
    (cache.folder / place).symlink_to(outside)
    assert not cache.has("a/taps/x")
    assert cache.open("a/taps/x") is None
    cache.keep("a/taps/x", [memoryview(b"new")])
    cache.drop("a/taps/x")
    LocalCache(str(tmp_path), 1)  # makes room
    assert kept.read_bytes() == b"keep me"
    assert len([path for path in tmp_path.glob("outside/**/*") if path.is_file()]) == (place != "a/taps/x")
    assert ("a link leads to" in console.readouterr().err) == (place != "a/taps/x")


def test_the_target_of_a_link_takes_no_room(tmp_path: Path) -> None:
    outside = tmp_path / "precious"
    outside.write_bytes(bytes(20 * KIB))
    cache = LocalCache(str(tmp_path), 10 * KIB)
    for name in ("a/x", "a/y"):
        keep(cache, name, used=1.0)
    for name in ("a/z", "a/z.1.1.new"):
        (cache.folder / name).symlink_to(outside)
    cache = LocalCache(str(tmp_path), 10 * KIB)
    assert cache.has("a/x")
    assert cache.has("a/y")
    assert outside.stat().st_size == 20 * KIB
