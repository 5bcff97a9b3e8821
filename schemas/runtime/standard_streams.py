"""Standard output and standard error of a command, where either may be closed, full, or without a reader."""

import io
import os
import sys
from typing import Any

from distillcache.schemas.errors import StorageError

_OUTPUT, _ERROR = 1, 2
_NEXT = "free some space there or send it elsewhere, then run the same command again: what a build or a run wrote stays"


def guard_standard_streams() -> None:
    """Make writes to standard error always succeed, and a failed write to standard output an error of ours.

    Progress and warnings are for people: work does not end because a log's disk is full (ENOSPC), a terminal is gone
    (EIO), or nobody reads any more (EPIPE). Standard output is the command's answer, which may not be lost silently.
    """
    sys.stderr = _rebuilt(sys.stderr, _LossyFile, _ERROR)
    sys.stdout = _rebuilt(sys.stdout, _AnswerFile, _OUTPUT)


def replace_closed_streams() -> None:
    """Open the null device for each standard stream that the caller closed (`>&-`).

    Python has None for such a stream, on which nothing can be printed; and the next file opened would get its number,
    and with it all that a C++ library prints.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for as long as the process lives


def drop(number: int) -> None:
    """Send what follows on this standard stream to the null device; Python writes once more when it ends."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, number)
    os.close(null)


class _LossyFile(io.FileIO):
    """A descriptor that loses what it cannot write. The next write tries again: a disk may get space back."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or len(data)
        except OSError:
            return len(data)


class _AnswerFile(io.FileIO):
    """A descriptor whose failed writes are `StorageError`; a reader who has gone stays `BrokenPipeError`."""

    def write(self, data: Any, /) -> int | None:
        try:
            return super().write(data)
        except BrokenPipeError:
            raise
        except OSError as error:
            drop(self.fileno())
            raise StorageError("standard output cannot be written", {"cause": error}, _NEXT) from None


def _rebuilt(stream: Any, raw: type[io.FileIO], number: int) -> Any:
    """The text stream again, over this kind of descriptor; any other stream (a test's, a notebook's) as it is."""
    try:
        if not isinstance(stream, io.TextIOWrapper) or stream.fileno() != number:
            return stream
    except OSError:
        return stream
    stream.flush()
    file = raw(number, "w", closefd=False)
    lines = number == _ERROR or stream.isatty()
    # what the stream's encoding lacks (PYTHONIOENCODING=ascii) is written as an escape
    errors = "backslashreplace" if stream.errors == "strict" else stream.errors
    return io.TextIOWrapper(io.BufferedWriter(file), encoding=stream.encoding, errors=errors, line_buffering=lines)
