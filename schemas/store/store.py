"""Stores of caches, runs and corpora: a thin layer over TensorStore's key-value stores.

A *store* is a folder: a local path, `file://`, `gs://bucket/prefix` or `s3://bucket/prefix`. Every read and write
of ours goes through it, so that one implementation serves all of them and every failure becomes one `StorageError`
that names the key. `using` sets the object-store client settings (config/storage.py); `buckets` knows what is peculiar
to them.
"""

import contextlib
import contextvars
import copy
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import tensorstore as ts

from distillcache.schemas.config.storage import StorageConfig
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import DamageError, StorageError
from distillcache.schemas.store import buckets
from distillcache.schemas.store.disk_errors import step_for, unreadable
from distillcache.schemas.store.local_path import LocalPath, refuse_irregular
from distillcache.schemas.store.names import refuse_other_encoding, refuse_unusable_path
from distillcache.schemas.store.stale_locks import held
from distillcache.schemas.store.url_secrets import refuse_secret

LOCK_SUFFIX = ".__lock"  # TensorStore's file driver writes KEY through KEY.__lock
# Retry delays after a corrupt response of a bucket, which TensorStore does not notice or does not make again. Where a
# tenth of all responses is cut, one request in a million is taken for damage.
AGAIN_S = (0.0, 0.1, 0.5, 2.0, 5.0)

Value = TypeVar("Value")
Bytes = TypeVar("Bytes", bytes, bytes | None)


_settings: contextvars.ContextVar[StorageConfig | None] = contextvars.ContextVar("settings", default=None)
_contexts: dict[str, ts.Context] = {}
_making = threading.Lock()


@contextlib.contextmanager
def using(settings: StorageConfig) -> Iterator[None]:
    """`with using(config.storage):` stores that are opened meanwhile, in this thread, ask buckets in this way."""
    refuse_secret(settings.s3_endpoint or "", "storage.s3_endpoint")
    token = _settings.set(settings)
    try:
        yield
    finally:
        _settings.reset(token)


def current() -> StorageConfig:
    """Return the settings that a store gets which is opened now."""
    return _settings.get() or StorageConfig()


def context(resources: dict[str, Any] | None = None, settings: StorageConfig | None = None) -> ts.Context:
    """The process's TensorStore Context for these settings: all that reads and writes shares its queues and limits.

    Args:
        resources: what differs from it, for instance `{"cache_pool": {"total_bytes_limit": 0}}`.
        settings: default: the current ones.
    """
    settings = settings or current()
    spec = buckets.context_spec(settings)
    with _making:
        if (name := json.dumps(spec)) not in _contexts:
            buckets.set_timeouts(settings)
            _contexts[name] = ts.Context(spec)
    return ts.Context(resources, _contexts[name]) if resources else _contexts[name]


class Store:
    """The keys below one URL. Values are bytes; a write is durable (synced) when it returns."""

    def __init__(self, url: str, settings: StorageConfig | None = None) -> None:
        """`settings`: how a bucket is asked; default: as `using` says."""
        refuse_secret(url, "url")
        buckets.refuse_nameless(url)
        self.settings = settings or current()
        self.url = url.rstrip("/") or "/"
        self.local = _local_path(self.url)
        if self.local is not None:
            refuse_unusable_path(str(self.local))
            refuse_other_encoding(str(self.local))
        if self.local is not None and self.local.exists() and not self.local.is_dir():
            raise StorageError(
                "a directory is needed, but there is a file", {"path": self.local}, "name another directory"
            )
        if self.local is None:
            buckets.check_scheme(self.url)
        bucket = buckets.bucket_spec(self.url, self.settings) if self.local is None else None
        spec = bucket or _url_spec(self.url, self.local)
        self.is_bucket = bucket is not None
        try:
            self._kv = ts.KvStore.open(spec, context=self.context() if self.is_bucket else None).result()
        except buckets.FAILURES as error:
            raise self._failure("the store cannot be opened", {"url": url}, error) from error
        self._spec = self._kv.spec().to_json() if bucket is None else bucket
        self._may_write: Callable[[], None] = _always

    def guarded(self, may_write: Callable[[], None]) -> "Store":
        """The same store for one job that may lose its folder while it is paused.

        Args:
            may_write: called before every write and every deletion of a single key; raises where it must not be. It
                is called after the key's generation was read, and the write depends on that: what another process
                writes once this one has lost the place is never overwritten, however long this one was paused.
        """
        found = copy.copy(self)
        found._may_write = may_write
        return found

    def check_may_write(self) -> None:
        """Raise where a guarded store must not be written now: before writes that do not go through it."""
        self._may_write()

    def context(self, resources: dict[str, Any] | None = None) -> ts.Context:
        """The Context of this store's settings, as `context` gives it."""
        return context(resources, self.settings)

    def spec(self, key: str) -> dict[str, Any]:
        """TensorStore's JSON spec of the folder `key` below this store, for a zarr array there (with `context()`)."""
        return {**self._spec, "path": self._spec.get("path", "") + key.rstrip("/") + "/"}

    def where(self, key: str) -> str:
        """Return the name of `key` in messages."""
        return f"{self.url}/{key}"

    def read(self, key: str, byte_range: slice | None = None) -> bytes | None:
        """The value, or None where there is no such key.

        Of a whole value from a bucket, the length is confirmed by a second request: use `read_checked` where the bytes
        tell themselves whether they are whole.
        """
        return self.read_with_generation(key, byte_range)[0]

    def read_with_generation(
        self, key: str, byte_range: slice | None = None, *, confirm: bool = True
    ) -> tuple[bytes | None, bytes]:
        """The value (None: absent) and its generation, for a conditional write.

        Args:
            confirm: ask a bucket also for the length of a value that is read to its end.
        """
        for _ in self.tries():
            value, generation = self._read(key, byte_range)
            open_end = byte_range is None or byte_range.stop is None
            start = 0 if byte_range is None else byte_range.start
            certain = value is None or not (self.is_bucket and confirm and open_end)
            if certain or self._ends_at(key, start + len(value or b"")):
                return value, generation
        raise self._failure("an object is never read whole", {"object": self.where(key)}, ValueError("cut"))

    def read_range(self, key: str, start: int, stop: int | None) -> tuple[bytes | None, bytes]:
        """Bytes [start, stop) and the object's generation. None: there is no such object, or not that much of it.

        `stop`: None: all that there is behind `start`, but at least a byte.
        """
        if start == stop:
            return b"", b""
        try:
            return self.read_with_generation(key, slice(start, stop))
        except StorageError as error:
            if "OUT_OF_RANGE" in str(error) and not buckets.is_garbled(str(error)):  # how a shorter object answers
                return None, b""
            raise

    def tries(self) -> Iterator[bool]:
        """Yield for each try to read something right, with waits before the next; True for the last one.

        A local disk gets one try, a bucket some more.
        """
        for wait in AGAIN_S if self.is_bucket else ():
            yield False
            time.sleep(wait)
        yield True

    def checked(self, read: Callable[[], Bytes], check: Callable[[Bytes], Value]) -> Value:
        """Return the result of `check` on the result of `read`, which is read again while `check` refuses it.

        Bytes that come twice are the object's own, so `read` must give them whole: a range, or a confirmed value.

        Raises:
            DamageError: from `check`.
        """
        seen: list[Bytes] = []
        for last in self.tries():
            data = read()
            try:
                return check(data)
            except DamageError:
                if last or data in seen:
                    raise
            seen.append(data)
        raise AssertionError("the last try returns or raises")

    def holds(self, key: str, value: bytes) -> bool:
        """Return whether the key has this very value: with one request where it has, since equal bytes are whole."""
        return self.read_with_generation(key, confirm=False)[0] == value or self.read(key) == value

    def _read(self, key: str, byte_range: slice | None = None) -> tuple[bytes | None, bytes]:
        self.check_readable(key)
        result = self._ask("cannot be read", key, lambda: self._kv.read(key, byte_range=byte_range).result())
        return (result.value if result.state == "value" else None), result.stamp.generation

    def _ends_at(self, key: str, length: int) -> bool:
        """Return whether the value (if there is one) has no byte beyond `length`."""
        return self.read_range(key, length, length + 1)[0] is None

    def read_checked(self, key: str, check: Callable[[bytes], Value]) -> Value | None:
        """Read a value through `check`, with retries while it is garbled; None if there is no such key.

        A bucket's answer may be short without TensorStore noticing, so of what `check` refuses the length is confirmed.

        Raises:
            DamageError: from `check`.
        """
        data, _ = self._read(key)
        try:
            return None if data is None else check(data)
        except DamageError:
            if not self.is_bucket:
                raise
        return self.checked(lambda: self.read(key), lambda data: None if data is None else check(data))

    def write(self, key: str, value: bytes) -> None:
        """Store the value, whatever was there, and check the length that is stored."""
        if self._may_write is _always:
            self.check_inside(key, LOCK_SUFFIX)
            self._empty_stale_lock(key)
            self._ask("cannot be written", key, lambda: self._kv.write(key, value).result())
        else:
            while not self.replace(key, value, self._read(key, slice(0, 0))[1]):
                pass
        self._check_length(key, len(value))

    def create(self, key: str, value: bytes) -> bool:
        """Store the value if the key is absent; False where another writer was first."""
        found, generation = self.read_with_generation(key)
        return found is None and self.replace_whole(key, value, generation)

    def replace(self, key: str, value: bytes, generation: bytes) -> bool:
        """Store the value if the key's generation is still the one given; False where it is not.

        True also where the value is there although the store says that another was first: the answer to our own write
        was lost, and what was refused is TensorStore's second try. (Equal values of two writers are as good.)
        """
        self._may_write()
        self.check_inside(key, LOCK_SUFFIX)
        self._empty_stale_lock(key)
        stamp = self._ask("cannot be written", key, lambda: self._kv.write(key, value, if_equal=generation).result())
        if stamp.generation or not self.is_bucket:
            return bool(stamp.generation)
        found, now = self.read_with_generation(key)
        if now == generation:  # nobody was first: how S3 answers where the bucket is gone, and a listing says so
            self.keys(key)
        return found == value

    def replace_whole(self, key: str, value: bytes, generation: bytes) -> bool:
        """`replace`, and check the length that is stored: for a key that nobody writes again soon."""
        if not self.replace(key, value, generation):
            return False
        self._check_length(key, len(value))
        return True

    def put_once(self, key: str, value: bytes) -> None:
        """Store the value where another is, or none. Of many processes with one value, one writes it."""
        while True:
            found, generation = self.read_with_generation(key)
            if found == value or self.replace_whole(key, value, generation):
                return

    def delete(self, key: str) -> None:
        """Remove the key; nothing happens where it is absent. Of a link, the link itself goes."""
        self._may_write()
        self.check_inside(str(Path(key).parent), f"/{Path(key).name}{LOCK_SUFFIX}")
        try:
            self._ask("cannot be deleted", key, lambda: self._kv.write(key, None).result())
        except StorageError:
            # On a local disk another process may remove the folder meanwhile, and the lock file's place with it.
            if self.local is None or (self.local / key).exists():
                raise

    def keys(self, prefix: str = "") -> list[str]:
        """The keys that start with `prefix`, sorted; lock files of the file driver left out."""
        key_range = ts.KvStore.KeyRange(prefix, _after(prefix)) if prefix else ts.KvStore.KeyRange()
        try:
            found = self._ask("cannot be listed", prefix, lambda: self._kv.list(key_range).result())
        except StorageError:
            self._ask_as_reader(prefix)
            raise
        if not found:
            self._ask_as_reader(prefix)
        return sorted(key for key in (k.decode() for k in found) if not key.endswith(LOCK_SUFFIX))

    def _ask_as_reader(self, prefix: str) -> None:
        """TensorStore 0.1.86 takes an error page of GCS for an empty or a broken listing; a read says what is wrong."""
        if self.is_bucket and self._spec["driver"] == "gcs":
            self._read(f"{prefix}distillcache-is-asking")

    def check_writable(self, folder: str = "") -> None:
        """Raise if nothing can be written to the bucket, before hours of work are lost. Local disks say so at once.

        Args:
            folder: where a key is written and deleted, ending in a slash; one in which nobody minds if it stays.
        """
        if self.is_bucket:
            key = f"{folder}distillcache-is-asking-{uuid.uuid4().hex}"
            self.write(key, b"")
            self.delete(key)

    def length_is(self, key: str, length: int) -> bool:
        """Return whether the stored value has exactly this length, without reading it."""
        if self.local is not None:
            self.check_readable(key)
            try:
                return (self.local / key).stat().st_size == length
            except (FileNotFoundError, NotADirectoryError):
                return False
            except OSError as error:
                raise unreadable(self.where(key), error) from error
        if length == 0:
            return self.read(key) == b""
        return not self._ends_at(key, length - 1) and self._ends_at(key, length)

    def clear_stale_locks(self) -> None:
        """Empty the lock files that killed writers left, so that no later write keeps their tail.

        A live writer holds a lock on it, so only dead ones are touched. Buckets have no lock files.
        """
        for path in self._lock_files():
            _empty(path)

    def _empty_stale_lock(self, key: str) -> None:
        """Empty this key's lock file if a killed writer left one: any process may be killed at any time, also one that
        never looks through the folder, such as a training."""
        if self.local is not None:
            _empty(Path(f"{self.local}/{key}{LOCK_SUFFIX}"))

    def remove_stale_locks(self) -> None:
        """Delete the lock files of dead writers, for a finished cache without writers."""
        for path in self._lock_files():
            with held(path) as descriptor:
                if descriptor is not None:
                    path.unlink(missing_ok=True)

    def stale_locks(self, prefix: str = "") -> list[str]:
        """The keys of the lock files of dead writers, sorted. One that may not be opened for writing is left out."""
        found = []
        for path in self._lock_files():
            with held(path) as descriptor:
                if descriptor is not None:
                    found.append(path.relative_to(self.local or path).as_posix())
        return sorted(key for key in found if key.startswith(prefix))

    def delete_keys(self, prefix: str) -> None:
        """Delete every key that starts with `prefix`; in a bucket, many at a time."""
        if self.is_bucket:
            self._may_write()
            inside = ts.KvStore.KeyRange(prefix, _after(prefix))
            self._ask("cannot be deleted", prefix, lambda: self._kv.delete_range(inside).result())
        else:
            for key in self.keys(prefix):
                self.delete(key)

    def delete_folder(self, key: str) -> None:
        """Delete every key below the folder, and on a local disk the empty folders up to the store's own."""
        self.delete_keys(f"{key}/")
        self.remove_empty_folders(key)
        if self.local is not None:
            for parent in [Path(key), *Path(key).parents]:
                _remove_if_empty(self.local / parent)

    def remove_empty_folders(self, key: str) -> None:
        """Remove the empty folders that remain on a local disk after the last key was deleted."""
        if self.local is None:
            return
        self.check_inside(key)
        for folder, _, _ in os.walk(self.local / key, topdown=False):
            _remove_if_empty(Path(folder))

    def check_inside(self, *ends: str) -> None:
        """Raise unless a key, also with each further end, lies below this store on the disk, links followed.

        A cache may come from others, and so may the links in it.
        """
        if self.local is None:
            return
        root = os.path.realpath(self.local)
        for count in range(1, len(ends) + 1):
            path = f"{root}/{''.join(ends[:count])}"
            found = os.path.realpath(path)
            if found != root and not found.startswith(f"{root.rstrip('/')}/"):
                raise StorageError(
                    "a name or a link leads out of its folder",
                    {"object": path, "leads to": found, "folder": self.url},
                    "remove the link; its target was not touched",
                )

    def check_readable(self, key: str) -> None:
        """`check_inside`; also raise where a folder lies, which would count as absent, or a pipe, a socket or a device,
        which a reader would wait for.
        """
        self.check_inside(key)
        if self.local is not None:
            try:
                refuse_irregular(f"{self.local}/{key}", folders=True)
            except OSError as error:
                raise unreadable(self.where(key), error) from error

    def _check_length(self, key: str, length: int) -> None:
        """A lock file left by a killed writer is reused without being truncated: a shorter value keeps the old tail.

        A bucket stores a value whole or not at all.
        """
        if not self.is_bucket and not self.length_is(key, length):
            raise StorageError(
                "the store has another length than was written",
                {"object": self.where(key), "written": counted(length, "byte")},
                "run the same command again",
            )

    def _lock_files(self) -> Iterator[Path]:
        return iter(()) if self.local is None else self.local.rglob("*" + LOCK_SUFFIX)

    def _ask(self, what: str, key: str, operation: Callable[[], Value]) -> Value:
        """The operation's result; retried if a bucket's response is corrupt."""
        if self.is_bucket:
            self._meet()
        for last in self.tries():
            try:
                return operation()
            except buckets.FAILURES as error:
                if last or not buckets.is_garbled(str(error)):
                    raise self._failure(f"an object {what}", {"object": self.where(key)}, error) from error
        raise AssertionError("the last try returns or raises")

    def _meet(self) -> None:
        try:
            buckets.meet(self._spec, self.settings)
        except (*buckets.FAILURES, TimeoutError) as error:
            raise self._failure("the store cannot be used", {"url": self.url}, error) from error

    def _failure(self, what: str, facts: dict[str, object], error: BaseException) -> StorageError:
        text = buckets.cause(error) or f"no answer within {self.settings.contact_timeout_s:g} s"
        advice = buckets.advice(self.url, error) if self.local is None else None
        advice = advice or step_for(text, reads=what.endswith(("read", "listed", "whole")))
        return StorageError(what, {**facts, "cause": text}, advice or "check the path, then run the same command again")


def _always() -> None:
    """Nothing is in the way of a write."""


def _empty(lock: Path) -> None:
    with held(lock) as descriptor:
        if descriptor is not None:
            os.ftruncate(descriptor, 0)


def _remove_if_empty(folder: Path) -> None:
    # Another process may remove it, or put something in, at any moment: both are fine.
    with contextlib.suppress(OSError):
        folder.rmdir()


def is_url(path: str) -> bool:
    """Return whether the path names a bucket (or any other scheme) rather than a local file."""
    return "://" in path and not path.startswith("file://")


def _local_path(url: str) -> Path | None:
    if is_url(url):
        return None
    return LocalPath(os.path.abspath(os.path.expanduser(url.removeprefix("file://"))))


def _url_spec(url: str, local: Path | None) -> str | dict[str, Any]:
    return url + "/" if local is None else {"driver": "file", "path": f"{local}/"}


def _after(prefix: str) -> str:
    """The first key that sorts after every key with this (ASCII) prefix."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)
