"""A file or folder of a bucket, with the part of `pathlib.Path`'s interface that readers of small files use.

A *place* is where a user's file or folder lies: a `Path`, or an `ObjectPath` for `gs://bucket/key` and
`s3://bucket/key`. Code that only joins names, asks for existence and reads whole small files serves both.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath

from distillcache.schemas.config.storage import StorageConfig
from distillcache.schemas.errors import ConfigError
from distillcache.schemas.store.buckets import refuse_nameless
from distillcache.schemas.store.local_path import LocalPath
from distillcache.schemas.store.names import refuse_unusable_path
from distillcache.schemas.store.store import Store, current, is_url
from distillcache.schemas.store.url_secrets import refuse_secret


@dataclass(frozen=True)
class ObjectPath:
    """One key of a bucket, or the folder of the keys below it: a bucket does not tell the two apart.

    root: `gs://bucket`. key: without slashes at its ends; empty for the bucket itself. settings: how it is asked.
    """

    root: str
    key: str
    settings: StorageConfig = field(default_factory=current, compare=False, repr=False)

    def __str__(self) -> str:
        return f"{self.root}/{self.key}" if self.key else self.root

    def __truediv__(self, name: str) -> "ObjectPath":
        return replace(self, key=f"{self.key}/{name}".strip("/"))

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
        return replace(self, key=self.key.rpartition("/")[0])

    @cached_property
    def store(self) -> Store:
        """The store of the whole bucket."""
        return Store(self.root, self.settings)

    def exists(self) -> bool:
        """Return whether there is an object of this key. A folder is not one."""
        return bool(self.key) and self.store.read(self.key, slice(0, 0)) is not None

    def read_bytes(self) -> bytes:
        """The whole object.

        Raises:
            FileNotFoundError: as a `Path` does.
            StorageError: it cannot be read, or comes short each time.
        """
        value = self.store.read(self.key) if self.key else None
        if value is None:
            raise FileNotFoundError("there is no such object")
        return value

    def read_text(self, encoding: str = "utf-8") -> str:
        """The whole object as text."""
        return self.read_bytes().decode(encoding)

    def write_bytes(self, value: bytes) -> None:
        """Store the object with one write."""
        self.store.write(self.key, value)

    def unlink(self) -> None:
        """Delete the object; nothing happens where there is none."""
        self.store.delete(self.key)

    def keys_below(self) -> list[str]:
        """The keys below this folder, relative to it, sorted."""
        prefix = f"{self.key}/" if self.key else ""
        return [key.removeprefix(prefix) for key in self.store.keys(prefix)]

    def iterdir(self) -> Iterator["ObjectPath"]:
        """List the objects and folders in this folder by name."""
        for name in sorted({key.split("/")[0] for key in self.keys_below()} - {""}):
            yield self / name

    def read_range(self, start: int, stop: int) -> tuple[bytes | None, bytes]:
        """Bytes [start, stop) and the object's generation. None: there is no such object, or not that much of it."""
        return self.store.read_range(self.key, start, stop)


Location = Path | ObjectPath


def locate(path: str | os.PathLike[str] | ObjectPath) -> Location:
    """The place that a user's text names: a local path, `file://`, `gs://bucket/key` or `s3://bucket/key`.

    Of a local place, and of paths made from it, only regular files are opened."""
    if isinstance(path, ObjectPath):
        return path
    text = os.fspath(path)
    refuse_secret(text, "path")
    if not is_url(text):
        local = os.path.expanduser(text.removeprefix("file://"))  # Path's own fails for `~nobody`
        refuse_unusable_path(local)
        return LocalPath(local)
    refuse_nameless(text)
    scheme, _, rest = text.partition("://")
    bucket, _, key = rest.partition("/")
    return ObjectPath(f"{scheme}://{bucket}", key.strip("/"))


def open_folder(folder: Location) -> Store:
    """Open the store of the keys below a folder."""
    return Store(str(folder), folder.settings if isinstance(folder, ObjectPath) else None)


def local_path(path: str, flag: str) -> Path:
    """The local path of a user's text, for features that need plain files.

    Raises:
        ConfigError: it names a bucket.
    """
    where = locate(path)
    if isinstance(where, ObjectPath):
        raise ConfigError(
            "this path must be on a local disk", {flag: path}, "name a local path, and copy its content afterwards"
        )
    return where
