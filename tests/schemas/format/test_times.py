"""What is kept of the seconds that shards took."""

import pytest

from distillcache.schemas.format.canonical import from_canonical, to_canonical
from distillcache.schemas.format.times import MANY_HOSTS, SLOWEST, SegmentTimes, ShardSeconds, summed_up


def seconds(compute: float, write: float = 0.5, host: str = "a") -> ShardSeconds:
    return ShardSeconds(compute=compute, write=write, total=compute + write, host=host)


def test_nothing_was_timed() -> None:
    assert summed_up({}) is None


def test_spreads_and_the_slowest() -> None:
    found = summed_up({0: seconds(1), 1: seconds(2), 2: seconds(9, host="b"), 3: seconds(4, write=3)})
    assert found is not None
    assert (found.compute.least, found.compute.median, found.compute.largest) == (1, 3, 9)
    assert found.compute.total == pytest.approx(16)
    assert found.write.largest == 3
    assert [each.shard for each in found.slowest] == [2, 3, 1, 0]
    assert {host: (each.shards, each.compute) for host, each in found.hosts.items()} == {"a": (3, 2), "b": (1, 9)}
    assert from_canonical(SegmentTimes, to_canonical(found), "times.json") == found


def test_its_size_does_not_grow_with_the_shards() -> None:
    found = summed_up({shard: seconds(shard, host=f"host-{shard}") for shard in range(1000)})
    assert found is not None
    assert (found.shards, len(found.slowest), len(found.hosts)) == (1000, SLOWEST, MANY_HOSTS)
    assert "host-999" in found.hosts
