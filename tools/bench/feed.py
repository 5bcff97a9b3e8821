"""Reading: our feed against memory's own speed and against the formats of other systems, on the same random batches.

`[30, 8, 512, 576]` bfloat16: 30 blocks, batches of 8 rows of 512 tokens, 576 wide. Rates are rows a second, delivered
as `[L, B, T, D]` in memory that nobody else uses. All files are in the page cache: this measures readers, not disks.

    memcpy         rows that lie in memory, copied into fresh buffers
    raw_mmap       raw memory-mapped shards      safetensors   a file a row      tf_example   tf.Example in ArrayRecord
    feed_<codec>   ours, with digests checked    feed_bf16_unchecked  without    feed_bf16_device  and put on the device

memcpy and raw_mmap run on one thread; figures of two are printed beside them. Ours runs as `train` runs it. A round
runs every path, then those that a goal compares once more beside a process that keeps one core busy (`busy_<figure>`):
trainers share their cores.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grain
import jax
import ml_dtypes
import numpy as np
import tensorstore as ts

from distillcache.schemas.config import BenchConfig
from distillcache.schemas.format.manifest import Plan
from distillcache.schemas.runtime.child_python import python_environment, python_words
from distillcache.tools.bench.busy import BusyProcess
from distillcache.tools.bench.command import by_turns
from distillcache.tools.bench.figures import Goal, Measured, scratch_folder
from distillcache.tools.bench.peer_formats import RawShards, SampleFiles, TfExamples
from distillcache.tools.bench.synthetic_cache import synthetic_plan, write_cache, write_large_index
from distillcache.trainer.feed.cache_source import CacheSource, make_feed

Paths = dict[str, Callable[[int], float]]  # name -> a function of the round's number that returns rows a second
TAP = "attn_out"
ROUNDS = 5
BYTES_READ = "/tensorstore/kvstore/file/bytes_read"
BESIDE_WORK = ("memcpy", "raw_mmap", "feed_bf16", "feed_bf16_unchecked", "feed_int8", "feed_int4")
SUBSET = (3, 11, 12, 26)  # some blocks, two of them neighbours


@dataclass(frozen=True)
class FeedSizes:
    """Sizes of the reads. shape: (L, T, D) of a row. rows: in the cache. distinct: number of different rows; the
    others are links to them, since Grain's shuffle is slow below some thousand rows. warm_batches: of a feed, before
    the clock starts. tf_rows: in the tf.Example file, which is slow to write.
    """

    shape: tuple[int, int, int] = (30, 512, 576)
    rows: int = 3072
    distinct: int = 24
    batch_rows: int = 8
    batches: int = 16
    warm_batches: int = 3
    shard_rows: int = 24
    tf_rows: int = 8
    codecs: tuple[str, ...] = ("bf16", "int8", "int4")
    million: int = 1_000_000


def measure(config: BenchConfig) -> Measured:
    """All figures of `bench feed`."""
    with scratch_folder(config.dir) as folder:
        return measure_feed(folder, FeedSizes(), config.rounds or ROUNDS)


def measure_feed(folder: Path, sizes: FeedSizes, rounds: int) -> Measured:
    """Measure with other sizes."""
    print("bench: writing the data", file=sys.stderr)
    rows = random_rows(sizes)
    sources = write_all(folder, sizes, rows)
    paths = make_paths(folder, sizes, rows, sources)
    with BusyProcess() as process:
        rates = by_turns(paths | beside_work(paths, process), rounds)
    row_gb = int(np.prod(sizes.shape)) * 2 / 1e9
    figures = {f"{name}_rows_per_s": rate for name, rate in rates.items()}
    figures |= {f"{name}_gb_per_s": rate * row_gb for name, rate in rates.items() if "int" not in name}
    figures["subset_bytes_read_over_own"] = subset_bytes(folder / "bf16", sizes)
    figures |= open_figures(folder / "million", sizes)
    return Measured(figures, make_goals(rates, figures))


def beside_work(paths: Paths, process: BusyProcess) -> Paths:
    """The paths that goals compare, each beside a process that keeps one core busy."""

    def beside(path: Callable[[int], float], number: int) -> float:
        with process.busy():
            return path(number)

    return {f"busy_{name}": partial(beside, paths[name]) for name in BESIDE_WORK if name in paths}


def make_goals(rates: Mapping[str, float], figures: Mapping[str, float]) -> list[Goal]:
    """Return the goals."""
    return [
        *speed_goals(rates, ""),
        Goal("bf16_over_tf_example", rates["feed_bf16"] / rates["tf_example"], 15, "at_least"),
        *speed_goals(rates, "busy_"),
        Goal("subset_bytes_read_over_own", figures["subset_bytes_read_over_own"], 1.01, "at_most"),
        Goal("open_million_rows_s", figures["open_million_rows_s"], 1.0, "at_most"),
        Goal("open_million_rows_mb", figures["open_million_rows_mb"], 300, "at_most"),
    ]


def speed_goals(rates: Mapping[str, float], state: str) -> list[Goal]:
    """Return those against memory's own speed. state: of the machine, the beginning of the paths' names."""
    rate = {name.removeprefix(state): rate for name, rate in rates.items() if name.startswith(state)}
    goals = [
        Goal(f"{state}bf16_unchecked_over_memcpy", rate["feed_bf16_unchecked"] / rate["memcpy"], 0.9, "at_least"),
        Goal(f"{state}bf16_over_memcpy", rate["feed_bf16"] / rate["memcpy"], 0.6, "at_least"),
        Goal(f"{state}bf16_unchecked_over_raw_mmap", rate["feed_bf16_unchecked"] / rate["raw_mmap"], 1.0, "at_least"),
    ]
    if "feed_int8" in rate:
        goals.append(Goal(f"{state}int8_over_raw_mmap", rate["feed_int8"] / rate["raw_mmap"], 1.6, "at_least"))
    return goals


def random_rows(sizes: FeedSizes) -> np.ndarray:
    """`[N, L, T, D]` uint16: normal numbers as bfloat16, which compress as little as activations do."""
    rng, rows = np.random.default_rng(0), np.empty((sizes.distinct, *sizes.shape), np.uint16)
    for row in rows:
        row[...] = rng.standard_normal(sizes.shape, np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)
    return rows


def write_all(folder: Path, sizes: FeedSizes, rows: np.ndarray) -> dict[str, CacheSource]:
    """Our caches and the peers' files; returns the sources by the names of their paths."""
    RawShards.write(folder / "raw", rows, sizes.shard_rows)
    SampleFiles.write(folder / "samples", rows)
    TfExamples.write(folder / "examples.array_record", rows[: sizes.tf_rows])
    sources = {}
    for codec in sizes.codecs:
        plan = synthetic_plan(sizes.rows, sizes.shape, {TAP: codec}, sizes.shard_rows)

        def exact(shard: int, plan: Plan = plan) -> dict[str, np.ndarray]:
            return {TAP: rows[slice(*plan.shard_range(shard))]}

        distinct = sizes.distinct // sizes.shard_rows
        write_cache(folder / codec, plan, exact if codec == "bf16" else None, distinct)
        sources[f"feed_{codec}"] = CacheSource(str(folder / codec), (TAP,))
    sources["feed_bf16_unchecked"] = CacheSource(str(folder / "bf16"), (TAP,), integrity=False)
    return sources


def make_paths(folder: Path, sizes: FeedSizes, rows: np.ndarray, sources: dict[str, CacheSource]) -> Paths:
    """Name -> a function that reads a round's batches and returns rows a second."""

    def copy(numbers: Sequence[int]) -> np.ndarray:
        out = np.empty((sizes.shape[0], len(numbers), *sizes.shape[1:]), np.uint16)
        for place, number in enumerate(numbers):
            out[:, place] = rows[number]
        return out

    raw, samples = RawShards(folder / "raw", sizes.shape), SampleFiles(folder / "samples", sizes.shape)
    examples = TfExamples(folder / "examples.array_record", sizes.shape)
    paths: Paths = {
        "memcpy": lambda seed: read_rate(copy, batch_order(sizes, seed)),
        "memcpy_2_threads": lambda seed: read_rate(copy, batch_order(sizes, seed), threads=2),
        "raw_mmap": lambda seed: read_rate(raw.__getitem__, batch_order(sizes, seed)),
        "raw_mmap_2_threads": lambda seed: read_rate(raw.__getitem__, batch_order(sizes, seed), threads=2),
        "safetensors": lambda seed: read_rate(samples.__getitem__, batch_order(sizes, seed)),
        "tf_example": lambda seed: read_rate(examples.__getitem__, [list(range(sizes.tf_rows))]),
    }
    for name, source in sources.items():
        paths[name] = lambda seed, source=source: feed_rate(source, sizes, seed)
    paths["feed_bf16_device"] = lambda seed: feed_rate(sources["feed_bf16"], sizes, seed, device=True)
    return paths


def batch_order(sizes: FeedSizes, seed: int) -> list[list[int]]:
    """The batches that a feed of this seed gives, as numbers of distinct rows: every reader gets the same ones."""
    order = grain.MapDataset.range(sizes.rows).shuffle(seed=seed).repeat().batch(sizes.batch_rows, batch_fn=list)
    return [[int(row) % sizes.distinct for row in order[step] or ()] for step in range(sizes.batches)]


def read_rate(read: Callable[[Sequence[int]], np.ndarray], batches: list[list[int]], threads: int = 1) -> float:
    """Rows a second of a reader; a batch is dropped before the next one is read, as a training loop does."""

    def read_and_drop(numbers: list[int]) -> None:
        read(numbers)

    start = time.perf_counter()
    if threads == 1:
        for numbers in batches:
            read_and_drop(numbers)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(read_and_drop, batches))
    return sum(map(len, batches)) / (time.perf_counter() - start)


def feed_rate(source: CacheSource, sizes: FeedSizes, seed: int, *, device: bool = False) -> float:
    """Rows a second of our feed, of a long run: when the clock starts and when it ends, batches are under way.

    Were it to run from the first read to the last batch, what is read ahead behind that would count as if it were not.
    """

    def take() -> None:
        batch = next(feed)
        if device:
            jax.block_until_ready(jax.device_put(batch[TAP]))

    with make_feed(source, global_batch_rows=sizes.batch_rows, seed=seed) as feed:
        for _ in range(sizes.warm_batches):
            take()
        start = time.perf_counter()
        for _ in range(sizes.batches):
            take()
        seconds = time.perf_counter() - start
    return sizes.batches * sizes.batch_rows / seconds


def subset_bytes(cache: Path, sizes: FeedSizes) -> float:
    """Bytes read from storage for a batch of some blocks, over the bytes of these blocks."""
    blocks = [block for block in SUBSET if block < sizes.shape[0]]
    source = CacheSource(str(cache), (TAP,), blocks, direct=False)  # TensorStore counts what it reads
    numbers = range(sizes.batch_rows)
    source[numbers]  # the index's records and the rows' tokens are read once
    before = bytes_read()
    codes = sum(part.nbytes for part in source[numbers][TAP].values())
    return (bytes_read() - before) / codes


def bytes_read() -> int:
    """By TensorStore's file driver in this process, so far."""
    (metric,) = ts.experimental_collect_matching_metrics(BYTES_READ)
    return int(metric["values"][0]["value"])


OPEN_SCRIPT = """
import json, sys, time
from distillcache.schemas.runtime.memory import anonymous_kib
from distillcache.trainer.feed.cache_source import CacheSource, make_feed
before, start = anonymous_kib(), time.perf_counter()
source = CacheSource(sys.argv[1])
make_feed(source, global_batch_rows=8, seed=0).close()
seconds, memory = time.perf_counter() - start, anonymous_kib() - before
source[[len(source) - 1, len(source) - 2]]
print(json.dumps({"s": seconds, "mb": memory * 1024 / 1e6, "rows": len(source)}))
"""


def open_figures(folder: Path, sizes: FeedSizes) -> dict[str, float]:
    """Seconds and anonymous megabytes above the bare import that opening a cache of a million rows takes.

    Two rows a shard: half a million shards, with the index that real ones of 30 blocks have.
    """
    plan = synthetic_plan(sizes.million, (30, 8, 64), {"resid": "bf16", TAP: "bf16"}, shard_rows=2)
    write_large_index(folder, plan)
    environment = {**python_environment(), "JAX_PLATFORMS": "cpu"}  # an accelerator may be all this process's
    command = python_words("-c", OPEN_SCRIPT, str(folder))
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=environment)
    found: dict[str, Any] = json.loads(done.stdout)
    return {
        "open_million_rows_s": found["s"],
        "open_million_rows_mb": found["mb"],
        "open_million_rows_shards": float(plan.num_shards),
    }
