"""Leases on work units: small files, created conditionally, kept alive by a heartbeat.

Of a build, a piece is the consecutive shards of whole teacher batches. Claims save double work; they are not needed for
correctness: two processes that build one piece write the same bytes.

A claim ends when its work is committed, and as every claim does (schemas/cache/lease_file.py). It is written anew only
where it is still there and this process's own: what was taken over or deleted while this process was paused stays so.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from distillcache.schemas.cache.lease_file import Claim, is_own_claim, live_claim, this_process_claim
from distillcache.schemas.format import layout
from distillcache.schemas.format.canonical import to_canonical
from distillcache.schemas.store.store import Store

BEATING = 8  # claims renewed at a time: one answer that comes late must not let the others expire


class Claims:
    """The claims of one process. `close()` stops the heartbeat and gives back what is unfinished."""

    def __init__(
        self, store: Store, segment: str, expiry_s: float, key: Callable[[str, int], str] = layout.claim_key
    ) -> None:
        """
        Args:
            segment: whose pieces they are.
            key: where a piece's claim lies, from the segment and the piece's number.
        """
        self._store, self._expiry_s = store, expiry_s
        self._key = partial(key, segment)
        self._held: dict[int, tuple[float, float]] = {}  # piece -> (since, expires), as last written
        self._others: dict[int, Claim] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._beat, name="claims-heartbeat", daemon=True)
        self._thread.start()

    def take(self, piece: int) -> bool:
        """Try to take the work unit. Returns False if a live process has it."""
        if self._failure is not None:
            raise self._failure
        key = self._key(piece)
        data, generation = self._store.read_with_generation(key, confirm=False)
        if data is not None and self._living(key, data) is None:  # or it came short from a bucket
            data, generation = self._store.read_with_generation(key)
        holder = None if data is None else self._living(key, data)
        if holder is not None:
            self._others[piece] = holder
            return False
        self._others.pop(piece, None)
        claim = self._claim(time.time())
        if not self._store.replace(key, to_canonical(claim), generation):
            return False
        with self._lock:
            self._held[piece] = (claim.since or 0.0, claim.expires)
        return True

    def holder(self) -> Claim | None:
        """The claim on the first piece that `take` last found in another's hands."""
        return self._others[min(self._others)] if self._others else None

    def holds(self, piece: int) -> bool:
        """Return whether this process still holds the work unit: nobody takes over a lease before it expires."""
        with self._lock:
            held = self._held.get(piece)
        if held is None:
            return False
        if time.time() < held[1]:
            return True
        data = self._store.read(self._key(piece))
        if data is not None and is_own_claim(data, self._store.where(self._key(piece))):
            return True
        with self._lock:
            self._held.pop(piece, None)
        return False

    @property
    def failure(self) -> Exception | None:
        """The error that stopped the heartbeat, if any."""
        return self._failure

    def done(self, piece: int) -> None:
        """The piece's shards are committed: its receipts speak for it from now on."""
        with self._lock:
            self._held.pop(piece, None)

    def close(self) -> None:
        """Stop the heartbeat and release unfinished pieces, so that others need not wait for the expiry."""
        self._stop.set()
        self._thread.join()
        for piece in sorted(self._held):
            if self.holds(piece):
                self._store.delete(self._key(piece))
        self._held.clear()

    def _living(self, key: str, data: bytes) -> Claim | None:
        return live_claim(data, self._store.where(key), time.time(), self._expiry_s)

    def _claim(self, since: float) -> Claim:
        return this_process_claim(time.time() + self._expiry_s, since, self._expiry_s)

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

    def _renew(self, piece: int) -> None:
        with self._lock:
            held = self._held.get(piece)
        if held is None or self._stop.is_set():
            return
        key = self._key(piece)
        data, generation = self._store.read_with_generation(key)
        ours = data is not None and is_own_claim(data, self._store.where(key))
        claim = self._claim(held[0])
        renewed = ours and self._store.replace(key, to_canonical(claim), generation)
        with self._lock:
            if piece in self._held and not ours:
                del self._held[piece]
            elif piece in self._held and renewed:
                self._held[piece] = (held[0], claim.expires)
