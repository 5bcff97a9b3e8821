"""The store: conditional writes, stale lock files, lengths, listings, and what a failing disk says."""

import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distillcache.schemas.errors import ConfigError, DamageError, StorageError
from distillcache.schemas.store import buckets, stale_locks
from distillcache.schemas.store import store as store_module
from distillcache.schemas.store.stale_locks import lock_as_tensorstore
from distillcache.schemas.store.store import Store, is_url


@pytest.fixture(params=["local", "memory", "gcs", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """A folder, a store without one, and folders of buckets whose names need escaping."""
    if request.param == "local":
        return Store(str(tmp_path / "store"))
    if request.param == "memory":
        return Store("memory://bucket/prefix")
    return Store(f"{request.getfixturevalue(request.param).url}/a folder/100%25/#1")


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def test_what_is_written_is_read(store: Store) -> None:
    assert store.read("a/b") is None
    store.write("a/b", b"longer value")
    store.write("a/b", b"value")
    store.write("empty", b"")
    assert store.read("a/b") == b"value"
    assert store.read("a/b", slice(1, 3)) == b"al"
    assert store.read("empty") == b""


def test_a_range_outside_the_value_is_an_error(store: Store) -> None:
    store.write("key", b"value")
    with pytest.raises(StorageError, match="cannot be read") as caught:
        store.read("key", slice(3, 9))
    assert store.where("key") in str(caught.value)


def test_create_keeps_the_first_value(store: Store) -> None:
    assert store.create("claims/0", b"first")
    assert not store.create("claims/0", b"second")
    assert store.read("claims/0") == b"first"
    store.delete("claims/0")
    assert store.create("claims/0", b"third")


def test_a_create_that_saw_nothing_can_still_lose(store: Store) -> None:
    _, generation = store.read_with_generation("key")
    store.write("key", b"theirs")
    assert not store.replace("key", b"ours", generation)
    assert store.read("key") == b"theirs"


def test_replace_needs_the_generation_that_was_read(store: Store) -> None:
    store.write("key", b"one")
    _, generation = store.read_with_generation("key")
    assert store.replace("key", b"two", generation)
    assert not store.replace("key", b"three", generation)
    assert store.read("key") == b"two"


def test_of_many_creators_one_wins(tmp_path: Path) -> None:
    stores = [Store(str(tmp_path)) for _ in range(8)]
    for key in ("0", "1", "2", "3"):
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda number, key=key: stores[number].create(key, b"x" * (number + 1)), range(8)))
        assert sum(won) == 1
        assert stores[0].read(key) == b"x" * (won.index(True) + 1)


def test_delete_of_nothing_is_nothing(store: Store) -> None:
    store.delete("absent")
    store.write("key", b"value")
    store.delete("key")
    assert store.read("key") is None


def test_keys_are_sorted_and_below_the_prefix(store: Store) -> None:
    for key in ("receipts/00010.json", "receipts/00002.json", "receipt", "rows/0", "receipts0"):
        store.write(key, b"1")
    assert store.keys("receipts/") == ["receipts/00002.json", "receipts/00010.json"]
    assert store.keys() == ["receipt", "receipts/00002.json", "receipts/00010.json", "receipts0", "rows/0"]
    assert store.keys("nothing/") == []


def test_keys_leave_lock_files_out(local: Store, tmp_path: Path) -> None:
    local.write("a/key", b"1")
    (tmp_path / "a" / "dead.__lock").write_bytes(b"1")
    assert local.keys() == ["a/key"]


@pytest.mark.parametrize("length", [0, 1, 2, 3, 5, 100])
def test_length_is_exact(store: Store, length: int) -> None:
    store.write("three", b"abc")
    store.write("empty", b"")
    assert store.length_is("three", length) == (length == 3)
    assert store.length_is("empty", length) == (length == 0)
    assert not store.length_is("absent", length)
    assert not store.length_is("three/below", length)


def stale_lock(path: Path, content: bytes = b"tail " * 20) -> Path:
    """What a killed writer leaves: its lock file, with what it had written so far."""
    lock = path.with_name(path.name + ".__lock")
    lock.write_bytes(content)
    return lock


@pytest.mark.parametrize("write", ["write", "create", "guarded", "replace"])
def test_a_write_keeps_no_tail_of_a_killed_writer(local: Store, tmp_path: Path, write: str) -> None:
    """A training that was killed while it wrote eval.json could not be resumed, and the file was damaged."""
    if write != "create":
        local.write("key", b"before, and longer")
    stale_lock(tmp_path / "key")
    if write == "replace":
        assert local.replace("key", b"short", local.read_with_generation("key")[1])
    else:
        store = local.guarded(lambda: None) if write == "guarded" else local
        getattr(store, "create" if write == "create" else "write")("key", b"short")
    assert local.read("key") == b"short"
    assert not list(tmp_path.rglob("*.__lock"))


@pytest.mark.parametrize("write", ["write", "create"])
def test_another_length_than_was_written_does_not_go_unnoticed(
    local: Store, tmp_path: Path, write: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "_empty_stale_lock", lambda *_: None)  # as if another writer were killed just now
    stale_lock(tmp_path / "key")
    with pytest.raises(StorageError, match="another length") as caught:
        getattr(local, write)("key", b"short")
    assert str(tmp_path / "key") in str(caught.value)


@pytest.mark.parametrize("write", ["write", "create"])
def test_cleared_lock_files_leave_no_tail(local: Store, tmp_path: Path, write: str) -> None:
    (tmp_path / "taps").mkdir()
    stale_lock(tmp_path / "taps" / "key")
    local.clear_stale_locks()
    getattr(local, write)("taps/key", b"short")
    assert local.read("taps/key") == b"short"
    assert not list(tmp_path.rglob("*.__lock"))


def test_a_live_writers_lock_file_is_left_alone(local: Store, tmp_path: Path) -> None:
    live, dead = stale_lock(tmp_path / "live", b"writing"), stale_lock(tmp_path / "dead")
    with open(live, "rb+") as held:
        lock_as_tensorstore(held.fileno())
        local.clear_stale_locks()
        assert (live.read_bytes(), dead.read_bytes()) == (b"writing", b"")
        local.remove_stale_locks()
        assert live.exists()
        assert not dead.exists()
    local.remove_stale_locks()
    assert not live.exists()


def test_the_lock_that_we_take_is_the_one_that_tensorstore_takes(local: Store, tmp_path: Path) -> None:
    lock = stale_lock(tmp_path / "key", b"")
    with open(lock, "rb+") as held, ThreadPoolExecutor(1) as threads:
        lock_as_tensorstore(held.fileno())
        writing = threads.submit(local.write, "key", b"value")
        with pytest.raises(TimeoutError):
            writing.result(timeout=0.3)
        held.close()
        writing.result(timeout=60)
    assert local.read("key") == b"value"


def test_a_store_that_does_not_exist_yet_has_no_locks(store: Store) -> None:
    store.clear_stale_locks()
    store.remove_stale_locks()
    store.remove_empty_folders("claims")
    assert store.keys() == []


def test_empty_folders_go_and_others_stay(local: Store, tmp_path: Path) -> None:
    for key in ("claims/a/0", "claims/b/0"):
        local.write(key, b"1")
    local.delete("claims/a/0")
    local.remove_empty_folders("claims")
    assert sorted(path.name for path in (tmp_path / "claims").iterdir()) == ["b"]
    local.delete("claims/b/0")
    local.remove_empty_folders("claims")
    assert not (tmp_path / "claims").exists()


@pytest.mark.parametrize("write", ["write", "create"])
def test_a_file_where_a_folder_is_needed_is_named(local: Store, tmp_path: Path, write: str) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(StorageError, match="cannot be written") as caught:
        getattr(local, write)("taken/key", b"value")
    assert str(tmp_path / "taken" / "key") in str(caught.value)
    assert "Not a directory" in str(caught.value)
    with pytest.raises(StorageError, match="a directory is needed"):
        Store(str(tmp_path / "taken"))


def test_a_folder_where_a_value_goes_is_named(local: Store, tmp_path: Path) -> None:
    (tmp_path / "key").mkdir()
    with pytest.raises(StorageError, match="cannot be written") as caught:
        local.write("key", b"value")
    assert "Is a directory" in str(caught.value)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("write", ["write", "create"])
def test_a_full_disk_says_so_and_keeps_what_was_there(tiny_disk: Path, write: str) -> None:
    store = Store(str(tiny_disk))
    store.write("small", b"kept")
    with pytest.raises(StorageError, match="cannot be written") as caught:
        getattr(store, write)("large", bytes(100_000))
    assert "No space left" in str(caught.value)
    assert "free some space" in caught.value.next
    assert store.keys() == ["small"]
    assert store.read("small") == b"kept"


def test_a_read_only_folder_says_so(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    store = Store(str(tmp_path))
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StorageError, match="cannot be written") as caught:
            store.write("key", b"value")
    finally:
        tmp_path.chmod(0o700)
    assert "make it writable" in caught.value.next


def test_a_read_only_disk_says_so(tiny_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", tiny_disk], check=True)
    with pytest.raises(StorageError, match="cannot be written") as caught:
        Store(str(tiny_disk)).write("key", b"value")
    assert "make it writable" in caught.value.next


def test_places_are_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert Store("run7/").local == tmp_path / "run7"
    assert Store("~/run7").local == tmp_path / "home" / "run7"
    assert Store(f"file://{tmp_path}/run7").local == tmp_path / "run7"
    assert Store("gs://bucket/run7").local is None
    assert [is_url(path) for path in ("run7", "/run7", "file:///run7", "gs://b/p", "s3://b/p")] == [0, 0, 0, 1, 1]


def test_specs_are_below_the_place(tmp_path: Path) -> None:
    assert Store(str(tmp_path)).spec("taps/resid") == {"driver": "file", "path": f"{tmp_path}/taps/resid/"}
    assert Store("gs://bucket/run7").spec("taps/resid/")["path"] == "run7/taps/resid/"


def test_names_with_odd_characters_are_names(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "ü b#?%20"))
    store.write("key", b"value")
    assert (tmp_path / "ü b#?%20" / "key").read_bytes() == b"value"
    assert store.keys() == ["key"]


def test_a_working_directory_in_another_encoding_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path is UTF-8 itself; what it is relative to may not be."""
    folder = os.fsdecode(bytes(tmp_path) + b"/\xff")
    try:
        os.mkdir(folder)
    except OSError:
        pytest.skip("this file system takes names in UTF-8 alone")
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match="not UTF-8") as caught:
        Store("cache")
    assert "\\udcff" in str(caught.value.facts["path"])


@pytest.mark.parametrize("url", ["hf://owner/model", "http://127.0.0.1:9/x", "azure://container"])
def test_what_is_no_bucket_is_told_what_is(url: str) -> None:
    with pytest.raises(StorageError, match="cannot be opened") as caught:
        Store(url)
    assert "gs:// or s3://" in str(caught.value)
    assert "download its content" in caught.value.next


@pytest.mark.parametrize("url", ["nope://bucket", "gs://B_AD!/prefix", ""])
def test_a_place_that_is_none_is_named(url: str) -> None:
    with pytest.raises(StorageError, match="cannot be opened") as caught:
        Store(url)
    assert caught.value.facts["url"] == url


def test_a_lock_that_became_its_key_is_not_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening a lock file and locking it, its writer may finish and rename it to the key."""
    store = Store(str(tmp_path))
    lock = tmp_path / "key.__lock"
    lock.write_bytes(b"committed")
    real = stale_locks.lock_as_tensorstore

    def renamed_first(descriptor: int) -> None:
        if lock.exists():
            lock.rename(tmp_path / "key")
        real(descriptor)

    monkeypatch.setattr(stale_locks, "lock_as_tensorstore", renamed_first)
    store.clear_stale_locks()
    store.remove_stale_locks()
    assert (tmp_path / "key").read_bytes() == b"committed"


def test_a_folder_that_cannot_be_made_is_named_in_letters() -> None:
    """TensorStore ends the names of folders with NUL, which it then escapes, and with it every hex digit behind."""
    text = 'Failed to create directory: "/proc/\\xc3\\xa4\\x00segments\\x00\\x30\\x30.prepared": No such file'
    assert buckets.cause(OSError(text)) == 'Failed to create directory: "/proc/ä/segments/00.prepared": No such file'


@pytest.mark.parametrize(
    ("answers", "bucket", "asked"),
    [
        ([b"whole"], True, 1),
        ([b"cut", b"whole"], True, 2),
        ([b"cut", b"cot", b"cat", b"whole"], True, 4),
        ([b"cut", b"cat", b"cut"], True, 3),  # the same bytes twice are the object's own
        ([b"1", b"2", b"3", b"4", b"5", b"6"], True, 6),
        ([b"cut"], False, 1),  # a disk answers alike each time
    ],
)
def test_what_is_refused_is_read_again(
    answers: list[bytes], bucket: bool, asked: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(store_module, "AGAIN_S", (0.0,) * len(store_module.AGAIN_S))
    store, left = Store(str(tmp_path)), list(answers)
    store.is_bucket = bucket

    def check(data: bytes) -> bytes:
        if data != b"whole":
            raise DamageError("not whole")
        return data

    if answers[-1] == b"whole":
        assert store.checked(lambda: left.pop(0), check) == b"whole"
    else:
        with pytest.raises(DamageError):
            store.checked(lambda: left.pop(0), check)
    assert len(answers) - len(left) == asked


def test_one_place_knows_how_a_range_behind_the_end_answers() -> None:
    root = Path(__file__).parents[3]
    folders = ("schemas", "models", "cache_builder", "trainer", "tools")
    found = [path for folder in folders for path in (root / folder).rglob("*.py") if "OUT_OF_RANGE" in path.read_text()]
    assert [path.name for path in found] == ["store.py"]
