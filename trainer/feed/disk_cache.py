"""Local disk cache of what was read from a bucket, so that the next epoch does not fetch it again.

    <dir>/distillcache-feed/              all of it: nothing else in <dir> is looked at
      lock, used                          taken while files are added or removed; the bytes of all files, 8 bytes
      <identity>/taps/<array>/...         the codes of consecutive slots of a row, one after the other
      <identity>/index/, rows/            a segment's small files, by shard
      <identity>/**/*.new                 being written

A segment's *identity* is the digest of all its digests, so nothing of a cache is ever taken for another one's. Whoever
reads a file checks it against the cache's digests and drops it where it differs: nothing here has to be durable.

Any number of processes may share the folder, and each may be killed at any moment. A file gets its name when it is
whole; one that is being written has its full length from the start and is locked by its writer, so that the limit
counts it, and what a killed writer left is found and removed. A file that is removed stays readable for whoever has it
open.

What was used longest ago is removed first, with one exception: of the segment that is being read, nothing that was used
within `FRESH_S`. Every epoch visits all rows in another order. Where only half of them fit, removing the oldest would
leave 15% of them to be found in the next epoch; keeping what is there leaves 50%.

The folder may lie where others write, too. Nothing of ours is a link: one is never followed, only removed.
"""

import contextlib
import errno
import fcntl
import logging
import os
import stat
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from distillcache.schemas.cache.segment import SmallFiles
from distillcache.schemas.config.feed import LocalCacheConfig
from distillcache.schemas.errors import StorageError
from distillcache.schemas.store.local_path import refuse_irregular
from distillcache.schemas.store.store import is_url

log = logging.getLogger(__name__)

FRESH_S = 24 * 3600.0  # longer than most epochs: what a whole day did not need makes room
SLACK = 0.02  # of the limit: removed beyond what is needed, so that the folder is not listed again for every file
FULL_S = 600.0  # for so long nothing is kept after there was nothing to remove: listing a million files takes seconds
FOLDER = "distillcache-feed"
NEW = ".new"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
OWN = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW


@dataclass(frozen=True, order=True)
class _Kept:
    """A file, in the order of removal."""

    used: float
    path: str = field(compare=False)
    size: int = field(compare=False)


class LocalCache:
    """One folder. Safe to use from several threads."""

    def __init__(self, folder: str, max_bytes: int) -> None:
        """Make the folder, count what is in it, and remove what killed processes left.

        Raises:
            StorageError: the folder cannot be made or written. It is the start of a run, nothing is lost yet; later
            failures are reported once, and the run continues without keeping more.
        """
        self._max, self._threads, self._full_until, self._ended = max_bytes, threading.Lock(), 0.0, False
        if is_url(folder):
            raise StorageError("the local cache is not local", {"feed.local_cache.dir": folder}, "name a local folder")
        self.folder = Path(os.path.abspath(os.path.expanduser(folder.removeprefix("file://")))) / FOLDER
        self._root, self._inside = f"{os.path.realpath(self.folder.parent)}/{FOLDER}", set[str]()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._path("lock")
            self._lock = os.open(self.folder / "lock", OWN, 0o666)
            self._used = os.open(self.folder / "used", OWN, 0o666)
            with self._alone():
                self._remove(0, "")
        except OSError as error:
            raise StorageError(
                "the folder of the local cache cannot be used",
                {"feed.local_cache.dir": self.folder, "cause": error.strerror or error},
                "make it writable, name another one, or leave out feed.local_cache.dir",
            ) from error

    def __del__(self) -> None:
        for name in ("_lock", "_used"):
            if hasattr(self, name):
                os.close(getattr(self, name))

    def has(self, name: str) -> bool:
        """Return whether there is such a file now; it may be gone when it is opened."""
        try:
            return stat.S_ISREG(os.lstat(self._path(name)).st_mode)
        except OSError:
            return False

    def open(self, name: str) -> int | None:
        """A descriptor of the file, which the caller closes; None where there is none."""
        try:
            path = self._path(name)
            refuse_irregular(path)
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            return None
        with contextlib.suppress(OSError):
            os.utime(descriptor)  # it was used; the time of access is not kept on most mounts
        return descriptor

    def drop(self, name: str) -> None:
        """Remove a damaged file."""
        with contextlib.suppress(OSError):
            os.unlink(self._path(name))  # it stays counted until the folder is listed: the limit still holds

    def keep(self, name: str, parts: Sequence[memoryview]) -> None:
        """Store these bytes, one part after the other, unless there is no room."""
        if self._ended or time.monotonic() < self._full_until:
            return
        size = sum(part.nbytes for part in parts)
        try:
            path = self._path(name)
            new = f"{path}.{os.getpid()}.{threading.get_ident()}{NEW}"
            descriptor = self._begin(new, size, name.partition("/")[0])
            if descriptor is None:
                return
            try:
                _write(descriptor, parts)
                self._name(new, path)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(new)
                raise
            finally:
                os.close(descriptor)
        except FileNotFoundError:
            pass  # the folder was removed under our hands: there is a next time
        except OSError as error:
            self._end(error)

    def files(self, identity: str) -> SmallFiles:
        """A segment's small files."""
        return _SmallFiles(self, identity)

    def _path(self, name: str) -> str:
        """The path of this name.

        Raises:
            OSError: a link is on the way there.
        """
        parent = os.path.dirname(name)
        if parent not in self._inside:  # asked once for each: a call for every part of the path costs more than opening
            found = os.path.realpath(f"{self.folder}/{parent}")
            if found != f"{self._root}/{parent}".rstrip("/"):
                raise OSError(errno.ELOOP, f"a link leads to {found}")
            if os.path.isdir(found):
                self._inside.add(parent)
        return f"{self.folder}/{name}"

    def _begin(self, new: str, size: int, identity: str) -> int | None:
        """The new file in its full length, locked, with room for it; None where there is none."""
        with self._alone():
            used = self._count()
            if used + size > self._max and time.monotonic() >= self._full_until:
                used = self._remove(size, identity)
            if used + size > self._max:
                self._full_until = max(self._full_until, time.monotonic() + FULL_S)
                return None
            self._set_count(used + size)  # first: killed now, it is too high, until the folder is listed
            os.makedirs(os.path.dirname(new), exist_ok=True)
            descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(descriptor, size)
            except BaseException:
                os.close(descriptor)
                os.unlink(new)
                raise
            return descriptor

    def _name(self, new: str, path: str) -> None:
        """The file is whole. Names do not change while the folder is listed: it would be overlooked."""
        with self._alone():
            with contextlib.suppress(FileNotFoundError):
                self._set_count(self._count() - os.lstat(path).st_size)  # another process was first: its file goes
            os.rename(new, path)

    def _remove(self, size: int, identity: str) -> int:
        """List the folder, remove files until `size` more bytes have room, and set the count, which is returned."""
        files = sorted(self._swept())
        used = sum(file.size for file in files)
        if used + size > self._max:
            goal, fresh = self._max * (1 - SLACK) - size, time.time() - FRESH_S
            own = f"{self.folder}/{identity}/"
            for file in files:
                if used <= goal:
                    break
                mine = identity and file.used > fresh and file.path.startswith(own)
                if not mine and not file.path.endswith(NEW):
                    used -= _unlinked(file)
        self._set_count(used)
        return used

    def _swept(self) -> Iterator[_Kept]:
        """All files but those that killed writers left, which are removed, and empty folders with them."""
        for parent, folders, names in os.walk(self.folder):
            for name in names:
                path = os.path.join(parent, name)
                with contextlib.suppress(FileNotFoundError):  # someone dropped it
                    if parent == str(self.folder) or (name.endswith(NEW) and _abandoned(path)):
                        continue
                    found = os.lstat(path)
                    yield _Kept(found.st_mtime, path, found.st_size)
            if not folders and not names and parent != str(self.folder):
                with contextlib.suppress(OSError):
                    os.rmdir(parent)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """No other thread or process adds or removes files meanwhile."""
        with self._threads:  # the lock below belongs to the descriptor, which all threads share
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._lock, fcntl.LOCK_UN)

    def _count(self) -> int:
        found = os.pread(self._used, 8, 0)
        return struct.unpack("<q", found)[0] if len(found) == 8 else self._max  # lost: list the folder

    def _set_count(self, used: int) -> None:
        os.pwrite(self._used, struct.pack("<q", used), 0)

    def _end(self, error: OSError) -> None:
        """Say once that nothing more is kept; existing files stay in use."""
        with self._threads:
            told, self._ended = self._ended, True
        if not told:
            full = " (the disk is full before feed.local_cache.max_gib is reached)" if error.errno in NO_ROOM else ""
            log.warning(f"the local cache {self.folder} cannot store more: {error.strerror}{full}; training continues")


def open_local_cache(config: LocalCacheConfig, cache: str) -> LocalCache | None:
    """The folder that a config names; None where it names none, or where the cache is on a local disk itself."""
    if config.dir is None:
        return None
    if not is_url(cache):
        log.info(f"feed.local_cache is not used: {cache} is on a local disk")
        return None
    return LocalCache(config.dir, int(config.max_gib * (1 << 30)))


class _SmallFiles:
    """See `distillcache.schemas.cache.segment.SmallFiles`."""

    def __init__(self, cache: LocalCache, identity: str) -> None:
        self._cache, self._identity = cache, identity

    def get(self, name: str) -> bytes | None:
        descriptor = self._cache.open(f"{self._identity}/{name}")
        if descriptor is None:
            return None
        with os.fdopen(descriptor, "rb") as file:
            try:
                return file.read()
            except OSError:  # a disk that gives nothing back: as if it were not there
                return None

    def put(self, name: str, data: bytes) -> None:
        self._cache.keep(f"{self._identity}/{name}", [memoryview(data)])

    def drop(self, name: str) -> None:
        self._cache.drop(f"{self._identity}/{name}")


def _write(descriptor: int, parts: Sequence[memoryview]) -> None:
    for part in parts:
        left = part.cast("B") if part.nbytes else part
        while left.nbytes:
            left = left[os.write(descriptor, left) :]


def _abandoned(path: str) -> bool:
    """Return whether a file was being written by a process that is gone; then it is removed."""
    if os.path.islink(path):
        os.unlink(path)  # not ours, and what it leads to is not opened
        return True
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


def _unlinked(file: _Kept) -> int:
    """The bytes that removing it gave back."""
    try:
        os.unlink(file.path)
    except FileNotFoundError:
        return file.size
    except OSError:
        return 0
    return file.size
