"""Lines that libraries of C++ and Rust write to standard error by themselves."""

import contextlib
import os
import re
import tempfile
import threading
from collections.abc import Iterator

STANDARD_ERROR = 2
_LOG_LINE = re.compile(rb"^[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ +\d+ .*\n?", re.MULTILINE)  # as Abseil writes them
_quiet = threading.RLock()  # standard error is the process's


@contextlib.contextmanager
def without_library_log() -> Iterator[None]:
    """Leave out the lines that C++ libraries log to standard error meanwhile, and what Rust writes about a panic that
    ends the block: what is wrong is in the error, and anonymous access, which Google's client complains about, is
    nothing wrong.

    Whatever else is written there meanwhile follows at the end.
    """
    with _quiet, contextlib.ExitStack() as stack:
        try:
            saved = os.dup(STANDARD_ERROR)
            stack.callback(os.close, saved)
            kept = stack.enter_context(tempfile.TemporaryFile())
        except OSError:  # this process has no standard error, or no folder for temporary files
            yield
            return
        os.dup2(kept.fileno(), STANDARD_ERROR)
        lines = [_LOG_LINE]
        try:
            yield
        except BaseException as error:
            if is_panic(error):
                lines.append(_panic_lines(str(error)))
            raise
        finally:
            os.dup2(saved, STANDARD_ERROR)
            kept.seek(0)
            text = kept.read()
            for each in lines:
                text = each.sub(b"", text)
            with contextlib.suppress(OSError):  # nobody reads it, or its disk is full: what libraries say is no answer
                os.write(STANDARD_ERROR, text)


def is_panic(error: BaseException) -> bool:
    """Return whether an error is what pyo3 makes of a panic of Rust code, which is no `Exception`."""
    return type(error).__name__ == "PanicException"


def _panic_lines(message: str) -> re.Pattern[bytes]:
    """The lines of a panic: where, its message, the stack if the environment asks for one, and a note about that."""
    return re.compile(
        rb"^\n?thread '[^\n]*panicked at [^\n]*\n(?:" + re.escape(message.encode()) + rb"|[^\n]*)\n"
        rb"(?:stack backtrace:\n(?: +[^\n]*\n)*)?(?:note: [^\n]*RUST_BACKTRACE[^\n]*\n)?",
        re.MULTILINE,
    )
