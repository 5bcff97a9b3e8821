"""A lease: the small file by which a process says that something is its own for now.

It ends when its owner deletes it, when its heartbeat is older than its expiry, or at once when its owner was a process
of this machine and boot that is gone: after `kill -9` nobody waits. One that would hold for longer than any heartbeat
makes it was written by a clock that runs ahead, and counts for nothing.
"""

import os
import socket
import time
from pathlib import Path

from pydantic import Field

from distillcache.schemas.base import Config
from distillcache.schemas.errors import DamageError
from distillcache.schemas.format.canonical import from_canonical
from distillcache.schemas.store.store import Store

AHEAD = 3  # expiries: a lease that ends later than so many from now was written by a clock that runs ahead
EXPIRY_S = 60.0  # of a lease that does not say how long it holds, where nothing else is known


class Lease(Config):
    """The holder of a lease and its expiry. Times are in seconds since the epoch, by the owner's clock."""

    host: str
    boot: str = Field(description="the kernel's boot id and pid namespace; empty where there are none")
    pid: int
    started: str = Field(description="when the process began, in the kernel's ticks: pids are reused")
    expires: float
    since: float | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        description="when it was taken; earlier versions do not say",
    )
    expiry_s: float | None = Field(
        default=None, gt=0, exclude_if=lambda value: value is None, description="how long it holds after a heartbeat"
    )

    @property
    def owner(self) -> tuple[str, str, int, str]:
        """The process."""
        return self.host, self.boot, self.pid, self.started


def this_process_lease(expires: float, since: float | None = None, expiry_s: float | None = None) -> Lease:
    """A lease of this process's."""
    return Lease(
        host=socket.gethostname(),
        boot=_boot_id(),
        pid=os.getpid(),
        started=_process_start(os.getpid()),
        expires=expires,
        since=since,
        expiry_s=expiry_s,
    )


def is_anothers_lease(store: Store, key: str, expiry_s: float = EXPIRY_S) -> bool:
    """Return whether a live process other than this one holds the lease, or held it less than one expiry ago."""
    data = store.read(key)
    lease = None if data is None else live_lease(data, store.where(key), time.time(), expiry_s)
    return lease is not None and lease.owner != this_process_lease(0.0).owner


def is_own_lease(data: bytes, where: str) -> bool:
    """Return whether these bytes are a lease of this process, expired or not."""
    lease = _lease_in(data, where)
    return lease is not None and lease.owner == this_process_lease(0.0).owner


def live_lease(data: bytes, where: str, now: float, expiry_s: float = EXPIRY_S) -> Lease | None:
    """The lease in these bytes, if it holds at `now`, in seconds since the epoch: it has not expired, does not expire
    later than a clock that is right could make it, and its owner is not known to be gone.

    Args:
        where: how messages name the object.
        expiry_s: of a lease that does not say its own.
    """
    lease = _lease_in(data, where)
    if lease is None:
        return None
    longest = AHEAD * max(expiry_s, lease.expiry_s or expiry_s)
    return lease if now < lease.expires <= now + longest and not _owner_is_gone(lease) else None


def _lease_in(data: bytes, where: str) -> Lease | None:
    try:
        return from_canonical(Lease, data, where)
    except DamageError:
        return None  # half-written by a killed process: nobody's


def _owner_is_gone(lease: Lease) -> bool:
    """Return whether the owner ran on this machine, in this boot, and has ended."""
    here = lease.host == socket.gethostname() and lease.boot == _boot_id() != ""
    return here and _process_start(lease.pid) != lease.started


def _boot_id() -> str:
    """Identify this boot and, since containers on one machine may number their processes alike, this process
    namespace.
    """
    path, numbers = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return f"{path.read_text().strip()} {numbers.readlink()}" if path.exists() and numbers.is_symlink() else ""


def _process_start(pid: int) -> str:
    """Field 22 of /proc/<pid>/stat (proc(5)); empty where there is no such process or no /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]
