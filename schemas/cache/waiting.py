"""Saying for whom a process waits: who holds a lease, since when and until when."""

import logging
import time
from datetime import UTC, datetime

from distillcache.schemas.cache.lease_file import Lease

log = logging.getLogger(__name__)

FIRST_S = 5.0  # a healthy neighbour's last work unit ends sooner
AGAIN_S, LONGEST_S = 30.0, 600.0  # then less and less often


class Waiting:
    """One wait; `tell` reports it after a while, and again at growing intervals."""

    def __init__(self, what: str) -> None:
        """
        Args:
            what: the work that is waited for, as in "to finish the cache".
        """
        self._what, self._begun = what, time.monotonic()
        self._next, self._pause = self._begun + FIRST_S, AGAIN_S

    def tell(self, lease: Lease | None) -> None:
        """Say on standard error who holds the lease, if it is time to."""
        now = time.monotonic()
        if lease is None or now < self._next:
            return
        log.info(f"waiting {self._what}: {holder_words(lease)}; waited {now - self._begun:.0f} s so far")
        self._next, self._pause = now + self._pause, min(2 * self._pause, LONGEST_S)

    def over(self) -> None:
        """End the wait, because the awaited event has happened: the next wait starts anew."""
        self._begun = time.monotonic()
        self._next, self._pause = self._begun + FIRST_S, AGAIN_S


def holder_words(lease: Lease) -> str:
    """`process 123 on host holds the lease since 10:00:00 UTC, until 10:01:00 UTC unless renewed`."""
    since = "" if lease.since is None else f" since {_clock(lease.since)},"
    return f"process {lease.pid} on {lease.host} holds the lease{since} until {_clock(lease.expires)} unless renewed"


def _clock(seconds: float) -> str:
    """A time of a lease in words; a foreign file may hold any number."""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (ValueError, OverflowError, OSError):
        return f"{seconds} s after 1970"
