"""Advice for a cache that is not finished: who works on it now, and which command goes on with it."""

import time
from pathlib import Path

from distillcache.schemas.cache.lease_file import Lease, live_lease
from distillcache.schemas.format.layout import DEMO_MARKER, segment_prefix
from distillcache.schemas.format.manifest import Plan
from distillcache.schemas.store.store import Store

MOST_READ = 16  # leases: each is a small file, and one that is alive is enough


def builder_of(store: Store, segment: str) -> Lease | None:
    """Return a lease on a segment that a live process holds; None where nobody works on it."""
    now = time.time()
    for key in store.keys(f"{segment_prefix(segment)}/claims/")[-MOST_READ:]:  # the last ones: units go upwards
        data = store.read(key)
        lease = None if data is None else live_lease(data, key, now)
        if lease is not None:
            return lease
    return None


def step_to_finish(store: Store, plan: Plan) -> str:
    """Say what to do about an unfinished segment: wait while a process works on it, else run what began it."""
    lease = builder_of(store, plan.segment)
    if lease is not None:
        return f"process {lease.pid} on {lease.host} is working on it: wait for it, nothing else is to be done"
    return f"run the same `{_command(store, plan)}` again"


def _command(store: Store, plan: Plan) -> str:
    if "copy" in plan.config:
        return "distillcache copy"
    folder = None if store.local is None else Path(store.local).parent
    if folder is not None and (folder / DEMO_MARKER).is_file():
        return f"distillcache demo --out {folder}"
    return "distillcache build"
