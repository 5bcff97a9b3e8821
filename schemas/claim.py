"""A claim: the small file by which a process says that something is its own for now.

It ends when its owner deletes it, when its heartbeat is older than its expiry, or at once when its owner was a process
of this machine and boot that is gone: after `kill -9` nobody waits.
"""

import os
import socket
import time
from pathlib import Path

from pydantic import Field

from schemas.base import Config
from schemas.canonical import from_canonical
from schemas.errors import DamageError
from schemas.storage import Store


class Claim(Config):
    """Who holds something, and until when. `expires` is in seconds since the epoch, by the owner's clock."""

    host: str
    boot: str = Field(description="the kernel's boot id and pid namespace; empty where there are none")
    pid: int
    started: str = Field(description="when the process began, in the kernel's ticks: pids are reused")
    expires: float


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
    if data is None or not is_live(data, store.where(key), time.time()):
        return False
    claim = from_canonical(Claim, data, store.where(key))
    return claim.model_copy(update={"expires": 0.0}) != this_process_claim(0.0)


def is_live(data: bytes, where: str, now: float) -> bool:
    """Whether these bytes are a claim that holds at `now`, in seconds since the epoch.

    Args:
        where: how messages name the object.
    """
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
    """Of this boot and, since containers on one machine may number their processes alike, of this set of processes."""
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
