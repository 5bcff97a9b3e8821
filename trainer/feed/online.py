"""The teacher in the loop: a source that computes the taps of its rows instead of reading them.

    teacher = open_teacher("cache")  # trainer/feed/teacher.py; the weights are on the device once
    train, held_out = (OnlineSource(teacher, split=split) for split in ("train", "eval"))

It runs the function that `build` runs (models/recorder.py), compiled for the same shapes: each *call* takes
`batch_rows` rows, the last one filled up with padding, and records all that the build recorded; what a source does not
need is left out afterwards, so that XLA has no other program to choose other bits in. So a run from a lossless
cache and an online run on its rows see the same bits, as long as a row's codes depend on nothing but the row. That is
so on CPUs (tests/trainer/feed/test_online.py); where it is not, `exact` runs every row in the batch that it was built
in. The first call on a cache's rows is compared with the digests that the cache keeps, and a difference is told.

Codes stay on the device. The lock around the device admits one batch at a time, whichever thread of a feed asks;
rows are read, and the student steps, meanwhile.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash

from distillcache.models.recorder import Recording, raise_if_too_large
from distillcache.models.routing import RouterSums
from distillcache.schemas.cache.segment import Segment
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import NonFiniteError
from distillcache.schemas.format.manifest import TapPlan
from distillcache.schemas.format.rows import Row, teacher_batch
from distillcache.trainer.feed.slots import SlotReads
from distillcache.trainer.feed.source import Batch, Source, SplitName
from distillcache.trainer.feed.teacher import OnlineTeacher, Recorder

log = logging.getLogger(__name__)

RowAddress = tuple[int, int]  # (group, row in it)
ROUTER = "teacher_router"
Parts = dict[str, dict[str, jax.Array]]  # tap -> part -> codes


class OnlineSource(Source):
    """One split of a teacher's rows; taps are computed, and stay on its device.

    With a teacher that has experts, a batch also has `teacher_router`: `RouterSums` of every row, `[Lm, B, ...]`, on
    the host. Safe to use from several threads.
    """

    def __init__(
        self,
        teacher: OnlineTeacher,
        taps: Sequence[str] = ("resid", "attn_out"),
        blocks: Sequence[int] | None = None,
        split: SplitName | None = None,
        *,
        leaving: bool = True,
        slots: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """As `CacheSource`. Without taps the teacher is never run.

        Raises:
            InputError: the plans do not have these taps or blocks.
        """
        super().__init__(teacher.url, teacher.groups, taps, blocks, split, leaving, slots)
        self._teacher, self.digest = teacher, teacher.digest
        self._works: list[_Work] = []
        for group, reads in enumerate(self._reads):
            for name, tap in reads.items():
                for source in tap.sources:
                    self._work_of(group, source.segment).reads[name] = source.reads
        self._works = _merged(self._works)

    def _work_of(self, group: int, segment: Segment) -> "_Work":
        for work in self._works:
            if work.segments.get(group) is segment:
                return work
        self._works.append(_Work(self._teacher.recorder(segment), {}, {group: segment}))
        return self._works[-1]

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        addresses = self._places(indices)
        batch = self._row_batch(addresses)
        calls = [(work, call) for work in self._works for call in self._calls(work, addresses)]
        arrays = [self._arrays(work, call) for work, call in calls]
        with self._teacher.lock:
            out, routed = self._zeros(len(addresses)), {}
            recorded: list[tuple[_Work, _Call, Recording]] = []
            for (work, call), tokens in zip(calls, arrays, strict=True):
                recording = work.recorder.record(work.recorder.parameters, *map(jnp.asarray, tokens))
                moves = call.moves(len(addresses))
                out |= work.put({name: out[name] for name in work.reads}, recording.codes, moves, len(call.pairs))
                if recording.router is not None:
                    routed = {ROUTER: call.put_rows(routed.get(ROUTER), recording.router, len(addresses))}
                recorded.append((work, call, recording))
                if len(recorded) > 1:  # one call is being computed, one waits: no more of them in memory
                    self._settle(*recorded.pop(0))
            for each in recorded:
                self._settle(*each)
            jax.block_until_ready(out)  # so that waiting for the teacher counts as waiting for data
        return {**batch, **out, **routed}

    def _zeros(self, rows: int) -> Parts:
        """The batch's stacks `[S, B, T, W]`; what no call fills stays zero, as in a cache's batch."""
        tokens = self.plan.rows.row_tokens
        return {
            name: {
                part.part: jnp.zeros((self.reads[name].size(part), rows, tokens, part.width), part.dtype)
                for part in tap.parts
            }
            for name, tap in self.taps.items()
        }

    def _calls(self, work: "_Work", addresses: Sequence[RowAddress]) -> Iterator["_Call"]:
        """The teacher's calls for the rows of a batch that belong to this work."""
        wanted = [(k, address) for k, address in enumerate(addresses) if address[0] in work.segments]
        size = work.recorder.batch_rows
        rows = list(dict.fromkeys(address for _, address in wanted))
        if self._teacher.exact:
            batches = [
                [(group, row) for row in range(first, min(first + size, work.segments[group].plan.rows.count))]
                for group, first in dict.fromkeys((group, row - row % size) for group, row in rows)
            ]
        else:
            batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        for batch in batches:
            at = {address: k for k, address in enumerate(batch)}
            yield _Call(batch, [(at[address], k) for k, address in wanted if address in at])

    def _arrays(self, work: "_Work", call: "_Call") -> list[np.ndarray]:
        rows: list[Row] = [self._groups[group].base.row(row) for group, row in call.rows]
        return teacher_batch(rows, work.recorder.batch_rows, self.plan.rows.row_tokens)

    def _settle(self, work: "_Work", call: "_Call", recording: Recording) -> None:
        """Wait for a call, and check what it gave.

        Raises:
            NonFiniteError: the teacher gave numbers that are not finite, or whose squares are not, as a build would
                raise it.
        """
        for tap in work.recorder.taps:
            counts = np.asarray(recording.sums[tap.name].nonfinite)[: len(call.rows)]
            if counts.any():
                raise _not_finite(self.url, tap, call.rows, counts)
            squares, largest = (np.asarray(part)[: len(call.rows)] for part in recording.sums[tap.name][:2])
            raise_if_too_large(tap.name, tap.slots, squares, largest, [row for _, row in call.rows])
        if not work.recorder.checked:
            work.recorder.checked = True
            _compare(self.url, work, call, recording)


@dataclass(frozen=True)
class _Call:
    """One run of the teacher. rows: what it is given. pairs: (row of the call, row of the batch that it becomes)."""

    rows: list[RowAddress]
    pairs: list[tuple[int, int]]

    def put_rows(self, sums: RouterSums | None, found: RouterSums, batch: int) -> RouterSums:
        """`sums` of a batch's rows, `[Lm, batch, ...]`, with those of this call in their places."""
        of_call = [np.asarray(value) for value in found]
        if sums is None:
            sums = RouterSums(*(np.zeros((len(v), batch, *v.shape[2:]), v.dtype) for v in of_call))  # type: ignore[arg-type]
        for place, value in zip(sums, of_call, strict=True):
            for take, to in self.pairs:
                place[:, to] = value[:, take]  # type: ignore[index] - arrays of the host
        return sums

    def moves(self, batch: int) -> np.ndarray:
        """`pairs` as an array `[batch, 2]`, as many as there can be, so that one compiled function does."""
        moves = np.zeros((batch, 2), np.int32)
        moves[: len(self.pairs)] = self.pairs
        return moves


@dataclass(eq=False)
class _Work:
    """The work of one recorder for a source's batches. reads: of each tap. segments: group -> whose taps they are."""

    recorder: Recorder
    reads: dict[str, SlotReads]
    segments: dict[int, Segment]
    put: Any = field(init=False)

    def __post_init__(self) -> None:
        @partial(jax.jit, donate_argnums=0)
        def put(out: Parts, codes: Parts, moves: jax.Array, count: int) -> Parts:
            """`out` `[S, B, T, W]` with rows of `codes` `[batch_rows, stored slots, T, W]`: the first `count` moves.

            Row by row and in place, which is as fast as a copy; XLA's scatter on CPU takes ten times as long.
            """

            def move(k: jax.Array, out: Parts) -> Parts:
                take, to = moves[k]
                return {
                    name: {
                        part.part: _put_row(out[name][part.part], codes[name][part.part][take], to, reads.runs(part))
                        for part in parts[name]
                    }
                    for name, reads in self.reads.items()
                }

            parts = {tap.name: tap.parts for tap in self.recorder.taps}
            return jax.lax.fori_loop(0, count, move, out)

        self.put = put


def _put_row(out: jax.Array, row: jax.Array, to: jax.Array, runs: Sequence[tuple[slice, slice]]) -> jax.Array:
    """`out` `[S, B, T, W]` with slots of `row` `[stored slots, T, W]` at place `to` of B; runs: (on S, of the row)."""
    for place, slot in runs:
        out = jax.lax.dynamic_update_slice(out, row[slot][:, None], (place.start, to, 0, 0))
    return out


def _merged(works: Sequence[_Work]) -> list[_Work]:
    """Works of several groups that give the same are one: their rows share calls."""
    merged: list[_Work] = []
    for work in works:
        for other in merged:
            if (
                other.recorder is work.recorder
                and other.reads == work.reads
                and not other.segments & work.segments.keys()
            ):
                other.segments |= work.segments
                break
        else:
            merged.append(work)
    return merged


def _compare(url: str, work: _Work, call: _Call, recording: Recording) -> None:
    """Say on standard error if the teacher gives other codes than those whose digests the cache keeps."""
    total = differing = 0
    for name, part in ((tap.name, part) for tap in work.recorder.taps for part in tap.parts if tap.name in work.reads):
        codes, slots = np.asarray(recording.codes[name][part.part]), work.reads[name].of_part(part)
        for k, (group, row) in enumerate(call.rows):
            digests = work.segments[group].chunk_digests(part.array, row)
            for _, slot in slots:
                found = xxhash.xxh3_64_intdigest(np.ascontiguousarray(codes[k, slot]).data)
                differing, total = differing + (found != digests[slot]), total + 1
    if differing:
        log.warning(
            f"the teacher gives different bits here than when {url} was built ({differing} of the first {total} "
            "chunks differ): the numbers of this run will not be those of a run from the cache"
        )


def _not_finite(url: str, tap: TapPlan, rows: Sequence[RowAddress], counts: np.ndarray) -> NonFiniteError:
    row, slot = min(np.argwhere(counts).tolist(), key=lambda place: (place[1], place[0]))
    return NonFiniteError(
        "the teacher gave numbers that are not finite",
        {
            "rows": url,
            "row": rows[row][1],
            "slot": tap.slots[slot],
            "tap": tap.name,
            "found": f"{counted(counts[row, slot], 'number')} that are NaN or infinite",
        },
        "check the teacher's weights, or compute in another dtype: online.dtype: float32",
    )
