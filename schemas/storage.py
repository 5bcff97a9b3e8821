"""Where a cache, a run or a corpus lives: a thin layer over TensorStore's key-value stores.

A *store* is a folder: a local path, `file://`, `gs://bucket/prefix` or `s3://bucket/prefix`. Every read and write
of ours goes through it, so that one piece of code serves all of them and every failure becomes one `StorageError`
that names the key.
"""

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorstore as ts

from schemas.errors import StorageError

LOCK_SUFFIX = ".__lock"  # TensorStore's file driver writes KEY through KEY.__lock


class Store:
    """The keys below one URL. Values are bytes; a write is durable (synced) when it returns."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/") or "/"
        self.local = _local_path(self.url)
        if self.local is not None and self.local.exists() and not self.local.is_dir():
            raise StorageError(
                "a directory is needed where there is a file", {"path": self.local}, "name another directory"
            )
        spec = _url_spec(self.url, self.local)
        try:
            self._kv = ts.KvStore.open(spec).result()
        except (ValueError, OSError) as error:
            raise StorageError("the store cannot be opened", {"url": url, "cause": error}) from error

    def spec(self, key: str) -> dict[str, Any]:
        """TensorStore's JSON spec of the folder `key` below this store, for a zarr array there."""
        base = self._kv.spec().to_json()
        return {**base, "path": base.get("path", "") + key.rstrip("/") + "/"}

    def where(self, key: str) -> str:
        """How messages name `key`."""
        return f"{self.url}/{key}"

    def read(self, key: str, byte_range: slice | None = None) -> bytes | None:
        """The value, or None where there is no such key."""
        return self.read_with_generation(key, byte_range)[0]

    def read_with_generation(self, key: str, byte_range: slice | None = None) -> tuple[bytes | None, bytes]:
        """The value (None: absent) and its generation, for a conditional write."""
        try:
            result = self._kv.read(key, byte_range=byte_range).result()
        except (ValueError, OSError) as error:
            raise self._failure("cannot be read", key, error) from error
        return (result.value if result.state == "value" else None), result.stamp.generation

    def write(self, key: str, value: bytes) -> None:
        """Store the value, whatever was there, and check the length that is stored."""
        try:
            self._kv.write(key, value).result()
        except (ValueError, OSError) as error:
            raise self._failure("cannot be written", key, error) from error
        self._check_length(key, len(value))

    def create(self, key: str, value: bytes) -> bool:
        """Store the value if the key is absent; False where another writer was first."""
        found, generation = self.read_with_generation(key)
        return found is None and self.replace_whole(key, value, generation)

    def replace(self, key: str, value: bytes, generation: bytes) -> bool:
        """Store the value if the key's generation is still the one given; False where it is not."""
        try:
            stamp = self._kv.write(key, value, if_equal=generation).result()
        except (ValueError, OSError) as error:
            raise self._failure("cannot be written", key, error) from error
        return bool(stamp.generation)

    def replace_whole(self, key: str, value: bytes, generation: bytes) -> bool:
        """`replace`, and check the length that is stored: for a key that nobody writes again soon."""
        if not self.replace(key, value, generation):
            return False
        self._check_length(key, len(value))
        return True

    def delete(self, key: str) -> None:
        """Remove the key; nothing happens where it is absent."""
        try:
            self._kv.write(key, None).result()
        except (ValueError, OSError) as error:
            raise self._failure("cannot be deleted", key, error) from error

    def keys(self, prefix: str = "") -> list[str]:
        """The keys that start with `prefix`, sorted; lock files of the file driver left out."""
        key_range = ts.KvStore.KeyRange(prefix, _after(prefix)) if prefix else ts.KvStore.KeyRange()
        try:
            found = self._kv.list(key_range).result()
        except (ValueError, OSError) as error:
            raise self._failure("cannot be listed", prefix, error) from error
        return sorted(key for key in (k.decode() for k in found) if not key.endswith(LOCK_SUFFIX))

    def length_is(self, key: str, length: int) -> bool:
        """Whether the stored value has exactly this length, without reading it."""
        if self.local is not None:
            try:
                return (self.local / key).stat().st_size == length
            except (FileNotFoundError, NotADirectoryError):
                return False
        if length == 0:
            return self.read(key) == b""
        try:
            tail = self.read(key, slice(length - 1, None))
        except StorageError as error:
            if "OUT_OF_RANGE" in str(error):  # how a shorter value answers
                return False
            raise
        return tail is not None and len(tail) == 1

    def clear_stale_locks(self) -> None:
        """Empty the lock files that killed writers left, so that no later write keeps their tail.

        A live writer holds a lock on it, so only dead ones are touched. Buckets have no lock files.
        """
        for path in self._lock_files():
            with _held(path) as descriptor:
                if descriptor is not None:
                    os.ftruncate(descriptor, 0)

    def remove_stale_locks(self) -> None:
        """Delete the lock files of dead writers: for a finished cache, which nobody writes any more."""
        for path in self._lock_files():
            with _held(path) as descriptor:
                if descriptor is not None:
                    path.unlink(missing_ok=True)

    def stale_locks(self, prefix: str = "") -> list[str]:
        """The keys of the lock files of dead writers, sorted. One that may not be opened for writing is left out."""
        found = []
        for path in self._lock_files():
            with _held(path) as descriptor:
                if descriptor is not None:
                    found.append(path.relative_to(self.local or path).as_posix())
        return sorted(key for key in found if key.startswith(prefix))

    def delete_folder(self, key: str) -> None:
        """Delete every key below the folder, and on a local disk the empty folders up to the store's own."""
        for each in self.keys(f"{key}/"):
            self.delete(each)
        self.remove_empty_folders(key)
        if self.local is not None:
            for parent in [Path(key), *Path(key).parents]:
                _remove_if_empty(self.local / parent)

    def remove_empty_folders(self, key: str) -> None:
        """Remove what deleting the last key of a folder leaves behind on a local disk."""
        if self.local is None:
            return
        for folder, _, _ in os.walk(self.local / key, topdown=False):
            _remove_if_empty(Path(folder))

    def _check_length(self, key: str, length: int) -> None:
        """A lock file left by a killed writer is reused without being truncated: a shorter value keeps the old tail."""
        if not self.length_is(key, length):
            raise StorageError(
                "the store holds another length than was written",
                {"object": self.where(key), "written": f"{length} bytes"},
                "run the same command again",
            )

    def _lock_files(self) -> Iterator[Path]:
        return iter(()) if self.local is None else self.local.rglob("*" + LOCK_SUFFIX)

    def _failure(self, what: str, key: str, error: Exception) -> StorageError:
        text = str(error)
        if "No space left" in text:
            advice = "free some space, then run the same command again: what is committed stays"
        elif "Permission denied" in text or "PERMISSION_DENIED" in text or "Read-only" in text:
            advice = "make the place writable, or name another one"
        else:
            advice = "check the place, then run the same command again"
        return StorageError(f"an object {what}", {"object": self.where(key), "cause": text.split(" [")[0]}, advice)


class _held:
    """`with _held(path) as descriptor`: the file opened and locked; None where a live process holds it, or where
    this one may not write: nothing can be told then, and a write will say so itself.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._descriptor = path, -1

    def __enter__(self) -> int | None:
        try:
            self._descriptor = os.open(self._path, os.O_RDWR)
            lock_as_tensorstore(self._descriptor)
            # A writer may have renamed it to its key between the two calls: then this is a committed file.
            if not os.path.samestat(os.fstat(self._descriptor), os.stat(self._path)):
                return None
        except (FileNotFoundError, BlockingIOError, PermissionError):
            return None
        except OSError as error:
            if error.errno == errno.EROFS:
                return None
            raise
        return self._descriptor

    def __exit__(self, *_: object) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


def lock_as_tensorstore(descriptor: int) -> None:
    """Take the lock that the file driver takes, or raise BlockingIOError.

    TensorStore (0.1.86, measured) takes an open-file-description lock where the system has them, and flock elsewhere;
    Linux keeps the two kinds apart, so holding one says nothing about the other.
    """
    if hasattr(fcntl, "F_OFD_SETLK"):
        whole_file = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # struct flock: 64-bit offsets
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, whole_file)
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_if_empty(folder: Path) -> None:
    # Another process may remove it, or put something in, at any moment: both are fine.
    with contextlib.suppress(OSError):
        folder.rmdir()


def is_url(path: str) -> bool:
    """Whether the path names a bucket (or any other scheme) rather than a local file."""
    return "://" in path and not path.startswith("file://")


def _local_path(url: str) -> Path | None:
    if is_url(url):
        return None
    return Path(os.path.abspath(os.path.expanduser(url.removeprefix("file://"))))


def _url_spec(url: str, local: Path | None) -> str | dict[str, Any]:
    return url + "/" if local is None else {"driver": "file", "path": f"{local}/"}


def _after(prefix: str) -> str:
    """The first key that sorts after every key with this (ASCII) prefix."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)
