"""Local paths that open regular files only.

Opening a named pipe waits for its other end, and a device may have no end: a command that reads one hangs.
"""

import errno
import os
import stat
from pathlib import Path
from typing import Any

NOT_REGULAR = "not a regular file"
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def refuse_irregular(path: str | os.PathLike[str], *, folders: bool = False) -> None:
    """Raise `OSError` where a pipe, a socket or a device is; nothing happens where nothing is.

    Args:
        folders: raise where a folder is, too.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):  # whoever opens it finds out
        return
    kind = _KINDS.get(stat.S_IFMT(mode))
    if folders and stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    if kind is not None:
        raise OSError(errno.EINVAL, f"{kind}, {NOT_REGULAR}", os.fspath(path))


class LocalPath(type(Path())):
    """A path whose `open`, `read_bytes` and `read_text` refuse what is no regular file; so do paths made from it."""

    def open(self, *args: Any, **kwargs: Any) -> Any:
        """`Path.open`.

        Raises:
            OSError: as it does, and for a pipe, a socket or a device.
        """
        refuse_irregular(self)
        return super().open(*args, **kwargs)
