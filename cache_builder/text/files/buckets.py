"""Input files in buckets: listed and read through the store, whose settings, retries and credentials are theirs too.

    gs://bucket/corpus/**/*.jsonl.gz
    s3://bucket/corpus/

A listing of the store tells names alone. Each object is requested its version (generation, ETag), with one request. Its
length is found by asking whether it has a certain byte, with some 20 requests for 1 GB; so of many objects some are
measured, and the others are taken for as long as those are on average.
"""

import io
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from distillcache.schemas.errors import InputError
from distillcache.schemas.store.path import ObjectPath, locate
from distillcache.schemas.store.store import Store

BLOCK_BYTES = 8 << 20  # a request's overhead (tens of milliseconds) is small beside its bytes
READ_AHEAD = 4  # blocks in flight: one stream alone fills about a tenth of a 100 Gbit/s link, and 32 MiB of memory
MEASURED = 64  # objects whose length is found exactly: some 1,300 requests of a byte, for a second or two
TAIL_BYTES = 256 << 10  # of an object, read to find its length: about the time of a request
REQUESTS = 32  # at a time


@dataclass(frozen=True)
class RemoteObject:
    """An object to read.

    size: bytes; of one of more than `MEASURED` objects perhaps their average.
    version: the store's own mark of these very bytes: GCS's generation, S3's ETag.
    named: the user named it, or a pattern of such, rather than a folder above it.
    """

    url: str
    size: int
    version: str
    named: bool


def remote_objects(url: str) -> list[RemoteObject]:
    """The objects that a URL, a folder's URL or a pattern names, in the order of a disk's files.

    Hidden ones below a folder are left out.

    Raises:
        StorageError: no permission, no such bucket.
    """
    place = _place(url)
    # A name that exists is taken as it is, brackets and all; only then it may be a pattern.
    found = {place.key: True} if place.exists() else dict.fromkeys(_below(place), False) or _matching(place)
    keys = sorted(found, key=lambda key: key.split("/"))
    with ThreadPoolExecutor(REQUESTS, thread_name_prefix="input-list") as pool:
        versions = list(pool.map(lambda key: _version(place.store, key), keys))
        measured = keys[:: -(-len(keys) // MEASURED) or 1]
        sizes = dict(zip(measured, pool.map(lambda key: _length(place.store, key), measured), strict=True))
    average = sum(sizes.values()) // max(len(sizes), 1)
    return [
        RemoteObject(f"{place.root}/{key}", sizes.get(key, average), version, found[key])
        for key, version in zip(keys, versions, strict=True)
    ]


def open_remote(url: str, version: str) -> "BlockReader":
    """The object as a stream, read front to back.

    Raises: when read, StorageError, and InputError where the object is of another version.
    """
    place = _place(url)

    def fetch(start: int, stop: int) -> bytes:
        """Bytes [start, stop), or as many as there are."""
        ends = place.store.read_range(place.key, stop - 1, stop)[0] is None
        data, generation = place.store.read_range(place.key, start, None if ends else stop)
        if data:
            _check_version(url, version, _version_of(place.store, generation))
        return data or b""

    return BlockReader(fetch)


def check_unchanged(url: str, version: str) -> None:
    """Raise `InputError` where the store holds another version by now."""
    place = _place(url)
    _check_version(url, version, _version(place.store, place.key))


def _check_version(url: str, version: str, now: str) -> None:
    if now != version:
        raise InputError(
            "an input file changed while it was read",
            {"file": url, "version then": version, "version now": now or "none: it is gone"},
            "run the same command again when nothing writes there any more",
        )


def _place(url: str) -> ObjectPath:
    place = locate(url)
    assert isinstance(place, ObjectPath)
    return place


def _version(store: Store, key: str) -> str:
    """The version of an object; empty where there is none."""
    value, generation = store.read_with_generation(key, slice(0, 0))
    return "" if value is None else _version_of(store, generation)


def _version_of(store: Store, generation: bytes) -> str:
    """A generation of TensorStore's as the stores themselves write it: behind a byte the number, or the ETag."""
    tag = generation[1:]
    return tag.decode().strip('"') if store.url.startswith("s3://") else str(int.from_bytes(tag, "little"))


def _length(store: Store, key: str) -> int:
    """The length of an object, of which the store tells whether a byte exists."""

    def has(size: int) -> bool:
        return store.read_range(key, size - 1, size)[0] is not None

    low, high = 0, TAIL_BYTES
    while has(high):
        low, high = high, 16 * high
    while high - low > TAIL_BYTES:
        middle = (low + high) // 2
        low, high = (middle, high) if has(middle) else (low, middle)
    return low + len(store.read_range(key, low, None)[0] or b"")


def _below(folder: ObjectPath) -> list[str]:
    """The keys below a folder; hidden ones are left out, as in a local one."""
    names = (name.split("/") for name in folder.keys_below())
    return [(folder / "/".join(parts)).key for parts in names if _are_shown(parts)]


def _matching(pattern: ObjectPath) -> dict[str, bool]:
    """The keys that a pattern names, and those below folders that it names; hidden ones where it names the dot."""
    parts = pattern.key.split("/")
    first = next((place for place, part in enumerate(parts) if any(letter in part for letter in "*?[")), None)
    if first is None:
        return {}
    base, found = ObjectPath(pattern.root, "/".join(parts[:first]), pattern.settings), {}
    for name in base.keys_below():
        names = name.split("/")
        if names[-1] and fits(names, parts[first:]):
            found[(base / name).key] = True
        elif any(fits(names[:size], parts[first:]) and _are_shown(names[size:]) for size in range(1, len(names))):
            found[(base / name).key] = False
    return found


def _are_shown(parts: Sequence[str]) -> bool:
    """Return whether a name is a file's, none of whose parts begins with a dot."""
    return bool(parts[-1]) and not any(part.startswith(".") for part in parts)


def fits(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return whether the parts of a path match those of a pattern; only an explicit dot matches a hidden name."""
    if not pattern or not names:
        return not names and all(part == "**" for part in pattern)
    if pattern[0] == "**":
        return fits(names, pattern[1:]) or (not names[0].startswith(".") and fits(names[1:], pattern))
    shown = pattern[0].startswith(".") or not names[0].startswith(".")
    return shown and fnmatchcase(names[0], pattern[0]) and fits(names[1:], pattern[1:])


class BlockReader(io.RawIOBase):
    """A stream that is fetched by blocks, of which some are on their way ahead of the reader."""

    def __init__(self, fetch: Callable[[int, int], bytes]) -> None:
        """`fetch`: gives bytes [start, stop), or as many as there are. The stream ends with a short block."""
        super().__init__()
        self._fetch = fetch
        self._asked, self._ahead, self._ended, self._block = 0, 1, False, memoryview(b"")
        self._waiting: deque[Future[bytes]] = deque()
        self._pool = ThreadPoolExecutor(READ_AHEAD, thread_name_prefix="input-block")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not len(self._block) and not self._ended:
            self._ask()
            self._block = memoryview(self._waiting.popleft().result())
            self._ended = len(self._block) < BLOCK_BYTES
            self._ahead = READ_AHEAD  # behind a short first block there is nothing
            if not self._ended:
                self._ask()
        count = min(len(buffer), len(self._block))
        buffer[:count] = self._block[:count]
        self._block = self._block[count:]
        return count

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._waiting.clear()
        super().close()

    def _ask(self) -> None:
        while len(self._waiting) < self._ahead:
            self._waiting.append(self._pool.submit(self._fetch, self._asked, self._asked + BLOCK_BYTES))
            self._asked += BLOCK_BYTES
