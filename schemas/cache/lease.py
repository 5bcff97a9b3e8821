"""Leases on work units: small files, created conditionally, kept alive by a heartbeat.

In a build, a work unit is the consecutive shards of whole teacher batches. Leases avoid double work; correctness does
not need them, because two processes that build one work unit write the same bytes.

A lease ends when its work is committed, or as every lease does (schemas/cache/lease_file.py). The heartbeat renews a
lease only if it still exists and belongs to this process: a lease that was taken over or deleted while the process was
paused stays lost.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from distillcache.schemas.cache.lease_file import Lease, is_own_lease, live_lease, this_process_lease
from distillcache.schemas.format import layout
from distillcache.schemas.format.canonical import to_canonical
from distillcache.schemas.store.store import Store

BEATING = 8  # leases renewed at a time: one answer that comes late must not let the others expire


class Leases:
    """The leases of one process. `close()` stops the heartbeat and gives back what is unfinished."""

    def __init__(
        self, store: Store, segment: str, expiry_s: float, key: Callable[[str, int], str] = layout.lease_key
    ) -> None:
        """
        Args:
            segment: whose work units they are.
            key: where a work unit's lease lies, from the segment and the work unit's number.
        """
        self._store, self._expiry_s = store, expiry_s
        self._key = partial(key, segment)
        self._held: dict[int, tuple[float, float]] = {}  # work unit -> (since, expires), as last written
        self._others: dict[int, Lease] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._beat, name="leases-heartbeat", daemon=True)
        self._thread.start()

    def take(self, unit: int) -> bool:
        """Try to take the work unit. Returns False if a live process has it, or another one was faster."""
        if self._failure is not None:
            raise self._failure
        key = self._key(unit)
        data, generation = self._store.read_with_generation(key, confirm=False)
        if data is not None and self._living(key, data) is None:  # or it came short from a bucket
            data, generation = self._store.read_with_generation(key)
        holder = None if data is None else self._living(key, data)
        if holder is not None:
            self._others[unit] = holder
            return False
        self._others.pop(unit, None)
        lease = self._lease(time.time())
        if not self._store.replace(key, to_canonical(lease), generation):
            return False
        with self._lock:
            self._held[unit] = (lease.since or 0.0, lease.expires)
        return True

    def holder(self) -> Lease | None:
        """The lease on the first work unit that `take` last found in another's hands."""
        return self._others[min(self._others)] if self._others else None

    def holds(self, unit: int) -> bool:
        """Return whether this process still holds the work unit: no process takes over a lease before it expires."""
        with self._lock:
            held = self._held.get(unit)
        if held is None:
            return False
        if time.time() < held[1]:
            return True
        data = self._store.read(self._key(unit))
        if data is not None and is_own_lease(data, self._store.where(self._key(unit))):
            return True
        with self._lock:
            self._held.pop(unit, None)
        return False

    @property
    def failure(self) -> Exception | None:
        """The error that stopped the heartbeat, if any."""
        return self._failure

    def done(self, unit: int) -> None:
        """The work unit's shards are committed: its receipts speak for it from now on."""
        with self._lock:
            self._held.pop(unit, None)

    def close(self) -> None:
        """Stop the heartbeat and release unfinished work units, so that others need not wait for the expiry."""
        self._stop.set()
        self._thread.join()
        for unit in sorted(self._held):
            if self.holds(unit):
                self._store.delete(self._key(unit))
        self._held.clear()

    def _living(self, key: str, data: bytes) -> Lease | None:
        return live_lease(data, self._store.where(key), time.time(), self._expiry_s)

    def _lease(self, since: float) -> Lease:
        return this_process_lease(time.time() + self._expiry_s, since, self._expiry_s)

    def _beat(self) -> None:
        with ThreadPoolExecutor(BEATING, thread_name_prefix="claims") as pool:
            while not self._stop.wait(self._expiry_s / 4):
                with self._lock:
                    held = sorted(self._held)
                try:
                    list(pool.map(self._renew, held))
                except Exception as error:  # re-raised by the owner's next take()
                    self._failure = error
                    return

    def _renew(self, unit: int) -> None:
        with self._lock:
            held = self._held.get(unit)
        if held is None or self._stop.is_set():
            return
        key = self._key(unit)
        data, generation = self._store.read_with_generation(key)
        ours = data is not None and is_own_lease(data, self._store.where(key))
        lease = self._lease(held[0])
        renewed = ours and self._store.replace(key, to_canonical(lease), generation)
        with self._lock:
            if unit in self._held and not ours:
                del self._held[unit]
            elif unit in self._held and renewed:
                self._held[unit] = (held[0], lease.expires)
