"""A build that is killed with SIGKILL, at drawn moments and at every write, and started again.

The children are forked (`tests.processes`). A child kills itself at its n-th operation on the store: before it, in the
middle of it (a lock file half-written, as TensorStore's file driver leaves it), or after it.
"""

import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest

from distillcache.cache_builder.build import build_cache
from distillcache.schemas.cache.segment import read_manifest
from distillcache.schemas.config import TapConfig, TapsConfig
from distillcache.schemas.store.store import LOCK_SUFFIX, Store
from tests.conftest import build_config
from tests.processes.command import fork_server

pytestmark = [pytest.mark.slow, pytest.mark.longest, pytest.mark.timeout(900)]

OPERATIONS = ("write", "replace", "delete")
SHARD_ROWS = 24  # two shards: what is killed has finished none, one or both; a third would be the second once more


def build_until(cache: str, teacher: str, corpus: str, kill_at: int, moment: str, done: str) -> None:
    """In the child: build, and die at the `kill_at`-th operation. A build that ends writes its count to `done`."""
    count = die_at(kill_at, moment)
    build_cache(build_config(cache, Path(teacher), Path(corpus), shard_rows=SHARD_ROWS))
    Path(done).write_text(str(count()))


def repair_until(cache: str, teacher: str, corpus: str, kill_at: int, moment: str, done: str) -> None:
    """In the child: repair, likewise."""
    count = die_at(kill_at, moment)
    build_cache(build_config(cache, Path(teacher), Path(corpus), shard_rows=SHARD_ROWS, repair=True))
    Path(done).write_text(str(count()))


def die_at(kill_at: int, moment: str) -> Callable[[], int]:
    """Kill this process at its `kill_at`-th operation on a store; how many there were, to be asked at the end.

    A write that replaces what is there is one operation.
    """
    count, inside = 0, threading.local()

    def dying(name: str):
        real = getattr(Store, name)

        def operation(self: Store, key: str, *values):
            nonlocal count
            if getattr(inside, "one", False):
                return real(self, key, *values)
            count += 1
            if count == kill_at:
                if moment == "after":
                    real(self, key, *values)
                if moment == "during" and name != "delete":
                    path = Path(f"{self.local}/{key}{LOCK_SUFFIX}")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    # Longer than the value: what a later, shorter write would keep the tail of.
                    path.write_bytes(b"x" * (len(values[0]) + 1000))
                os.kill(os.getpid(), signal.SIGKILL)
            inside.one = True
            try:
                return real(self, key, *values)
            finally:
                inside.one = False

        return operation

    for name in OPERATIONS:
        setattr(Store, name, dying(name))
    return lambda: count


def contents(cache: Path) -> dict[str, bytes]:
    """rows/, taps/ and what is derived from them; the others name times and the place."""
    files = {str(path.relative_to(cache)): path for path in cache.rglob("*") if path.is_file()}
    others = ("plan.json", "manifest.json", "times.json")
    return {name: path.read_bytes() for name, path in files.items() if path.name not in others}


@pytest.fixture(scope="module")
def server() -> ForkServerContext:
    return fork_server()


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory, teacher: Path, corpus: Path) -> dict[str, bytes]:
    """The bytes of a build that nothing disturbs."""
    folder = tmp_path_factory.mktemp("quiet") / "c"
    build_cache(build_config(folder, teacher, corpus, shard_rows=SHARD_ROWS))
    return contents(folder)


def run_child(server: ForkServerContext, *arguments: object, work: Callable[..., None] = build_until) -> int:
    child = server.Process(target=work, args=tuple(map(str, arguments[:3])) + arguments[3:])
    child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def test_killed_at_every_durability_boundary(
    tmp_path: Path, server: ForkServerContext, teacher: Path, corpus: Path, quiet: dict[str, bytes]
) -> None:
    done = str(tmp_path / "count")
    assert run_child(server, tmp_path / "count-run", teacher, corpus, 0, "never", done) == 0
    operations = int(Path(done).read_text())
    assert operations > 20
    moments = ("after", "during", "before")  # of neighbours: no kill leaves what the one before it left
    for kill_at in range(1, operations + 1):
        cache = tmp_path / f"c{kill_at}"
        moment = moments[kill_at % 3]
        assert run_child(server, cache, teacher, corpus, kill_at, moment, done) == -signal.SIGKILL
        # A second kill, close to the first, and then in peace.
        run_child(server, cache, teacher, corpus, 1 + kill_at % 7, moments[(kill_at + 1) % 3], done)
        build_cache(build_config(cache, teacher, corpus, shard_rows=SHARD_ROWS))
        assert contents(cache) == quiet, f"killed {moment} operation {kill_at} of {operations}"


def test_killed_at_drawn_moments(
    tmp_path: Path, server: ForkServerContext, teacher: Path, corpus: Path, quiet: dict[str, bytes]
) -> None:
    def arguments(cache: Path) -> tuple[object, ...]:
        return str(cache), str(teacher), str(corpus), 0, "never", str(tmp_path / "done")

    for name in ("first", "whole"):  # the first may compile, which takes longer than all the rest
        start = time.perf_counter()
        assert run_child(server, *arguments(tmp_path / name)) == 0
        took = time.perf_counter() - start
    drawn = random.Random(0)
    killed = 0
    for trial in range(8):
        cache = tmp_path / f"c{trial}"
        child = server.Process(target=build_until, args=arguments(cache))
        child.start()
        time.sleep(drawn.uniform(0.1, 0.9) * took)
        child.kill()
        child.join()
        killed += child.exitcode == -signal.SIGKILL
        build_cache(build_config(cache, teacher, corpus, shard_rows=SHARD_ROWS))
        assert contents(cache) == quiet, f"trial {trial}"
    assert killed >= 3  # the others had finished


def test_two_builders_of_one_plan(
    tmp_path: Path, server: ForkServerContext, teacher: Path, corpus: Path, quiet: dict[str, bytes]
) -> None:
    for trial in range(3):
        cache = tmp_path / f"c{trial}"
        arguments = (str(cache), str(teacher), str(corpus), 0, "never", str(tmp_path / "done"))
        children = [server.Process(target=build_until, args=arguments) for _ in range(2)]
        for child in children:
            child.start()
        for child in children:
            child.join()
        assert [child.exitcode for child in children] == [0, 0]
        assert contents(cache) == quiet
        assert read_manifest(Store(str(cache))) is not None


def everything(cache: Path) -> dict[str, bytes]:
    return {str(path.relative_to(cache)): path.read_bytes() for path in cache.rglob("*") if path.is_file()}


def test_a_repair_that_is_killed(tmp_path: Path, server: ForkServerContext, teacher: Path, corpus: Path) -> None:
    """Twice, at drawn operations, of a cache of two segments whose every kind of file is damaged; then in peace."""
    broken, done = tmp_path / "broken", str(tmp_path / "count")
    build_cache(build_config(broken, teacher, corpus, shard_rows=SHARD_ROWS))
    mlp = TapsConfig(attn_out=None, resid=None, mlp_out=TapConfig())
    build_cache(build_config(broken, teacher, corpus, shard_rows=SHARD_ROWS, taps=mlp, extend=True))
    expected = everything(broken)
    for name in expected:
        if name.endswith(("manifest.json", "plan.json", "/rows/00000.array_record", "/c/0/0/0/0")):
            continue
        (broken / name).write_bytes(expected[name][:-1] + b"?")
        if sum(name.encode()) % 2:
            (broken / name).unlink()
    shutil.copytree(broken, tmp_path / "counted")
    assert run_child(server, tmp_path / "counted", teacher, corpus, 0, "never", done, work=repair_until) == 0
    operations = int(Path(done).read_text())
    expected = {
        name: data for name, data in expected.items() if not name.endswith("times.json")
    }  # nobody knows them now
    assert everything(tmp_path / "counted") == expected
    assert operations > 15
    drawn = random.Random(0)
    moments = ("before", "during", "after")
    for trial, kill_at in enumerate(sorted(drawn.sample(range(1, operations + 1), 8))):
        cache = shutil.copytree(broken, tmp_path / f"c{trial}")
        arguments = (cache, teacher, corpus)
        killed = run_child(server, *arguments, kill_at, moments[trial % 3], done, work=repair_until)
        assert killed == -signal.SIGKILL
        run_child(server, *arguments, 1 + trial, moments[(trial + 1) % 3], done, work=repair_until)
        build_cache(build_config(cache, teacher, corpus, shard_rows=SHARD_ROWS, repair=True))
        assert everything(cache) == expected, f"killed {moments[trial % 3]} operation {kill_at} of {operations}"
