"""A file or folder of a bucket, with the part of `pathlib.Path`'s interface that readers of small files use.

A *place* is where a user's file or folder lies: a `Path`, or an `ObjectPath` for `gs://bucket/key` and
`s3://bucket/key`. Code that only joins names, asks for existence and reads whole small files serves both.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from distillcache.schemas.errors import ConfigError, StorageError
from distillcache.schemas.store.buckets import is_garbled
from distillcache.schemas.store.store import Store, is_url
from distillcache.schemas.store.url_secrets import refuse_secret

READS = 4  # of a whole object, until it comes whole


@dataclass(frozen=True)
class ObjectPath:
    """One key of a bucket, or the folder of the keys below it: a bucket does not tell the two apart.

    root: `gs://bucket`. key: without slashes at its ends; empty for the bucket itself.
    """

    root: str
    key: str

    def __str__(self) -> str:
        return f"{self.root}/{self.key}" if self.key else self.root

    def __truediv__(self, name: str) -> "ObjectPath":
        return ObjectPath(self.root, f"{self.key}/{name}".strip("/"))

    @property
    def name(self) -> str:
        """The last part of the key."""
        return PurePosixPath(self.key).name

    @property
    def suffix(self) -> str:
        """The last part of the name from its last dot on."""
        return PurePosixPath(self.key).suffix

    @property
    def parent(self) -> "ObjectPath":
        """The folder that holds it."""
        return ObjectPath(self.root, self.key.rpartition("/")[0])

    @cached_property
    def store(self) -> Store:
        """The store of the whole bucket."""
        return Store(self.root)

    def exists(self) -> bool:
        """Return whether there is an object of this key. A folder is not one."""
        return bool(self.key) and self.store.read(self.key, slice(0, 0)) is not None

    def read_bytes(self) -> bytes:
        """The whole object.

        Raises:
            FileNotFoundError: as a `Path` does.
            StorageError: it cannot be read, or comes short each time: TensorStore does not notice a body that is cut
                and says so, but a byte behind its end tells.
        """
        for _ in range(READS):
            value = self.store.read(self.key) if self.key else None
            if value is None:
                raise FileNotFoundError("there is no such object")
            if self.read_range(len(value), len(value) + 1)[0] is None:
                return value
        raise StorageError(
            "an object comes short from its store", {"object": self, "tries": READS}, "check the network to the store"
        )

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole object as text."""
        return self.read_bytes().decode(encoding)

    def write_bytes(self, value: bytes) -> None:
        """Store the object with one write."""
        self.store.write(self.key, value)

    def unlink(self) -> None:
        """Delete the object; nothing happens where there is none."""
        self.store.delete(self.key)

    def keys(self) -> list[str]:
        """The keys below this folder, relative to it, sorted."""
        prefix = f"{self.key}/" if self.key else ""
        return [key.removeprefix(prefix) for key in self.store.keys(prefix)]

    def iterdir(self) -> Iterator["ObjectPath"]:
        """List the objects and folders in this folder by name."""
        for name in sorted({key.split("/")[0] for key in self.keys()} - {""}):
            yield self / name

    def read_range(self, start: int, stop: int) -> tuple[bytes | None, bytes]:
        """Bytes [start, stop) and the object's generation. None: there is no such object, or not that much of it."""
        if start == stop:
            return b"", b""
        try:
            return self.store.read_with_generation(self.key, slice(start, stop))
        except StorageError as error:
            text = str(error)
            if "OUT_OF_RANGE" in text and not is_garbled(text):  # how an object that ends before `stop` answers
                return None, b""
            raise


Location = Path | ObjectPath


def locate(path: str | os.PathLike[str] | ObjectPath) -> Location:
    """The place that a user's text names: a local path, `file://`, `gs://bucket/key` or `s3://bucket/key`."""
    if isinstance(path, ObjectPath):
        return path
    text = os.fspath(path)
    refuse_secret(text, "path")
    if not is_url(text):
        return Path(os.path.expanduser(text.removeprefix("file://")))  # Path's own fails for `~nobody`
    scheme, _, rest = text.partition("://")
    bucket, _, key = rest.partition("/")
    return ObjectPath(f"{scheme}://{bucket}", key.strip("/"))


def local_path(path: str, flag: str) -> Path:
    """The local path of a user's text, for what is made of plain files.

    Raises:
        ConfigError: it names a bucket.
    """
    where = locate(path)
    if isinstance(where, ObjectPath):
        raise ConfigError(
            "this can only be on a local disk", {flag: path}, "name a local path, and copy what it holds afterwards"
        )
    return where
