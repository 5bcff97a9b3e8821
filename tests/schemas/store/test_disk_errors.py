"""Answers of a file system that are no data: one error each, with a step that helps."""

import errno
import os
from pathlib import Path

import pytest

from distillcache.schemas.errors import StorageError
from distillcache.schemas.store.disk_errors import is_in_the_way, step_for, unreadable
from distillcache.schemas.store.stale_locks import held
from distillcache.schemas.store.store import Store

CODES = ("EACCES", "EPERM", "EROFS", "ELOOP", "EISDIR", "ENOTDIR", "ESTALE", "EIO", "ENOSPC")


@pytest.mark.parametrize("name", CODES)
def test_each_answer_has_a_step_for_readers_and_for_writers(name: str) -> None:
    words = f'Failed to open: "/a/b": {os.strerror(getattr(errno, name))} [source locations=...]'
    reader, writer = step_for(words, reads=True), step_for(words, reads=False)
    assert reader
    assert writer
    assert "writable" not in reader
    assert "space" not in reader
    assert is_in_the_way(words) == (name in ("ELOOP", "EISDIR", "ENOTDIR"))


def test_other_answers_have_none() -> None:
    assert step_for("HTTP response code: 503", reads=True) is None


def in_the_way(folder: Path, kind: str) -> str:
    """The key of something that cannot be read as a file, and whose words are `kind`'s."""
    if kind == "ELOOP":
        (folder / "key").symlink_to("key")
    elif kind == "EISDIR":
        (folder / "key").mkdir()
        (folder / "key" / "inside").write_text("x")
    else:
        raise ValueError(kind)
    return "key"


@pytest.mark.parametrize("kind", ["ELOOP", "EISDIR"])
def test_a_store_says_what_is_in_the_place_of_a_file(tmp_path: Path, kind: str) -> None:
    store, key = Store(str(tmp_path)), in_the_way(tmp_path, kind)
    with pytest.raises(StorageError) as caught:
        store.read(key)
    assert os.strerror(getattr(errno, kind)) in str(caught.value)
    assert "run the same command again, which says what is missing" in str(caught.value)
    with pytest.raises(StorageError):
        store.write(key, b"new") if kind == "EISDIR" else store.length_is(key, 3)


def test_a_file_in_the_place_of_a_folder_holds_no_key(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    assert Store(str(tmp_path)).read("a/b") is None
    assert not Store(str(tmp_path)).length_is("a/b", 1)


def test_a_call_of_the_system_has_the_same_step_as_tensorstore() -> None:
    error = unreadable("/c/index.bin", OSError(errno.EIO, os.strerror(errno.EIO)))
    assert "check the disk" in str(error)
    assert "/c/index.bin" in str(error)
    assert "check the path" in str(unreadable("/c", OSError(errno.ENXIO, os.strerror(errno.ENXIO))))


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ENOTDIR, errno.ELOOP, errno.EROFS])
def test_a_lock_file_that_cannot_be_opened_is_left_alone(tmp_path: Path, code: int, monkeypatch) -> None:
    def fails(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("distillcache.schemas.store.stale_locks.os.open", fails)
    with held(tmp_path / "key.__lock") as descriptor:
        assert descriptor is None
