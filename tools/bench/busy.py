"""Another process that keeps one core busy on demand: what trainers' machines are like.

It computes without touching memory, and ends when this process does, however that ends: its input is closed then.
"""

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from distillcache.schemas.runtime.child_python import python_words

SCRIPT = """
import os, sys, threading
going = threading.Event()
def listen():
    for line in sys.stdin:
        going.set() if line == "go\\n" else going.clear()
    os._exit(0)
threading.Thread(target=listen, daemon=True).start()
while True:
    going.wait()
    while going.is_set():
        pass
"""
SETTLE_S = 0.05  # until the scheduler has given it a core


class BusyProcess:
    """`with BusyProcess() as process: ... with process.busy(): measure()`; idle outside of `busy`."""

    def __enter__(self) -> "BusyProcess":
        self._child = subprocess.Popen(python_words("-c", SCRIPT), stdin=subprocess.PIPE, text=True, bufsize=1)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._child.send_signal(signal.SIGKILL)
        self._child.communicate()  # its time counts as this process's own from now on (machine.OtherWork)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """One core is busy inside."""
        self._say("go")
        time.sleep(SETTLE_S)
        try:
            yield
        finally:
            self._say("rest")

    def _say(self, word: str) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write(f"{word}\n")
        self._child.stdin.flush()
