"""The parts of a copy that its repair uses too: the selected rows, the files beside them, and the transcoding loop."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import safetensors.numpy

from distillcache.cache_builder.grow.transcode import TapCopy, transcode
from distillcache.cache_builder.record.fixed_files import array_files
from distillcache.cache_builder.record.pipeline import ShardWriter
from distillcache.cache_builder.record.work_units import Batches, keep_batch
from distillcache.schemas.cache.addressing import RowGroup, RowMap
from distillcache.schemas.cache.segment import read_tokenizer
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import InputError
from distillcache.schemas.format import layout
from distillcache.schemas.format.manifest import Plan
from distillcache.schemas.format.rows import Row
from distillcache.schemas.format.tap_codec import signs_of
from distillcache.schemas.runtime.progress import Progress
from distillcache.schemas.store.store import Store


class SelectedRows:
    """The chosen rows of a cache, renumbered from 0."""

    def __init__(self, groups: Sequence[RowGroup], wanted: str) -> None:
        self.groups, self.wanted = groups, wanted
        self._map = RowMap(groups, [()] * len(groups))
        self.numbers = self._choose(wanted)
        # The groups that the chosen rows lie in, by their numbers.
        self.used = {int(number): groups[number] for number in np.unique(self._map.groups(self.numbers))}
        self.eval_indices = tuple(np.flatnonzero(np.isin(self.numbers, self._map.held_out)).tolist())

    def _choose(self, wanted: str) -> np.ndarray:
        everything = np.arange(len(self._map))
        held_out = np.isin(everything, self._map.held_out)
        if wanted in ("train", "eval"):
            chosen = everything[held_out == (wanted == "eval")]
        elif wanted == "all":
            chosen = everything
        else:
            start, stop = map(int, wanted.split(":"))
            chosen = everything[start:stop] if stop <= len(everything) else everything[:0]
        if not len(chosen):
            raise InputError(
                "the cache lacks these rows",
                {"cache": self.groups[0].base.store.url, "rows": wanted, "found": counted(len(everything), "row")},
                "choose rows that it has",
            )
        return chosen

    @property
    def is_whole(self) -> bool:
        """Return whether these are all rows of the one segment that brought any."""
        return len(self.groups) == 1 and len(self.numbers) == len(self._map)

    def slice(self, start: int, stop: int) -> list[Row]:
        """Rows `start` to `stop - 1` of the copy."""
        return [self.groups[group].base.row(row) for group, row in self.places(start, stop)]

    def places(self, start: int, stop: int) -> list[tuple[int, int]]:
        """(group, row in it) of rows `start` to `stop - 1` of the copy."""
        return [self._map.locate(int(number)) for number in self.numbers[start:stop]]


def copied_files(source: Store, groups: Sequence[RowGroup], plan: Plan) -> dict[str, bytes]:
    """Return the files that do not depend on the rows, by key."""
    side = {name: value for name, value in groups[0].base.side().items() if not name.startswith("signs.")}
    head = {}
    if plan.keeps_head:
        (keeping, *_) = (each for group in groups for each in group.segments if each.plan.keeps_head)
        head = {layout.head_key(plan.segment): keeping.small_file(layout.HEAD_FILE)}
    return {
        layout.TOKENIZER: read_tokenizer(source),
        f"{layout.segment_prefix(plan.segment)}/side.safetensors": safetensors.numpy.save({**side, **signs_of(plan)}),
        **head,
        **array_files(plan),
    }


@dataclass(frozen=True)
class Copying:
    """Hands the source's rows, transcoded, to the writer."""

    plan: Plan
    rows: SelectedRows

    def run(self, batches: Batches, writer: ShardWriter, bar: Progress) -> None:
        """Every batch: read, decoded where its codec changes, encoded, and handed on."""
        signs = signs_of(self.plan)
        copies = {
            number: {tap.name: TapCopy(group, tap, signs) for tap in self.plan.taps}
            for number, group in self.rows.used.items()
        }
        for first, rows in batches:
            places = self.rows.places(first, first + len(rows))
            begun = time.perf_counter()
            keep_batch(self.plan, writer, bar, first, rows, transcode(copies, rows, places), begun)
        writer.wait()
