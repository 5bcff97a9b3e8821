"""One teacher over the devices of several processes: who writes what, the same bytes, and what ends such a build."""

import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorstore as ts

from distillcache.cache_builder import __main__
from distillcache.cache_builder.build import build_cache
from distillcache.cache_builder.record.finish import unless_finished
from distillcache.cache_builder.record.lockstep import Dealing, _hold
from distillcache.cache_builder.record.loop import SegmentBuild, build_segment
from distillcache.cache_builder.record.plan import counted_processes
from distillcache.schemas import command_line
from distillcache.schemas.cache.lease import Leases
from distillcache.schemas.cache.segment import open_cache, read_manifest
from distillcache.schemas.config import BuildConfig, DataConfig, TeacherConfig, TeacherMeshConfig
from distillcache.schemas.errors import ConfigError, InputError, PlanMismatchError
from distillcache.schemas.format import layout
from distillcache.schemas.runtime.peers import PeerError
from distillcache.schemas.store.store import Store
from tests.conftest import build_config
from tests.processes.command import Command


def plan_of(batch_rows: int, shard_rows: int, count: int) -> Any:
    """What dealing asks a plan for."""
    return SimpleNamespace(
        batch_rows=batch_rows,
        shard_rows=shard_rows,
        rows=SimpleNamespace(count=count),
        num_shards=-(-count // shard_rows),
    )


@pytest.mark.parametrize(
    ("processes", "batch_rows", "shard_rows", "count"),
    [(2, 8, 2, 47), (2, 8, 4, 41), (4, 8, 8, 100), (2, 12, 4, 61), (4, 8, 24, 97), (1, 8, 8, 20), (3, 6, 6, 5)],
)
def test_every_row_is_kept_once_and_a_shard_by_one_process(processes, batch_rows, shard_rows, count):
    dealing = Dealing(plan_of(batch_rows, shard_rows, count), processes)
    kept = {process: [] for process in range(processes)}
    writers: dict[int, set[int]] = {}
    for unit in range(dealing.units):
        in_unit = set()
        for call in dealing.calls(unit):
            assert call.shape == (batch_rows,)
            for process, rows in kept.items():
                own = dealing.own(call, process)
                assert np.array_equal(own, np.arange(len(own)) + (own[0] if len(own) else 0))
                rows += own.tolist()
                for row in own.tolist():
                    in_unit.add(row // shard_rows)
                    writers.setdefault(row // shard_rows, set()).add(process)
        assert sorted(in_unit) == list(dealing.shards(unit))
    assert sorted(row for rows in kept.values() for row in rows) == list(range(count))
    assert all(len(found) == 1 for found in writers.values())
    assert all(rows == sorted(rows) for rows in kept.values())  # a shard is filled in its order


def test_batches_are_in_order_where_shards_fit():
    dealing = Dealing(plan_of(8, 2, 20), 2)
    calls = [call for unit in range(dealing.units) for call in dealing.calls(unit)]
    assert np.concatenate(calls).tolist() == [*range(20), -1, -1, -1, -1]


def test_the_number_of_processes_counts_only_where_bits_may_depend_on_it(tmp_path, teacher, corpus):
    def counted(shard_rows, **mesh):
        config = build_config(tmp_path, teacher, corpus, batch_rows=8, mesh=TeacherMeshConfig(**mesh))
        return counted_processes(config.mesh.teacher_axes, config.batch_rows, 2, shard_rows)

    assert counted(4, data=4) == counted(2, fsdp=2, tensor=2) == 1
    assert counted(8, data=4) == 2  # rows are dealt
    assert counted(4, tensor=4) == 2  # four partial sums


def test_a_build_on_a_mesh(tmp_path, teacher, corpus, cache):
    """Close to a single device's cache; it is another build than one on other devices."""
    config = build_config(tmp_path / "cache", teacher, corpus, mesh=TeacherMeshConfig(data=2, fsdp=2))
    manifest = build_cache(config)
    found, expected = open_cache(Store(str(tmp_path / "cache")))[0], open_cache(Store(str(cache)))[0]
    assert found.plan.numerics.mesh == (2, 2, 1, 1)
    assert manifest.rows == expected.plan.rows.count
    values = [
        np.asarray(each.open_array(each.plan.taps[0].parts[0]).read().result()).view("uint16").astype(np.uint32) << 16
        for each in (found, expected)
    ]
    np.testing.assert_allclose(values[0].view(np.float32), values[1].view(np.float32), rtol=0.01, atol=1e-4)
    with pytest.raises(PlanMismatchError) as error:
        build_cache(config.model_copy(update={"mesh": TeacherMeshConfig()}))
    assert "mesh" in error.value.facts


def test_a_mesh_that_does_not_fit_is_refused(tmp_path, teacher, corpus):
    with pytest.raises(ConfigError, match="more devices"):
        build_cache(build_config(tmp_path / "a", teacher, corpus, mesh=TeacherMeshConfig(data=16)))
    with pytest.raises(ConfigError, match="evenly"):
        build_cache(build_config(tmp_path / "b", teacher, corpus, mesh=TeacherMeshConfig(data=8)))  # four rows a call


def test_a_second_job_is_refused_while_the_first_lives(tmp_path):
    store = Store(str(tmp_path))
    first, second = (Leases(store, "0000", 0.4, key=layout.job_lease_key) for _ in range(2))
    try:
        assert first.take(0)
        with pytest.raises(InputError, match="another job"):
            _hold(store, second, 0.4)
        first.close()
        assert _hold(store, second, 0.4)
    finally:
        second.close()


def no_rows(*_: object) -> Any:
    pytest.fail("the rows are tidied up")


def test_a_job_that_waited_for_another_finds_its_work_done(tmp_path, teacher, corpus, cache):
    store = Store(str(shutil.copytree(cache, tmp_path / "c")))
    config = build_config(tmp_path / "c", teacher, corpus, replica="job")
    peers = SimpleNamespace(count=2, number=0, first=True, share=lambda name, say: say())
    replica: Any = SimpleNamespace(peers=peers, mesh=None, stop=None)
    rows: Any = SimpleNamespace(slice=no_rows)
    nothing: Any = None
    (segment,) = open_cache(store)
    build = SegmentBuild(
        store=store,
        options=config,
        tokenizer=nothing,
        teacher=str(teacher),
        decoder=nothing,
        plan=segment.plan,
        rows=rows,
        replica=replica,
    )
    assert build_segment(build) == read_manifest(store)
    assert not list((tmp_path / "c").rglob("claims"))


@pytest.mark.parametrize("may_repeat", [True, False])
def test_processes_that_lost_each_other_look_whether_another_job_has_finished(cache, tmp_path, may_repeat):
    """As where one of them met files that are tidied up, and the others waited for it in vain."""
    store, done = Store(str(tmp_path / "c")), []

    def work():
        if not done:
            done.append(shutil.copytree(cache, tmp_path / "c"))
            raise PeerError("the processes do not find each other", {})
        return read_manifest(store)

    if may_repeat:
        assert unless_finished(store, work, lambda: True) == read_manifest(store)
    else:
        with pytest.raises(PeerError):
            unless_finished(store, work, lambda: False)


@pytest.mark.slow
def test_a_repair_computes_on_the_mesh_of_the_plan(tmp_path, teacher, corpus):
    config = build_config(tmp_path / "cache", teacher, corpus, mesh=TeacherMeshConfig(fsdp=2, tensor=2))
    build_cache(config)
    expected = stored(tmp_path / "cache")
    damaged = tmp_path / "cache" / "segments" / "0000" / "taps" / "resid" / "c" / "1" / "0" / "0" / "0"
    damaged.write_bytes(b"lost")
    build_cache(config.model_copy(update={"repair": True}))
    assert stored(tmp_path / "cache") == expected


def measured():
    """One process's part, without the supervisor; at the end, how many bytes it wrote to files."""
    build_cache(command_line.parse(BuildConfig, sys.argv[1:], "test"))
    (found,) = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_written")
    print(found["values"][0]["value"])


def start(cache, teacher, text, processes, number, port, main):
    """A process of a job over four devices."""
    flags = f"--xla_force_host_platform_device_count={4 // processes}"
    own = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    words = f"""--cache {cache} --teacher.path {teacher} --data.path {text} --data.row-tokens 16 --data.eval-rows 2
        --batch-rows 8 --shard-rows 2 --mesh.data 4 --taps.resid.codec int8 --taps.resid.delta true
        --replica job --coordinator 127.0.0.1:{port} --num-processes {processes} --process-id {number}
        --timeout-s 10""".split()
    return Command(main, words, {**os.environ, "XLA_FLAGS": " ".join([*own, flags])})


def start_all(cache, teacher, text, processes, main=__main__.main):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start(cache, teacher, text, processes, number, port, main) for number in range(processes)]


def stored(cache):
    return {
        str(path.relative_to(cache)): path.read_bytes()
        for path in sorted(cache.rglob("*"))
        if path.is_file() and path.name not in ("plan.json", "manifest.json", "times.json")  # config and clock
    }


def child_of(process):
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0])


def wait_for_receipts(cache, count, processes):
    until = time.monotonic() + 60
    folder = cache / "segments" / "0000" / "receipts"
    while len(list(folder.glob("*.json"))) < count:
        assert time.monotonic() < until
        assert all(process.poll() is None for process in processes), [process.communicate() for process in processes]
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.longest
def test_processes_write_the_bytes_of_one(tmp_path, teacher):
    """Two processes, one of them killed, and started again; then four: what one process with all devices writes."""
    text = tmp_path / "text.txt"
    text.write_text("the same few words, again and again. " * 120)
    config = BuildConfig.model_validate(
        {
            "cache": str(tmp_path / "one"),
            "teacher": TeacherConfig(path=str(teacher)),
            "data": DataConfig(path=str(text), row_tokens=16, eval_rows=2),
            "batch_rows": 8,
            "shard_rows": 2,
            "mesh": {"data": 4},
            "taps": {"resid": {"codec": "int8", "delta": True}},
        }
    )
    build_cache(config)
    expected = stored(tmp_path / "one")

    two = start_all(tmp_path / "two", teacher, text, 2)
    wait_for_receipts(tmp_path / "two", 4, two)
    os.kill(child_of(two[1]), signal.SIGKILL)
    (_, said), (_, last) = (process.communicate(timeout=60) for process in two)
    assert [process.returncode for process in two] == [2, 2]
    assert "a process that works with this one is gone: 1 on" in said
    assert "this process was killed by SIGKILL" in last
    assert not (tmp_path / "two" / "manifest.json").exists()

    again = start_all(tmp_path / "two", teacher, text, 2, measured)
    said = [process.communicate(timeout=60)[1] for process in again]
    assert [process.returncode for process in again] == [0, 0], said
    assert stored(tmp_path / "two") == expected

    four = start_all(tmp_path / "four", teacher, text, 4, measured)
    found = [process.communicate(timeout=90) for process in four]
    assert [process.returncode for process in four] == [0] * 4, found
    assert stored(tmp_path / "four") == expected
    written = [int(out.split()[-1]) for out, _ in found]
    share = sum(map(len, expected.values())) / 4
    assert all(0.9 * share < count < 1.2 * share for count in written), (written, share)  # receipts, prepared rows
