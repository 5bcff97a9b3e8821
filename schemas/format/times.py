"""Time that shards took: in their receipts while a segment is built, summed up in `times.json` once it is finished.

For people only. The file carries its own digest, but neither the manifest nor the statistics name it: two builds of one
plan differ in nothing else, and two processes that finish one segment at once may have read different receipts.
"""

from collections.abc import Mapping

import numpy as np
from pydantic import NonNegativeFloat

from distillcache.schemas.base import Config, Count, Size

SLOWEST = 16  # shards that are named; hosts likewise
MANY_HOSTS = 64


class ShardSeconds(Config):
    """Time that a shard spent in each step, by the clock of the process that committed it, on `host`.

    compute: waiting for its rows' numbers, that is, the teacher (of a copy: reading and encoding); compiling left out.
    write: encoding its objects and storing them. total: from its first numbers to its last object, waiting for other
    shards' writes included. While one shard is written the next one is computed, so those of a build add up to more
    than it took.
    """

    compute: NonNegativeFloat
    write: NonNegativeFloat
    total: NonNegativeFloat
    host: str


class Spread(Config):
    """Distribution of the seconds that shards took, all shards alike."""

    total: NonNegativeFloat
    least: NonNegativeFloat
    median: NonNegativeFloat
    largest: NonNegativeFloat


class HostTimes(Config):
    """The shards of one machine: how many, and their median seconds."""

    shards: Size
    compute: NonNegativeFloat
    write: NonNegativeFloat


class SlowShard(Config):
    """One of the slowest."""

    shard: Count
    seconds: ShardSeconds


class SegmentTimes(Config):
    """`times.json`. O(1) in the number of shards: the slowest ones and machines alone are named.

    shards: how many were timed.
    """

    shards: Size
    compute: Spread
    write: Spread
    hosts: dict[str, HostTimes]
    slowest: tuple[SlowShard, ...]


def summed_up(seconds: Mapping[int, ShardSeconds]) -> SegmentTimes | None:
    """Summarise the shards' times; None if no shard was timed."""
    if not seconds:
        return None
    by_host: dict[str, list[ShardSeconds]] = {}
    for each in seconds.values():
        by_host.setdefault(each.host, []).append(each)
    hosts = {host: _of_host(each) for host, each in by_host.items()}
    named = sorted(hosts, key=lambda host: hosts[host].compute + hosts[host].write, reverse=True)[:MANY_HOSTS]
    slow = sorted(seconds, key=lambda shard: (-seconds[shard].compute - seconds[shard].write, shard))[:SLOWEST]
    return SegmentTimes(
        shards=len(seconds),
        compute=_spread([each.compute for each in seconds.values()]),
        write=_spread([each.write for each in seconds.values()]),
        hosts={host: hosts[host] for host in sorted(named)},
        slowest=tuple(SlowShard(shard=shard, seconds=seconds[shard]) for shard in slow),
    )


def _of_host(seconds: list[ShardSeconds]) -> HostTimes:
    compute, write = ([getattr(each, phase) for each in seconds] for phase in ("compute", "write"))
    return HostTimes(shards=len(seconds), compute=_spread(compute).median, write=_spread(write).median)


def _spread(values: list[float]) -> Spread:
    return Spread(
        total=round(sum(values), 3),
        least=min(values),
        median=round(float(np.median(values)), 4),
        largest=max(values),
    )
