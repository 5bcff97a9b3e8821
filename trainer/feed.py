"""The feed: cached rows and taps by row number, and the Grain pipeline that turns them into batches.

A *source* is one split of a cache, indexed by row: `source[[4, 0, 9]]` is a host batch. A *slot* is a stored place on
a tap's block axis (`TapPlan.slots`). A *feed* is an endless iterator of batches: the batch at step `s` is a pure
function of the seed and `s`, so the feed's whole state is `{"seed", "next_step"}`.

Taps stay encoded, as the codec's parts: they are decoded on the device, inside the scan over blocks.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import grain
import numpy as np
import tensorstore as ts

from schemas.digest import digest_bytes
from schemas.errors import ConfigError, DamageError, DistillcacheError, InputError
from schemas.layout import MANIFEST
from schemas.manifest import PartPlan, TapPlan
from schemas.rows import Row
from schemas.segment import DAMAGE_NEXT, Segment, open_cache
from schemas.storage import Store

Batch = dict[str, Any]
SplitName = Literal["train", "eval"]

ALIGNMENT = 64  # bytes; JAX's CPU client takes aligned host arrays over without a copy
MAX_SEED = 2**32 - 1  # Grain's shuffle takes 32 bits


class CacheSource:
    """Random access to one split of a finished cache.

    `source[[i, j, ...]]` is a dict of `tokens`, `positions`, `segment_ids` int32 `[B, T]`, `loss_mask` bool `[B, T]`,
    and for every tap a dict of its codec's parts, `[S, B, T, W]`, S as in `slots`.

    Safe to use from several threads.
    """

    def __init__(
        self,
        url: str,
        taps: Sequence[str] = ("resid", "attn_out"),
        blocks: Sequence[int] | None = None,
        split: SplitName | None = None,
        *,
        leaving: bool = True,
        integrity: bool = True,
    ) -> None:
        """
        Args:
            url: the cache.
            taps: what to read beside the rows; none: rows alone.
            blocks: which blocks; None: all that are recorded.
            split: rows for training, held-out rows, or (None) all.
            leaving: read `resid` also behind the last block of every run of blocks, as `mlp_out` needs it.
            integrity: compare what is read with the cache's digests.

        Raises:
            InputError: no finished cache, or it does not hold these taps or blocks.
        """
        self.url, self.split, self._integrity = url, split, integrity
        self._store = Store(url)
        self._segment = _only_segment(open_cache(self._store), url)
        self.plan = self._segment.plan
        self.digest = digest_bytes(self._store.read(MANIFEST) or b"")  # says which cache this is, wherever it lies
        self.blocks = _chosen_blocks(self.plan.blocks, blocks, url)
        self.taps = {name: self._segment.tap(name) for name in taps}
        self.slots = {name: _slots_of(name, self.blocks, leaving) for name in taps}
        self._places = {name: _places(tap, self.slots[name], url) for name, tap in self.taps.items()}
        held_out = np.asarray(self.plan.rows.eval_indices, np.int64)
        self._held_out, self._train_before = held_out, held_out - np.arange(len(held_out))
        context = _read_context(self._store)
        self._arrays = {
            part.array: self._segment.open_array(tap, part, context) for tap in self.taps.values() for part in tap.parts
        }

    def __len__(self) -> int:
        total, held_out = self.plan.rows.count, len(self._held_out)
        return {None: total, "train": total - held_out, "eval": held_out}[self.split]

    def __repr__(self) -> str:
        taps = "".join(f", {name} {tap.codec} x {len(self.slots[name])}" for name, tap in self.taps.items())
        return (
            f"CacheSource({self.url!r}, {self.split or 'all'} rows {len(self)} x {self.plan.rows.row_tokens} tokens, "
            f"{len(self.blocks)} blocks{taps}, {self.bytes_per_row / 1e6:.3g} MB a row)"
        )

    @property
    def bytes_per_row(self) -> int:
        """Of the taps as they are read."""
        return sum(
            self._arrays[part.array].dtype.numpy_dtype.itemsize * part.width * len(self.slots[name])
            for name, tap in self.taps.items()
            for part in tap.parts
        ) * (self.plan.rows.row_tokens)

    def row_number(self, index: int) -> int:
        """The cache's number of the split's row `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} in the {self.split or 'whole'} split of {self.url}")
        if self.split == "eval":
            return int(self._held_out[index])
        if self.split == "train":
            return int(index + np.searchsorted(self._train_before, index, side="right"))
        return int(index)

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        """The batch of these rows, in this order; a row may occur twice."""
        numbers = [self.row_number(int(index)) for index in indices]
        pending = {name: self._start_tap(name, numbers) for name in self.taps}
        batch = _stack_rows([self._segment.row(number) for number in numbers], self.plan.rows.row_tokens)
        for name, parts in pending.items():
            batch[name] = {part: self._finish_part(name, part, numbers, *read) for part, read in parts.items()}
        return batch

    def _start_tap(self, name: str, numbers: list[int]) -> dict[str, tuple[np.ndarray, list[ts.Future]]]:
        """One destination `[S, B, T, W]` and one read a row, for every part of the tap; nothing is awaited."""
        started = {}
        for part in self.taps[name].parts:
            array = self._arrays[part.array]
            out = _aligned_empty((len(self.slots[name]), len(numbers), *array.shape[2:]), array.dtype.numpy_dtype)
            target = ts.array(out)
            with ts.Batch():  # the requests of one batch share the shards' indexes
                futures = [target[:, k].write(array[row, self._places[name]]) for k, row in enumerate(numbers)]
            started[part.part] = (out, futures)
        return started

    def _finish_part(
        self, name: str, part_name: str, numbers: list[int], out: np.ndarray, futures: list[ts.Future]
    ) -> np.ndarray:
        """Await every read, then compare each inner chunk with its digest."""
        tap = self.taps[name]
        part = next(part for part in tap.parts if part.part == part_name)
        failures = [(row, future.exception()) for row, future in zip(numbers, futures, strict=True)]
        for row, failure in failures:
            if failure is not None:
                raise _unreadable(self.url, part, row, failure) from failure
        if self._integrity:
            stored = np.arange(len(tap.slots))[self._places[name]]
            for k, row in enumerate(numbers):
                for s, slot in enumerate(stored):
                    self._segment.check_chunk(part.array, row, int(slot), out[s, k])
        return out


class Feed(Iterator[Batch]):
    """Batches in training order, read ahead by threads of its own; see `make_feed`."""

    def __init__(
        self, source: CacheSource, rows: int, seed: int, next_step: int, prefetch_batches: int, threads: int
    ) -> None:
        self.source, self.wait_s = source, 0.0
        self._rows, self._options = rows, grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch_batches)
        self._reading, self._idle = 0, threading.Condition()
        self._start(seed, next_step)

    def __next__(self) -> Batch:
        """The next batch; the time spent waiting for it is added to `wait_s`."""
        start = time.perf_counter()
        batch = next(self._batches)
        self.wait_s += time.perf_counter() - start
        self._next_step += 1
        return batch

    def get_state(self) -> dict[str, int]:
        """Enough to go on with the same batches, on any number of processes."""
        return {"seed": self._seed, "next_step": self._next_step}

    def set_state(self, state: dict[str, int]) -> None:
        """Go on from a state that `get_state` gave."""
        self.close()
        self._start(state["seed"], state["next_step"])

    def close(self) -> None:
        """Stop the threads; reads in flight are awaited."""
        self._batches.close()
        with self._idle:
            self._idle.wait_for(lambda: self._reading == 0)

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, seed: int, next_step: int) -> None:
        self._seed, self._next_step = seed, next_step
        order = grain.MapDataset.range(len(self.source)).shuffle(seed=seed).repeat()
        batches = order.batch(self._rows, batch_fn=list).map(self._read)
        self._batches = iter(batches.to_iter_dataset(self._options))
        self._batches.set_state({"next_index": next_step})

    def _read(self, indices: list[int]) -> Batch:
        with self._idle:
            self._reading += 1
        try:
            return self.source[indices]
        finally:
            with self._idle:
                self._reading -= 1
                self._idle.notify_all()


def make_feed(
    source: CacheSource,
    *,
    global_batch_rows: int,
    seed: int,
    start_step: int = 0,
    prefetch_batches: int = 2,
    threads: int | None = None,
) -> Feed:
    """An endless, shuffled feed.

    Rows are drawn without replacement and shuffled anew in every epoch; a batch may reach into the next epoch, so
    no row is left out, and a batch may be larger than the split.

    Args:
        global_batch_rows: rows in a batch.
        seed: of the shuffle.
        start_step: the first batch's step.
        prefetch_batches: batches held ready; 0: read when asked.
        threads: batches read at a time; default: as many as are held ready.

    Raises:
        InputError: the split holds no rows.
        ConfigError: the seed does not fit.
    """
    if len(source) == 0:
        raise InputError(
            "there are no rows to train on",
            {"cache": source.url, "rows": source.plan.rows.count, "held out": len(source.plan.rows.eval_indices)},
            "build a cache with more text, or hold out fewer rows (data.eval_rows)",
        )
    if not 0 <= seed <= MAX_SEED:
        raise ConfigError("the seed does not fit", {"seed": seed, "expected": f"0 to {MAX_SEED}"})
    wanted = prefetch_batches if threads is None else min(threads, prefetch_batches)
    return Feed(source, global_batch_rows, seed, start_step, prefetch_batches, wanted)


def _only_segment(segments: list[Segment], url: str) -> Segment:
    if len(segments) != 1:
        raise InputError("this version reads caches of one segment", {"cache": url, "segments": len(segments)})
    return segments[0]


def _chosen_blocks(recorded: tuple[int, ...], wanted: Sequence[int] | None, url: str) -> tuple[int, ...]:
    if wanted is None:
        return recorded
    missing = sorted(set(wanted) - set(recorded))
    if missing or not wanted:
        raise InputError(
            "the cache does not hold these blocks" if missing else "no block is asked for",
            {"cache": url, "missing": missing, "recorded": list(recorded)},
            "choose recorded blocks, or build a cache that has them",
        )
    return tuple(sorted(set(wanted)))


def _slots_of(tap: str, blocks: tuple[int, ...], leaving: bool) -> tuple[int, ...]:
    """The slots that these blocks need: `resid` l enters block l, l + 1 leaves it."""
    if tap != "resid" or not leaving:
        return blocks
    return tuple(sorted({*blocks, *(block + 1 for block in blocks)}))


def _places(tap: TapPlan, slots: tuple[int, ...], url: str) -> slice | list[int]:
    """Where the slots lie on the array's block axis; a slice where they are consecutive, which reads faster."""
    missing = sorted(set(slots) - set(tap.slots))
    if missing:
        raise InputError(
            "the cache does not hold these slots of a tap",
            {"cache": url, "tap": tap.name, "missing": missing},
            "choose other blocks, or build a cache that has them",
        )
    places = [tap.slots.index(slot) for slot in slots]
    consecutive = places == list(range(places[0], places[0] + len(places)))
    return slice(places[0], places[-1] + 1) if consecutive else places


def _read_context(store: Store) -> ts.Context:
    """Nothing is cached: a batch is read once. Local files are memory-mapped, which is two to three times as fast."""
    local = {"file_io_mode": {"mode": "memmap"}} if store.local is not None else {}
    return ts.Context({"cache_pool": {"total_bytes_limit": 0}, **local})


def _aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape)) * dtype.itemsize
    buffer = np.empty(size + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


def _stack_rows(rows: list[Row], row_tokens: int) -> Batch:
    batch = {
        name: np.asarray([getattr(row, name) for row in rows], np.int32).reshape(-1, row_tokens)
        for name in ("tokens", "positions", "segment_ids")
    }
    return {**batch, "loss_mask": np.asarray([row.loss_mask for row in rows], bool).reshape(-1, row_tokens)}


def _unreadable(url: str, part: PartPlan, row: int, cause: Exception) -> DistillcacheError:
    return DamageError(
        "stored activations cannot be read",
        {"cache": url, "array": part.array, "row": row, "cause": str(cause).split(" [")[0]},
        DAMAGE_NEXT,
    )
