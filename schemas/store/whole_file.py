"""Files and folders of a user that are written whole or not at all: a kill or a full disk leaves what was there."""

import contextlib
import logging
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from distillcache.schemas.errors import ConfigError, StorageError
from distillcache.schemas.store.path import Location, ObjectPath, locate

log = logging.getLogger(__name__)

END_BYTES = 1 << 16  # of a file that is there, looked at to see who made it
NEW_FILE_MODE = 0o666  # less the umask, as `open` makes files


def write_file(path: str | os.PathLike[str] | Location, data: bytes, *, says: bool = False) -> None:
    """Store a file on a disk or in a bucket, in place of one of that name. See `writing` and `make_folder_of`.

    Args:
        says: log that a file was replaced, once it was.

    Raises:
        StorageError: the place refuses; what was there before is unchanged.
    """
    where = locate(path)
    if isinstance(where, ObjectPath):
        there = says and where.exists()
        where.write_bytes(data)
        if there:
            _say_replaced(where)
        return
    make_folder_of(where)
    with writing(where, says=says) as stream:
        stream.write(data)


def refuse_foreign_file(path: str | os.PathLike[str] | Location, flag: str, *marks: bytes | tuple[bytes, ...]) -> None:
    """Raise unless the file that a command is about to write is new, or one that it wrote before.

    Whoever writes it says afterwards that it was replaced (`says`): until then the command may fail.

    Args:
        flag: the setting that names the path, for the message.
        marks: each file of the command has one of these near its beginning or its end; of a tuple, all parts. A name
            that users write too, such as the program's, is no mark: their text would be lost.

    Raises:
        ConfigError: another file is there, which would be lost, or no file can be written there.
    """
    where = locate(path)
    if not isinstance(where, ObjectPath):
        _refuse_impossible_place(where, flag)
    found = _ends(where)
    if not found:
        return
    if any(all(any(part in end for end in found) for part in _parts(mark)) for mark in marks):
        return
    raise ConfigError(
        "the file to write is there already, and this command did not make it",
        {flag: where},
        "name another file, or remove this one",
    )


def _parts(mark: bytes | tuple[bytes, ...]) -> tuple[bytes, ...]:
    return (mark,) if isinstance(mark, bytes) else mark


def _refuse_impossible_place(path: Path, flag: str) -> None:
    """Raise where a folder is in the file's place, or its own folder is not writable and cannot be made."""
    folder = next((each for each in path.absolute().parents if os.path.lexists(each)), Path("/"))
    facts = {flag: path}
    if path.is_dir():
        raise ConfigError("a folder is where the file is to be written", facts, "name a file")
    if not folder.is_dir():
        raise ConfigError("a file is where the folder of the file to write would be", {**facts, "file": folder})
    if not path.exists() and not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(
            "no file can be written there", {**facts, "folder": folder, "found": "it is read-only"}, "name another file"
        )


def make_folder_of(path: str | os.PathLike[str] | Location) -> None:
    """Make the folder of a local file that is to be written, where it is missing, and say so."""
    where = locate(path)
    if isinstance(where, ObjectPath) or where.parent.exists():
        return
    with refusals(where):
        where.parent.mkdir(parents=True, exist_ok=True)
    log.info(f"made the folder {where.parent}")


def _ends(where: Location) -> tuple[bytes, ...]:
    """The first and the last bytes of a file; nothing where none is there, or an empty one, a device or a pipe."""
    if isinstance(where, ObjectPath):
        if not where.exists():
            return ()
        value = where.read_bytes()  # whole: nothing tells a bucket's object's length, and reports are small
        return (value[:END_BYTES], value[-END_BYTES:]) if value else ()
    if not where.is_file() or not where.stat().st_size:
        return ()
    with refusals(where, "the file cannot be replaced"), where.open("rb") as stream:
        first = stream.read(END_BYTES)
        stream.seek(max(where.stat().st_size - END_BYTES, 0))
        return first, stream.read(END_BYTES)


def _say_replaced(where: Location) -> None:
    log.info(f"replaced {where}, which an earlier command wrote")


@contextlib.contextmanager
def writing(path: Path, *, says: bool = False) -> Iterator[BinaryIO]:
    """Give a stream to a new file, which replaces the one at the path once the block has ended without an error.

    It is written beside its place, synced, and renamed. A link stays one, and its target is replaced; a device or a
    pipe cannot be replaced and is written to.

    Args:
        says: log that a file was replaced, once it was.

    Raises:
        StorageError: the disk refuses; what was there before is unchanged.
    """
    target = Path(os.path.realpath(path))
    with refusals(path):
        replaces = says and target.is_file() and target.stat().st_size > 0
        mode = os.stat(target).st_mode if target.exists() else None
        if mode is not None and not stat.S_ISREG(mode):
            with target.open("wb") as stream:
                yield stream
            return
        if mode is not None and not os.access(target, os.W_OK):
            raise PermissionError(f"{target} is read-only")  # a rename would not mind
        fresh = target.parent / f".{target.name[:200]}.{uuid.uuid4().hex[:8]}.new"
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, NEW_FILE_MODE)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                yield stream
                stream.flush()
                if mode is not None:
                    os.fchmod(descriptor, stat.S_IMODE(mode))
                os.fsync(descriptor)
            os.replace(fresh, target)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise
        sync_folder(target.parent)
    if replaces:
        _say_replaced(path)


@contextlib.contextmanager
def refusals(path: Path, what: str = "the file cannot be written") -> Iterator[None]:
    """Turn the errors of a disk into one `StorageError`."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            what,
            {"file": path, "cause": error.strerror or error},
            "make room there, make it writable, or name another path; what was there before is unchanged",
        ) from error


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, as far as its file system can."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # some network file systems refuse; the files themselves are synced
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make every file below a folder durable, and their names."""
    for parent, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(os.path.join(parent, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(Path(parent))


@contextlib.contextmanager
def staged_folder(target: Path, what: str = "the folder cannot be written") -> Iterator[Path]:
    """Give a new folder beside the target, which takes its place, synced, once the block has ended without an error.

    Raises:
        StorageError: the disk refuses; what was there before is unchanged.
    """
    target = Path(os.path.realpath(target))
    fresh = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    try:
        with refusals(target, what):
            fresh.mkdir(parents=True)
            yield fresh
            sync_tree(fresh)
            _publish(fresh, target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _publish(fresh: Path, target: Path) -> None:
    """Rename into place. What was there steps aside first: a folder cannot be replaced by one rename."""
    aside = None
    if target.exists() and any(target.iterdir()):
        aside = fresh.with_name(f"{fresh.name}.old")
        os.rename(target, aside)
    try:
        os.rename(fresh, target)
    except BaseException:
        if aside is not None:
            os.rename(aside, target)
        raise
    sync_folder(target.parent)
    if aside is not None:
        shutil.rmtree(aside)
