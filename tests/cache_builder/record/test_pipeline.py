"""Shards in flight: bounded in bytes, written one write an object, stopped by the first failure."""

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts

from distillcache.cache_builder.build import build_cache
from distillcache.cache_builder.record.pipeline import ByteBudget, ShardWriter
from distillcache.models.recorder import SlotSums
from distillcache.schemas.cache.segment import open_cache
from distillcache.schemas.errors import StorageError
from distillcache.schemas.format.manifest import Plan
from distillcache.schemas.store.store import Store
from tests.conftest import build_config


@pytest.fixture(scope="module")
def plan(cache: Path) -> Plan:
    return open_cache(Store(str(cache)))[0].plan


def add_shard(writer: ShardWriter, plan: Plan, cache: Path, shard: int) -> None:
    """One whole shard of zeros, with the cache's own rows."""
    start, stop = plan.shard_range(shard)
    segment = open_cache(Store(str(cache)))[0]
    rows = [segment.row(index) for index in range(start, stop)]
    shapes = {
        part.array: ((stop - start, part.slots, plan.rows.row_tokens, part.width), part.dtype)
        for tap in plan.taps
        for part in tap.parts
    }
    codes = {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
    zeros = {tap.name: SlotSums(*(np.zeros((stop - start, len(tap.slots))) for _ in range(3))) for tap in plan.taps}
    writer.add(shard, rows, codes, zeros)


def test_a_slow_store_holds_the_teacher_back(tmp_path: Path, plan: Plan, cache: Path) -> None:
    """Two shards may be in flight: the third `add` waits until the store has taken one."""
    shard_bytes = plan.shard_rows * plan.bytes_per_row
    release, in_flight, most = threading.Semaphore(0), [0], [0]

    def slow_commit(store: Store, buffer: object, numerics: object) -> None:
        release.acquire()
        in_flight[0] -= 1

    writer = ShardWriter(
        Store(str(tmp_path)),
        plan,
        max_bytes=2 * shard_bytes,
        numerics=None,
        on_commit=lambda shard: None,
        commit=slow_commit,
    )

    def teacher() -> None:
        for shard in range(5):
            add_shard(writer, plan, cache, shard)
            in_flight[0] += 1
            most[0] = max(most[0], in_flight[0])

    thread = threading.Thread(target=teacher)
    thread.start()
    for _ in range(5):
        time.sleep(0.05)
        assert in_flight[0] <= 2
        release.release()
    thread.join()
    writer.wait()
    writer.close()
    assert most[0] == 2


def test_a_request_larger_than_the_budget_waits_until_it_is_alone() -> None:
    budget = ByteBudget(10)
    budget.acquire(4)
    got = threading.Event()
    thread = threading.Thread(target=lambda: (budget.acquire(50), got.set()))
    thread.start()
    assert not got.wait(0.05)
    budget.release(4)
    assert got.wait(5)
    thread.join()


def test_nothing_is_written_after_the_first_failure(tmp_path: Path, plan: Plan, cache: Path) -> None:
    committed = []

    def commit(store: Store, buffer, numerics: object) -> None:
        if buffer.shard == 1:
            raise StorageError("an object cannot be written")
        committed.append(buffer.shard)

    writer = ShardWriter(
        Store(str(tmp_path)), plan, max_bytes=1 << 40, numerics=None, on_commit=lambda shard: None, commit=commit
    )

    def add_all() -> None:
        for shard in range(4):
            add_shard(writer, plan, cache, shard)
        writer.wait()

    with pytest.raises(StorageError):
        add_all()
    writer.close()
    assert committed == [0]


def test_every_object_is_written_by_one_write(tmp_path: Path, teacher: Path, corpus: Path) -> None:
    """What TensorStore's file driver writes is what lies there in the end, plus what is gone again: no byte twice."""
    written = []
    real = Store.write

    def counting(self: Store, key: str, value: bytes) -> None:
        written.append((key, len(value)))
        real(self, key, value)

    metric = "/tensorstore/kvstore/file/bytes_written"

    def total() -> int:
        found = ts.experimental_collect_matching_metrics(metric)
        return found[0]["values"][0]["value"] if found else 0

    before = total()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "write", counting)
        build_cache(build_config(tmp_path / "c", teacher, corpus))
    taps = [(key, size) for key, size in written if "/taps/" in key and "/c/" in key]
    on_disk = {
        str(path.relative_to(tmp_path / "c")): path.stat().st_size
        for path in (tmp_path / "c").rglob("taps/*/c/*/*/*/*")
    }
    assert sorted(taps) == sorted(on_disk.items())
    # All bytes that hit the disk: those writes, and what is created conditionally (plan, leases, prepared index).
    assert total() - before < sum(size for _, size in written) + 30_000
