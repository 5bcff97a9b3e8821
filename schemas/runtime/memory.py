"""Peak anonymous memory of this process, without mapped pages of files."""

import os
import resource
import sys
import threading
from types import TracebackType

INTERVAL_S = 0.2


class PeakMemory:
    """`with PeakMemory() as peak: ...; peak.gigabytes`: the highest anonymous resident size that was seen.

    Reads RssAnon from /proc (proc(5)). Where there is no /proc, the peak of the whole resident size stands in for it.
    """

    def __init__(self) -> None:
        self._peak_kib = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def gigabytes(self) -> float:
        self._peak_kib = max(self._peak_kib, anonymous_kib())
        return self._peak_kib * 1024 / 1e9

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL_S):
            self._peak_kib = max(self._peak_kib, anonymous_kib())


def anonymous_kib() -> int:
    """Return this process's present anonymous memory in KiB."""
    if not os.path.exists("/proc/self/status"):
        unit = 1024 if sys.platform == "darwin" else 1  # macOS counts bytes, the others KiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))
