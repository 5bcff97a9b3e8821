"""Input files: what `data.path` names, on disks and in buckets, and their bytes with their digest.

Files come in the order in which `data.path` lists them, and sorted by path within a folder or a glob, so that the
order does not depend on where they lie; a file that is named twice is read once. The *kind* of a file says how it is
read: by its suffix, or by `data.format` where that is stated.
"""

import functools
import glob
import io
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import xxhash

from distillcache.cache_builder.text.files.buckets import check_unchanged, fits, open_remote, remote_objects
from distillcache.cache_builder.text.files.marks import MARK_BYTES, refuse_other_kind
from distillcache.schemas.config import DataConfig
from distillcache.schemas.errors import DistillcacheError, InputError, StorageError
from distillcache.schemas.store.store import is_url

SUFFIXES = (".txt", ".jsonl", ".txt.gz", ".jsonl.gz", ".parquet", ".array_record")
READ_BYTES = 1 << 20

Found = TypeVar("Found")

_SUFFIX = re.compile(r"(\.txt|\.jsonl)(\.gz)?$|(\.parquet)$|\.array_?record(-\d+-of-\d+)?$")
_KINDS_OF_MODE = {
    stat.S_IFIFO: "a pipe (FIFO)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_ALIASES = {"gcs://": "gs://", "s3a://": "s3://"}  # as other programs spell them
_KIND_OF_FORMAT = {"text": ".txt", "jsonl": ".jsonl", "chat": ".jsonl", "parquet": ".parquet"}


@dataclass(frozen=True)
class InputFile:
    """A file to read.

    place: a local path, or a URL.
    size: bytes as stored; of one of many objects in a bucket perhaps their average.
    kind: one of SUFFIXES: how it is read.
    version: of an object in a bucket, the store's own mark of these bytes; empty for local files.
    """

    place: Path | str
    size: int
    kind: str
    version: str = ""

    def __str__(self) -> str:
        return str(self.place)


def input_files(data: DataConfig) -> list[InputFile]:
    """The files that `data.path` names, in reading order.

    Raises:
        InputError: a path that does not exist or cannot be listed, is no file of text, or holds none.
    """
    paths = [data.path] if isinstance(data.path, str) else data.path
    files: dict[str, InputFile] = {}
    for path in paths:
        for file in _remote_files(path, data.format) if is_url(path) else _local_files(path, data.format):
            identity = os.path.realpath(file.place) if isinstance(file.place, Path) else file.place
            files.setdefault(identity, file)
    if not files:
        raise InputError("data.path names no text", {"found": paths}, "name a file, a folder or a glob")
    return list(files.values())


class InputReader(io.RawIOBase):
    """The bytes of an input file front to back, which are counted and digested as they pass."""

    def __init__(self, file: InputFile) -> None:
        super().__init__()
        self._file, self._hash, self.consumed = file, xxhash.xxh3_128(), 0
        self._raw = _open_local(file) if isinstance(file.place, Path) else open_remote(file.place, file.version)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        count = self._raw.readinto(buffer) or 0
        if not self.consumed:
            refuse_other_kind(self._file.kind, bytes(buffer[: min(count, MARK_BYTES)]), self._file)
        self._hash.update(buffer[:count])
        self.consumed += count
        return count

    def finish(self) -> str:
        """Read the remaining bytes, and return the file's line in the digest of all: kind, length and digest, no name.

        Raises:
            InputError: it cannot be read, or it is not the file any more that was listed.
        """
        try:
            while self.read(READ_BYTES):
                pass
        except OSError as error:
            raise unreadable(self._file, error) from error
        if isinstance(self._file.place, str):
            check_unchanged(self._file.place, self._file.version)
        elif self.consumed != self._file.size:
            raise InputError(
                "an input file changed while it was read",
                {"file": self._file.place, "bytes then": self._file.size, "bytes now": self.consumed},
                "run the same command again when nothing writes there any more",
            )
        return f"{self._file.kind} {self.consumed} {self._hash.hexdigest()}\n"

    def close(self) -> None:
        if not self.closed:
            self._raw.close()
        super().close()


@contextmanager
def on_disk(file: InputFile, reader: InputReader) -> Iterator[Path]:
    """A local path with the file's bytes, for formats that are not read front to back; read through the reader once.

    A remote file passes through the temporary folder, and needs its size there.
    """
    if isinstance(file.place, Path):
        reader.finish()
        yield file.place
        return
    try:
        with tempfile.NamedTemporaryFile(prefix="distillcache-", suffix=file.kind) as copy:
            shutil.copyfileobj(reader, copy, READ_BYTES)
            copy.flush()
            yield Path(copy.name)
    except OSError as error:
        raise StorageError(
            "an input file cannot pass through the temporary folder",
            {"file": file.place, "bytes": file.size, "folder": tempfile.gettempdir(), "cause": error},
            "free some space there, or set TMPDIR to another folder",
        ) from error


def _local_files(path: str, format: str) -> list[InputFile]:
    """The input files that one local entry of `data.path` names, sorted."""
    path = os.path.expanduser(path.removeprefix("file://"))
    if os.path.isfile(path):
        return [_local_file(Path(path), _kind_of_named(path, format))]
    # A name that exists is taken as it is, brackets and all; only then it may be a pattern.
    matches = {Path(path): False} if os.path.isdir(path) else _matching(path)
    kinds: dict[Path, str] = {}
    for match, named in matches.items():
        if match.is_dir():
            kinds = {file: _kind(file.name, format) for file in _walk(match)} | kinds
        else:
            kinds[match] = _kind(match.name, format, named=named)
    texts = sorted(file for file, kind in kinds.items() if kind)
    _refuse_none(texts, path, f"{len(kinds)} other files" if matches else "no such file or folder")
    return [_local_file(file, kinds[file]) for file in texts]


def _local_file(file: Path, kind: str) -> InputFile:
    try:
        facts = file.stat()
    except OSError as error:  # a link to nowhere
        raise unreadable(InputFile(file, 0, kind), error) from error
    if not stat.S_ISREG(facts.st_mode):  # a pipe would wait for ever, a device may have no end
        raise InputError(
            "an input is no regular file",
            {"file": file, "found": _KINDS_OF_MODE.get(stat.S_IFMT(facts.st_mode), "something else")},
            "write its text into a file (it is read more than once), or leave it out",
        )
    return InputFile(file, facts.st_size, kind)


def _remote_files(url: str, format: str) -> list[InputFile]:
    """The same for a URL; in the order in which the same files would come from a disk."""
    for alias, scheme in _ALIASES.items():
        url = scheme + url.removeprefix(alias) if url.startswith(alias) else url
    found = remote_objects(url)
    if [each.url for each in found] == [url.rstrip("/")]:
        return [InputFile(url, found[0].size, _kind_of_named(url, format), found[0].version)]
    files = [InputFile(each.url, each.size, _kind(each.url, format, named=each.named), each.version) for each in found]
    texts = [file for file in files if file.kind]
    _refuse_none(texts, url, f"{len(found)} other files" if found else "nothing there, or no such bucket")
    return texts


def _open_local(file: InputFile) -> io.RawIOBase:
    try:
        return io.FileIO(file.place)
    except OSError as error:
        raise unreadable(file, error) from error


def _refuse_none(texts: list, path: str, found: str) -> None:
    if not texts:
        raise InputError(
            "data.path names no text file",
            {"data.path": path, "found": found, "expected": " ".join(SUFFIXES)},
            "name a file, a folder or a glob that holds text",
        )


def _walk(folder: Path, *, hidden: bool = False) -> Iterator[Path]:
    """The files below a folder, links to folders followed, each folder once, so that links in circles end.

    Names are sorted, so that of several links to a folder always the same one counts.

    Args:
        hidden: hidden files and folders as well; else they are left out, as a glob does.
    """
    seen = {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, onerror=_raise_unreadable, followlinks=True):
        kept = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(parent, name))
            if real not in seen and (hidden or not name.startswith(".")):
                seen.add(real)
                kept.append(name)
        folders[:] = kept
        yield from (Path(parent, name) for name in sorted(names) if hidden or not name.startswith("."))


def _matching(pattern: str) -> dict[Path, bool]:
    """List the matches of a pattern, and whether it names the file itself rather than a folder above it.

    `**` is our own: Python's goes round in links to folders above, 40 times for one link, for ever for several.
    """
    parts = Path(pattern).parts
    if "**" not in parts:
        return {Path(match): True for match in glob.glob(pattern)}
    first = parts.index("**")
    rest, found = parts[first:], {}
    hidden = any(part.startswith(".") for part in rest)
    for base in glob.glob(str(Path(*parts[:first]))):
        for file in _walk(Path(base), hidden=hidden):
            names = file.relative_to(base).parts
            if fits(names, rest):
                found[file] = True
            elif any(fits(names[:size], rest) for size in range(1, len(names))):
                found[file] = False
    return found


def named_kind(name: str) -> str:
    """The kind of a file by its name; empty if the name has none."""
    return _kind(name, "auto")


def _kind(name: str, format: str, *, named: bool = False) -> str:
    """Return how a file is read; empty if it is not.

    Args:
        named: the user named this very file or a pattern of such: with a stated format, its suffix does not matter.
    """
    match = _SUFFIX.search(name.lower())
    own = "" if match is None else match[0] if match[1] or match[3] else ".array_record"
    if format == "auto" or (format == "chat" and own == ".parquet"):
        return own
    stated = _KIND_OF_FORMAT.get(format, ".array_record")
    packed = ".gz" if name.lower().endswith(".gz") and stated in (".txt", ".jsonl") else ""
    return stated + packed if named or own.removesuffix(".gz") == stated else ""


def _kind_of_named(path: str, format: str) -> str:
    kind = _kind(path, format, named=True)
    if not kind:
        raise InputError(
            "not a text file",
            {"file": path, "expected": " ".join(SUFFIXES)},
            "rename or convert it, or say what it is with data.format",
        )
    return kind


def unreadable(file: InputFile, error: Exception) -> InputError:
    """The error for a file that is there and cannot be read."""
    return InputError(
        "a text file cannot be read", {"file": file.place, "cause": error}, "replace the file, or leave it out"
    )


def content_mark(file: InputFile) -> str:
    """Tell a file's bytes from others of that length, wherever it lies: by the store's mark, or by their digest.

    All of a local file is read, which takes a hundredth of the time in which it is tokenised. A process reads it again
    only after it was changed.

    Raises:
        InputError: it cannot be read.
    """
    if file.version or not isinstance(file.place, Path):
        return file.version
    try:
        found = file.place.stat()
        return _digest_of(file.place, found.st_size, found.st_mtime_ns, found.st_ino)
    except OSError as error:
        raise unreadable(file, error) from error


@functools.lru_cache(maxsize=1 << 16)
def _digest_of(path: Path, size: int, mtime_ns: int, inode: int) -> str:
    """`content_mark` of a local file of this state."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as stream:
        while chunk := stream.read(READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def foreign(file: InputFile, found: Iterator[Found]) -> Iterator[Found]:
    """Yield a library's results for a file's bytes; whatever it raises becomes the error for such a file."""
    while True:
        try:
            chunk = next(found)
        except StopIteration:
            return
        except DistillcacheError:
            raise
        except Exception as error:  # libraries raise what they like: KeyError, MemoryError, their own
            raise unreadable(file, error) from error
        yield chunk


def _raise_unreadable(error: OSError) -> None:
    raise unreadable(InputFile(Path(error.filename), 0, ""), error)
