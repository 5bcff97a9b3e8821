"""SIGTERM and SIGINT as a question that a loop asks between two units of work."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """A flag that is set when the process is asked to stop. A second SIGINT interrupts at once, as everywhere."""

    def __init__(self) -> None:
        self.requested = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


@contextmanager
def watch_for_stop(*, together: bool = False) -> Iterator[StopRequest]:
    """SIGTERM and SIGINT set `.requested` while the context lasts. Outside the main thread nothing is watched.

    A context inside another one yields the outer one's request: what arrives after the inner work's last look at it
    still stops the outer work.

    Args:
        together: several processes are to stop at the same step. SIGTERM is then left to JAX's preemption service,
            which tells all of them, and SIGINT is passed on to it.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    if together:
        interrupt = signal.signal(signal.SIGINT, lambda *_: signal.raise_signal(signal.SIGTERM))
        try:
            yield request
        finally:
            signal.signal(signal.SIGINT, interrupt)
        return
    outer = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    if isinstance(outer, StopRequest):
        yield outer
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, request._on_signal) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
