"""Reading from buckets: the same codes as from a disk, in few requests; what arrives damaged is asked for again."""

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from distillcache.schemas.config import TapConfig
from distillcache.schemas.errors import DamageError
from distillcache.schemas.runtime.memory import anonymous_kib
from distillcache.schemas.store.store import Store
from distillcache.tools.bench.synthetic_cache import synthetic_plan, write_cache
from distillcache.trainer.feed.cache_source import CacheSource, make_feed
from distillcache.trainer.feed.disk_cache import LocalCache
from distillcache.trainer.feed.readers.bucket import RemoteArray
from distillcache.trainer.feed.readers.local import LocalArray
from distillcache.trainer.feed.readers.threads import THREADS
from tests.servers.fixtures import Bucket

TAPS = {
    "none": {"attn_out": TapConfig(codec="bf16"), "resid": TapConfig(codec="int8", delta=True, keyframe_every=2)},
    "zstd": {"attn_out": TapConfig(codec="bf16", compress="zstd")},
    "blosc": {"attn_out": TapConfig(codec="int8", compress="blosc")},
}
ROWS = [4, 11, 3, 5, 11]
MISSES = 10**9  # more than there are


@pytest.fixture(scope="module", params=TAPS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14 rows, six in a shard, 5 blocks, two or more objects of each array in a shard."""
    folder = tmp_path_factory.mktemp("cache") / request.param
    plan = synthetic_plan(14, (5, 256, 320), TAPS[request.param], shard_rows=6, object_mib=2)
    assert all(len(part.object_ranges()) > 1 for tap in plan.taps for part in tap.parts if not part.array.endswith("y"))
    write_cache(folder, plan)
    return folder


@pytest.fixture
def as_far(monkeypatch: pytest.MonkeyPatch) -> Callable[..., CacheSource]:
    """Opens a local cache as if it lay in a bucket."""
    monkeypatch.setattr(Store, "tries", lambda store: iter([*[False] * 5, True]))

    def open_source(folder: Path, **options: object) -> CacheSource:
        with monkeypatch.context() as patched:
            patched.setattr(LocalArray, "serves", lambda store, part: False)
            patched.setattr(RemoteArray, "serves", lambda store: True)
            return CacheSource(str(folder), **options)  # type: ignore[arg-type]

    return open_source


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Reads of objects arrive with a flipped bit as long as `spoiled[0]`, or half as long as `spoiled[1]`, counts."""
    left, read_range = [0, 0], Store.read_range

    def bad(store: Store, key: str, start: int, stop: int) -> tuple[bytes | None, bytes]:
        data, generation = read_range(store, key, start, stop)
        if "/taps/" not in key or data is None:
            return data, generation
        for kind in (0, 1):
            if left[kind] > 0:
                left[kind] -= 1
                return data[: len(data) // 2] if kind else bytes([data[0] ^ 4]) + data[1:], generation
        return data, generation

    monkeypatch.setattr(Store, "read_range", bad)
    yield left
    left[:] = 0, 0


def same(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        if isinstance(value, dict):
            same(value, right[name])
        else:
            np.testing.assert_array_equal(value, right[name])


def taps_of(folder: Path) -> tuple[str, ...]:
    return tuple(TAPS[folder.name])


@pytest.mark.parametrize("integrity", [True, False])
def test_the_same_codes_as_from_a_disk(folder, as_far, integrity):
    for blocks in (None, [0, 3]):
        options = {"taps": taps_of(folder), "blocks": blocks}
        source = as_far(folder, integrity=integrity, **options)
        same(source[ROWS], CacheSource(str(folder), **options)[ROWS])


@pytest.mark.parametrize("kind", ["flipped", "short"])
def test_what_arrives_damaged_is_asked_for_again(folder, as_far, spoiled, kind):
    expected = CacheSource(str(folder), taps_of(folder))[ROWS]
    source = as_far(folder, taps=taps_of(folder))
    spoiled[kind == "short"] = 2
    same(source[ROWS], expected)
    assert spoiled == [0, 0]
    spoiled[kind == "short"] = MISSES
    with pytest.raises(DamageError):
        source[ROWS]


def test_damage_in_the_bucket_is_found(folder, as_far, tmp_path):
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    path = copy / "segments/0000/taps/attn_out/c/0/1/0/0"
    whole = path.read_bytes()
    source = as_far(copy, taps=("attn_out",))
    for data in (whole[:99] + bytes([whole[99] ^ 1]) + whole[100:], whole[: len(whole) // 2], b""):
        path.write_bytes(data)
        with pytest.raises(DamageError) as caught:
            source[range(6)]
        assert str(path) == caught.value.facts["file"]
    path.unlink()
    with pytest.raises(DamageError, match="damaged"):
        source[[0]]
    path.write_bytes(whole)
    same(source[[0]], CacheSource(str(folder), ("attn_out",))[[0]])


def test_chunks_in_another_order_are_found_by_their_index(folder, as_far, tmp_path):
    """As another program might write an object: the guess is wrong, the digest says so, the index says where."""
    if folder.name != "none":
        pytest.skip("compressed chunks are always found by their index")
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    path, chunk = copy / "segments/0000/taps/attn_out/c/0/0/0/0", 256 * 320 * 2
    data = bytearray(path.read_bytes())
    (part,) = CacheSource(str(copy), ("attn_out",)).taps["attn_out"].parts
    size = 6 * part.slots_per_object * 16
    index = np.frombuffer(data, "<u8", size // 8, len(data) - 4 - size).reshape(-1, 2).copy()
    data[:chunk], data[chunk : 2 * chunk] = data[chunk : 2 * chunk], data[:chunk]
    index[[0, 1]] = index[[1, 0]]
    data[-4 - size : -4] = index.tobytes()
    path.write_bytes(data)
    same(as_far(copy, taps=("attn_out",))[[0]], CacheSource(str(folder), ("attn_out",))[[0]])


def test_the_second_epoch_comes_from_the_local_cache(folder, as_far, tmp_path, spoiled):
    expected = CacheSource(str(folder), taps_of(folder))[ROWS]
    kept = LocalCache(str(tmp_path), 100 << 20)
    same(as_far(folder, taps=taps_of(folder), kept=kept)[ROWS], expected)
    spoiled[0] = MISSES  # nothing comes from afar any more
    again = as_far(folder, taps=taps_of(folder), kept=kept)
    same(again[ROWS], expected)
    assert spoiled[0] == MISSES
    with pytest.raises(DamageError):
        again[[0]]


def test_a_damaged_local_file_is_fetched_again(folder, as_far, tmp_path):
    expected = CacheSource(str(folder), taps_of(folder))[ROWS]
    kept = LocalCache(str(tmp_path), 100 << 20)
    source = as_far(folder, taps=taps_of(folder), kept=kept)
    same(source[ROWS], expected)
    files = [path for path in kept.folder.glob("*/**/*") if path.is_file()]
    assert len(files) > 8
    contents = {path: path.read_bytes() for path in files}
    for number, path in enumerate(files):
        data = contents[path]
        path.write_bytes([data[:-1], bytes([data[0] ^ 1]) + data[1:], b""][number % 3])
    same(source[ROWS], expected)
    same(as_far(folder, taps=taps_of(folder), kept=kept)[ROWS], expected)
    assert {path: path.read_bytes() for path in files} == contents


def test_another_cache_finds_nothing_of_this_one(folder, as_far, tmp_path):
    kept = LocalCache(str(tmp_path / "kept"), 100 << 20)
    options = {"taps": ("attn_out",), "kept": kept}
    as_far(folder, **options)[ROWS]
    plan = synthetic_plan(14, (5, 256, 320), TAPS[folder.name], shard_rows=6, object_mib=2)
    other = tmp_path / folder.name
    shapes = {part.array: (part.slots, 256, part.width) for tap in plan.taps for part in tap.parts}
    dtypes = {part.array: part.dtype for tap in plan.taps for part in tap.parts}

    def ones(shard: int) -> dict[str, np.ndarray]:
        rows = plan.shard_range(shard)
        return {name: np.ones((rows[1] - rows[0], *shape), dtypes[name]) for name, shape in shapes.items()}

    write_cache(other, plan, ones)
    found = as_far(other, **options)[ROWS]
    assert all((part == 1).all() for part in found["attn_out"].values())


def upload(folder: Path, url: str) -> None:
    source, target = Store(str(folder)), Store(url)
    for key in source.keys():  # noqa: SIM118  (not a dict)
        target.write(key, source.read(key) or b"")


@pytest.mark.slow
def test_requests_of_a_batch(folder, gcs: Bucket):
    """Per batch: one for each row and object, and none for indexes of chunks; TensorStore's arrays ask more often."""
    upload(folder, f"{gcs.url}/cache")
    taps, counts = taps_of(folder), {}
    for direct in (False, True):
        source = CacheSource(f"{gcs.url}/cache", taps, direct=direct)
        source[[0, 7, 12]]  # the shards' index records, rows, and here also the indexes of compressed objects
        gcs.server.clear_requests()
        found = source[[1, 8, 13]]
        counts[direct] = gcs.server.count("read")
        same(found, CacheSource(str(folder), taps)[[1, 8, 13]])
    objects = sum(len(part.object_ranges()) for tap in source.plan.taps for part in tap.parts)
    assert counts[True] == 3 * objects
    assert counts[True] <= 0.6 * counts[False]
    gcs.server.clear_requests()
    source[[0, 1, 2, 3, 4, 5]]  # neighbours: one request for each object
    assert gcs.server.count("read") == objects


@pytest.mark.slow
def test_a_second_epoch_asks_the_server_for_nothing(folder, gcs: Bucket, tmp_path):
    upload(folder, f"{gcs.url}/cache")
    taps = taps_of(folder)
    kept = LocalCache(str(tmp_path), 100 << 20)
    expected = CacheSource(str(folder), taps)[range(14)]
    with gcs.server.faults(0.1, kinds=["503", "reset", "cut", "short"], seed=3):
        same(CacheSource(f"{gcs.url}/cache", taps, kept=kept)[range(14)], expected)
    again = CacheSource(f"{gcs.url}/cache", taps, kept=kept)
    gcs.server.clear_requests()
    same(again[range(14)], expected)
    assert gcs.server.count() == 0


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.slow
def test_threads_files_and_memory_stay_bounded_over_a_long_feed(gcs: Bucket, tmp_path):
    """Some 150 MB from a server, with a local cache that holds a part of it, in 150 batches."""
    plan = synthetic_plan(48, (4, 128, 256), {"attn_out": "bf16", "resid": "int8"}, shard_rows=4, object_mib=1)
    write_cache(tmp_path / "cache", plan)
    upload(tmp_path / "cache", f"{gcs.url}/cache")
    source = CacheSource(f"{gcs.url}/cache", kept=LocalCache(str(tmp_path / "kept"), int(7e6)))
    figures = []
    with make_feed(source, global_batch_rows=2, seed=0) as feed:
        for step in range(150):
            next(feed)
            if step in (40, 149):
                figures.append((threading.active_count(), open_files(), anonymous_kib()))
    before, after = figures
    # Threads of other tests in this process count, and a pool may start one late; a leak would be one a batch.
    assert after[0] <= max(before[0] + 4, THREADS + 10)
    assert after[1] <= before[1] + 8  # the server's connections come and go
    assert after[2] <= before[2] + 16_000
