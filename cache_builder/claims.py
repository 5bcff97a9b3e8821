"""Who builds which piece: small files, created conditionally, kept alive by a heartbeat.

A piece is the consecutive shards of whole teacher batches. Claims save double work; they are not needed for
correctness: two processes that build one piece write the same bytes.

A claim ends when its work is committed, when its owner releases it, when its heartbeat is older than the expiry, or
at once when its owner was a process of this machine and boot that is gone: after `kill -9` nobody waits.
"""

import os
import socket
import threading
import time
from pathlib import Path

from pydantic import Field

from schemas import layout
from schemas.canonical import from_canonical, to_canonical
from schemas.config import Config
from schemas.errors import DamageError
from schemas.storage import Store


class Claim(Config):
    """One piece's claim. `expires` is in seconds since the epoch, by the owner's clock."""

    host: str
    boot: str = Field(description="the kernel's boot id; empty where there is none")
    pid: int
    started: str = Field(description="when the process began, in the kernel's ticks: pids are reused")
    expires: float


class Claims:
    """The claims of one process. `close()` stops the heartbeat and gives back what is unfinished."""

    def __init__(self, store: Store, segment: str, expiry_s: float) -> None:
        self._store, self._segment, self._expiry_s = store, segment, expiry_s
        self._held: set[int] = set()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._beat, name="claims-heartbeat", daemon=True)
        self._thread.start()

    def take(self, piece: int) -> bool:
        """Whether the piece is ours now; False where a live process has it."""
        if self._failure is not None:
            raise self._failure
        key = layout.claim_key(self._segment, piece)
        data, generation = self._store.read_with_generation(key)
        if data is not None and _is_live(data, self._store.where(key), time.time()):
            return False
        if not self._store.replace(key, to_canonical(self._claim()), generation):
            return False
        with self._lock:
            self._held.add(piece)
        return True

    def done(self, piece: int) -> None:
        """The piece's shards are committed: its receipts speak for it from now on."""
        with self._lock:
            self._held.discard(piece)

    def close(self) -> None:
        """Stop the heartbeat and release unfinished pieces, so that others need not wait for the expiry."""
        self._stop.set()
        self._thread.join()
        for piece in sorted(self._held):
            self._store.delete(layout.claim_key(self._segment, piece))
        self._held.clear()

    def _claim(self) -> Claim:
        return this_process_claim(time.time() + self._expiry_s)

    def _beat(self) -> None:
        while not self._stop.wait(self._expiry_s / 4):
            with self._lock:  # a claim must not come back after done()
                try:
                    for piece in sorted(self._held):
                        self._store.write(layout.claim_key(self._segment, piece), to_canonical(self._claim()))
                except Exception as error:  # re-raised by the owner's next take()
                    self._failure = error
                    return


def this_process_claim(expires: float) -> Claim:
    """A claim of this process's."""
    return Claim(
        host=socket.gethostname(),
        boot=_boot_id(),
        pid=os.getpid(),
        started=_process_start(os.getpid()),
        expires=expires,
    )


def is_anothers_claim(store: Store, key: str) -> bool:
    """Whether a live process other than this one holds the claim, or held it until less than the expiry ago."""
    data = store.read(key)
    if data is None or not _is_live(data, store.where(key), time.time()):
        return False
    claim = from_canonical(Claim, data, store.where(key))
    return claim.model_copy(update={"expires": 0.0}) != this_process_claim(0.0)


def _is_live(data: bytes, where: str, now: float) -> bool:
    try:
        claim = from_canonical(Claim, data, where)
    except DamageError:
        return False  # half-written by a killed process: nobody's
    return now < claim.expires and not _owner_is_gone(claim)


def _owner_is_gone(claim: Claim) -> bool:
    """Whether the owner ran on this machine, in this boot, and runs no more."""
    here = claim.host == socket.gethostname() and claim.boot == _boot_id() != ""
    return here and _process_start(claim.pid) != claim.started


def _boot_id() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else ""


def _process_start(pid: int) -> str:
    """Field 22 of /proc/<pid>/stat (proc(5)); empty where there is no such process or no /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]
