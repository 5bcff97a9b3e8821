"""A cache's whole life in buckets, on the servers of `tests.servers`, also while a tenth of all requests goes wrong."""

import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distillcache.cache_builder.build import build_cache
from distillcache.cache_builder.grow.copy import copy_cache
from distillcache.cache_builder.prepare import prepare_rows
from distillcache.schemas.config import BuildConfig, CopyConfig, DataConfig, PrepareConfig
from distillcache.schemas.config.storage import StorageConfig
from distillcache.schemas.store.store import Store
from distillcache.tools.look.inspect import describe_cache
from distillcache.tools.look.verify import verify_cache
from distillcache.trainer.feed.cache_source import CacheSource
from tests.conftest import build_config
from tests.processes.command import fork_server
from tests.servers.fixtures import Bucket

QUICK = StorageConfig(first_delay_s=0.02, max_delay_s=0.5)  # what is proved does not depend on how long one waits


@pytest.fixture(params=["gcs", "s3"])
def bucket(request: pytest.FixtureRequest) -> Bucket:
    return request.getfixturevalue(request.param)


def contents(url: str | Path) -> dict[str, bytes]:
    """rows/ and taps/ of a cache, by key."""
    store = Store(str(url))
    keys = [key for key in store.keys("segments/") if "/rows/" in key or "/taps/" in key]
    return {key: store.read(key) or b"" for key in keys}


def batch(url: str | Path, rows: list[int]) -> dict[str, Any]:
    """What a source gives, as flat arrays."""
    found = CacheSource(str(url))[rows]
    return {
        f"{name} {part}": np.asarray(array)
        for name, value in found.items()
        for part, array in (value.items() if isinstance(value, dict) else [("", value)])
    }


def build_in(environment: dict[str, str], config: BuildConfig) -> None:
    """In a child, which has the environment of another test."""
    os.environ.update(environment)
    build_cache(config)


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def test_built_in_a_bucket_as_on_a_disk(bucket: Bucket, cache: Path, teacher: Path, corpus: Path) -> None:
    url = f"{bucket.url}/a folder/cache"
    build_cache(build_config(url, teacher, corpus, storage=QUICK))
    assert contents(url) == contents(cache)
    assert verify_cache(Store(url))["ok"]
    assert describe_cache(Store(url))["rows"]["count"] == describe_cache(Store(str(cache)))["rows"]["count"]
    assert_same(batch(url, [3, 30, 3]), batch(cache, [3, 30, 3]))


def requests_of(bucket: Bucket, work: Callable[[], object]) -> Counter[str]:
    """How many requests there were by folder of a cache; all of them under `all`."""
    bucket.server.clear_requests()
    work()
    found: Counter[str] = Counter()
    for _, key, count in bucket.server.requests()["by_key"]:
        name = next((name for name in ("claims/", "receipts/", "/taps/", "/rows/", "plan.json") if name in key), "rest")
        found[name] += count
        found["all"] += count
    return found


@pytest.mark.slow
def test_requests_are_those_of_the_docs(bucket: Bucket, teacher: Path, corpus: Path, tmp_path: Path) -> None:
    """The formulas of docs/storage.md: a cache of two shards more, and rows of one file more, cost so much more."""
    builds, prepares, copies, s3 = [], [], [], bucket.url.startswith("s3:")
    Store(bucket.url).write("of-others", b"")  # an empty listing is asked about once more
    for rows in (22, 38):  # three and five shards of eight rows
        data = DataConfig(path=str(corpus), row_tokens=16, eval_rows=4, tokenizer=str(teacher), max_rows=rows)
        prepare = PrepareConfig(out=f"{bucket.url}/rows{rows}", data=data)
        prepares.append(requests_of(bucket, partial(prepare_rows, prepare, rows_per_file=16)))  # two and three files
        prepare_rows(PrepareConfig(out=f"{tmp_path}/rows{rows}", data=data))
        config = build_config(f"{bucket.url}/cache{rows}", teacher, corpus, data={"path": f"{tmp_path}/rows{rows}"})
        builds.append(requests_of(bucket, partial(build_cache, config)))
        copy = CopyConfig(src=build_here(tmp_path, config, rows), dst=f"{bucket.url}/copy{rows}", shard_rows=8)
        copies.append(requests_of(bucket, partial(copy_cache, copy)))
    guarded, objects = 4 if s3 else 3, 2
    more = {name: (builds[1][name] - builds[0][name]) / 2 for name in builds[1]}
    assert more["/taps/"] + more["plan.json"] / (objects + 2) * objects == guarded * objects
    assert more["claims/"] == (4 if s3 else 3)
    assert more["receipts/"] == guarded + 2
    assert more["all"] == guarded * objects + (16 if s3 else 13)
    assert prepares[1]["all"] - prepares[0]["all"] == guarded + 1
    assert builds[1]["all"] - 5 * more["all"] <= (80 if s3 else 70)
    assert (copies[1]["all"] - copies[0]["all"]) / 2 == more["all"]


def build_here(folder: Path, config: BuildConfig, rows: int) -> str:
    """The same cache on the disk."""
    build_cache(config.model_copy(update={"cache": f"{folder}/cache{rows}"}))
    return f"{folder}/cache{rows}"


ALL_KINDS = ["503", "429", "reset", "lost", "stall", "cut", "short"]


@pytest.mark.slow
def test_the_same_bytes_while_requests_go_wrong(bucket: Bucket, cache: Path, teacher: Path, corpus: Path) -> None:
    url = f"{bucket.url}/cache"
    with bucket.server.faults(0.15, seed=2, stall_s=0.3, kinds=ALL_KINDS):
        build_cache(build_config(url, teacher, corpus, storage=QUICK))
        read = batch(url, list(range(0, 38, 3)))
        found = verify_cache(Store(url))
    assert found["ok"], found["findings"]
    assert contents(url) == contents(cache)
    assert_same(read, batch(cache, list(range(0, 38, 3))))
    assert sum(bucket.server.requests()["faults"].values()) > 10


@pytest.mark.slow
def test_copied_grown_and_repaired_from_bucket_to_bucket(
    gcs: Bucket, s3: Bucket, cache: Path, teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    here, there = f"{gcs.url}/copied", f"{s3.url}/copied/again"
    with gcs.server.faults(0.1, seed=5, stall_s=0.2), s3.server.faults(0.1, seed=6, stall_s=0.2):
        copy_cache(CopyConfig(src=str(cache), dst=here, shard_rows=8, storage=QUICK))
        copy_cache(CopyConfig(src=here, dst=there, shard_rows=8, storage=QUICK))
    assert contents(here) == contents(there) == contents(cache)

    more = build_config(cache, teacher, corpus, taps={"mlp_out": {"codec": "bf16"}}, extend=True, storage=QUICK)
    grown = [more.model_copy(update={"cache": url}) for url in (str(shutil.copytree(cache, tmp_path / "c")), there)]
    for config in grown:
        build_cache(config)
    assert contents(there) == contents(grown[0].cache)

    store = Store(there)
    damaged = next(key for key in store.keys("segments/0001-") if "/taps/mlp_out/c/1/" in key)
    whole = store.read(damaged) or b""
    store.write(damaged, whole[:-9] + b"x" + whole[-8:])
    store.delete(f"{damaged.partition('/taps')[0]}/rows/00000.array_record")
    assert not verify_cache(store)["ok"]
    with s3.server.faults(0.1, seed=7, stall_s=0.2):
        build_cache(grown[1].model_copy(update={"extend": False, "repair": True}))
    assert store.read(damaged) == whole
    assert verify_cache(store)["ok"]


@pytest.mark.slow
def test_prepared_in_a_bucket_built_by_two_and_gone_on_with(
    bucket: Bucket, teacher: Path, corpus: Path, cache: Path
) -> None:
    url, rows = f"{bucket.url}/cache", f"{bucket.url}/rows"
    data = DataConfig(path=str(corpus), row_tokens=16, eval_rows=4, tokenizer=str(teacher))
    prepare_rows(PrepareConfig(out=rows, data=data, storage=QUICK))
    config = build_config(url, teacher, corpus, data={"path": rows}, num_processes=2, claim_expiry_s=4, storage=QUICK)
    context = fork_server()
    environment = bucket.server.environment
    builders = [
        context.Process(target=build_in, args=(environment, config.model_copy(update={"process_id": number})))
        for number in range(2)
    ]
    with bucket.server.faults(0.1, seed=8, stall_s=0.2):
        for builder in builders:
            builder.start()
        time.sleep(3)
        builders[0].kill()
        for builder in builders:
            builder.join()
    assert builders[1].exitcode == 0
    build_cache(config)  # finished: tidies up at most
    assert contents(url) == contents(cache)
    assert verify_cache(Store(url))["ok"]
