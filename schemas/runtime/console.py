"""The log of a command line on standard error.

Library code prints nothing: it logs below `distillcache`, which is silent unless a program says otherwise. A command
line shows these records, as plain lines, and the bars of progress.py where standard error is a terminal.
"""

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import TextIO

ROOT = logging.getLogger("distillcache")


class _Console(logging.Handler):
    """Write each record as a line to what is standard error at that moment; a failure to write is the caller's."""

    def emit(self, record: logging.LogRecord) -> None:
        warning = "warning: " if record.levelno == logging.WARNING else ""
        sys.stderr.write(f"{warning}{self.format(record)}\n")
        sys.stderr.flush()


@contextlib.contextmanager
def shown_log() -> Iterator[None]:
    """Show the log on standard error, and only there, for as long as a command runs."""
    if any(isinstance(handler, _Console) for handler in ROOT.handlers):  # one command may run another
        yield
        return
    handler, before = _Console(), (ROOT.level, ROOT.propagate)
    ROOT.addHandler(handler)
    ROOT.setLevel(logging.INFO)
    ROOT.propagate = False
    try:
        yield
    finally:
        ROOT.removeHandler(handler)
        ROOT.setLevel(before[0])
        ROOT.propagate = before[1]


def last_words(text: object) -> None:
    """Log what ends this process, which nobody could catch; on standard error where no program receives the log."""
    if any(not isinstance(handler, logging.NullHandler) for handler in [*ROOT.handlers, *logging.getLogger().handlers]):
        ROOT.critical(text)
    else:
        sys.stderr.write(f"{text}\n")


def terminal() -> TextIO | None:
    """Return the terminal on which the log is shown, for what is redrawn there; None where there is none."""
    shown = any(isinstance(handler, _Console) for handler in ROOT.handlers)
    return sys.stderr if shown and sys.stderr.isatty() else None
