"""Processes that currently work on a segment, found by its leases."""

import time

from distillcache.schemas.cache.lease_file import live_lease
from distillcache.schemas.cache.segment import Segment
from distillcache.schemas.format.layout import lease_key, segment_prefix
from distillcache.tools.pages.html import paragraph, table

UNITS_SHOWN = 6
MOST_READ = 1000  # leases: each is a small file


def workers(segment: Segment) -> str:
    """A table of processes and their uncommitted work units; leases of committed units are not read."""
    now, units = time.time(), dict[tuple[str, int], list[int]]()
    for unit in _open_units(segment)[:MOST_READ]:
        key = lease_key(segment.plan.segment, unit)
        data = segment.store.read(key)
        lease = None if data is None else live_lease(data, key, now)
        if lease is not None:
            units.setdefault((lease.host, lease.pid), []).append(unit)
    rows = [(host, str(pid), _listed(leased)) for (host, pid), leased in sorted(units.items())]
    return table("Active processes", ("host", "process", "on work units"), rows) or paragraph(
        "No process is working on it now."
    )


def _open_units(segment: Segment) -> list[int]:
    """Leased work units that are not wholly committed, ascending."""
    names = (key.rpartition("/")[2] for key in segment.store.keys(f"{segment_prefix(segment.plan.segment)}/claims/"))
    numbers = (name.removesuffix(".json") for name in names)
    units = sorted(int(number) for number in numbers if number.isascii() and number.isdigit())
    return [unit for unit in units if not set(segment.plan.shards_of(unit)) <= (segment.committed or frozenset())]


def _listed(units: list[int]) -> str:
    words = ", ".join(map(str, units[:UNITS_SHOWN]))
    return words if len(units) <= UNITS_SHOWN else f"{words} and {len(units) - UNITS_SHOWN} more"
