"""Answers of a file system that are no data, and what to do about each.

One list for everything that reads or writes caches and runs, whether through TensorStore, which gives the system's
words alone, or by calls of the system itself.
"""

import os
from collections.abc import Mapping
from errno import EACCES, EIO, EISDIR, ELOOP, ENOSPC, ENOTDIR, EPERM, EROFS, ESTALE

from distillcache.schemas.errors import StorageError
from distillcache.schemas.store.local_path import NOT_REGULAR

_CHECK_DISK = "check the disk or its mount, then run the same command again; if that persists, restore the file"
_THEN = "then run the same command again, which says what is missing"
# What helps whoever wants to read, and whoever wants to write; in this order the system's words are looked for.
_READABLE, _WRITABLE = "make it readable for this user, with its folders", "make it writable, or name another path"
_LOOP = f"delete the link, which leads to itself; {_THEN}"
_FOLDER = f"move the directory away, since a file belongs there; {_THEN}"
_FILE = f"move the file away that is in the place of a directory; {_THEN}"
_REGULAR = f"move it away, since a regular file belongs there; {_THEN}"
_STEPS: Mapping[int, tuple[str, str]] = {
    ENOSPC: (_CHECK_DISK, "free some space, then run the same command again: what is committed stays"),
    EACCES: (_READABLE, _WRITABLE),
    EPERM: (_READABLE, _WRITABLE),
    EROFS: (_CHECK_DISK, _WRITABLE),
    ELOOP: (_LOOP, _LOOP),
    EISDIR: (_FOLDER, _FOLDER),
    ENOTDIR: (_FILE, _FILE),
    ESTALE: (_CHECK_DISK, _CHECK_DISK),
    EIO: (_CHECK_DISK, _CHECK_DISK),
}
_WORDS = {os.strerror(code): steps for code, steps in _STEPS.items()} | {
    "PERMISSION_DENIED": _STEPS[EACCES],
    NOT_REGULAR: (_REGULAR, _REGULAR),
}


def step_for(words: str, *, reads: bool) -> str | None:
    """The next step for an answer that contains a file system's words; None for other answers."""
    found = next((steps for known, steps in _WORDS.items() if known in words), None)
    return None if found is None else found[0 if reads else 1]


def is_in_the_way(words: str) -> bool:
    """Return whether something else is where a file belongs: a link to itself, a directory, a pipe, or a file as
    a parent."""
    return NOT_REGULAR in words or any(os.strerror(code) in words for code in (ELOOP, EISDIR, ENOTDIR))


def unreadable(where: object, error: OSError) -> StorageError:
    """The error of a file that the system does not give."""
    words = error.strerror or str(error)
    step = step_for(words, reads=True) or "check the path, then run the same command again"
    return StorageError("an object cannot be read", {"object": where, "cause": words}, step)
