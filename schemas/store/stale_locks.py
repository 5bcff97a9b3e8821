"""The lock files of TensorStore's file driver: which of them a live writer holds."""

import fcntl
import os
import struct
from pathlib import Path


class held:
    """`with held(path) as descriptor`: the file opened and locked; None where a live process holds it, or where
    this one may not write: nothing can be told then, and a write will say so itself.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._descriptor = path, -1

    def __enter__(self) -> int | None:
        try:
            self._descriptor = os.open(self._path, os.O_RDWR | os.O_NOFOLLOW)
            lock_as_tensorstore(self._descriptor)
            # A writer may have renamed it to its key between the two calls: then this is a committed file.
            if not os.path.samestat(os.fstat(self._descriptor), os.lstat(self._path)):
                return None
        except OSError:  # gone, in use, not to be written, a link, a failing disk, no locks on this file system
            return None
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
