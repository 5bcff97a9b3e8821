"""Interface of every source of batches: one split of some rows, indexed by row, with the teacher's taps of them.

A *source* is indexed like a sequence: `source[[4, 0, 9]]` is the batch of those rows. The taps are read from a cache
(cache_source.py) or computed by the teacher (online.py); which of the two makes no difference to who uses them.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from jaxtyping import Float

from distillcache.schemas.cache.addressing import (
    RowGroup,
    RowMap,
    check_same_codec,
    held_by_rows,
    shared_blocks,
    slots_of,
)
from distillcache.schemas.cache.describe import (
    Facts,
    as_html,
    as_text,
    describe_codec,
    in_bytes,
    numbers_in_runs,
    segment_words,
    teacher_words,
)
from distillcache.schemas.cache.segment import Segment
from distillcache.schemas.codecs import Codec
from distillcache.schemas.errors import InputError
from distillcache.schemas.format.layout import ITEM_BYTES
from distillcache.schemas.format.manifest import Plan, TapPlan
from distillcache.schemas.format.rows import Row, num_targets
from distillcache.schemas.format.tap_codec import tap_codec
from distillcache.trainer.feed.readers.threads import far_pool
from distillcache.trainer.feed.slots import TapReads, tap_reads

Batch = dict[str, Any]
SplitName = Literal["train", "eval"]
TARGET_ROWS = 256  # read at once while looking for a target


class Rows(Protocol):
    """The part of a source that a feed needs."""

    @property
    def url(self) -> str: ...

    @property
    def split(self) -> SplitName | None: ...

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Sequence[int], /) -> Batch: ...


class Source(ABC):
    """Random access to one split of some rows.

    `source[[i, j, ...]]` is a dict of `tokens`, `positions`, `segment_ids` int32 `[B, T]`, `loss_mask` bool `[B, T]`,
    all on the host, and for every tap a dict of its codec's parts, `[S, B, T, W]`; of `topk_logits`, which belongs to
    no block, S is 1.

    url: where the rows are. plan: of the segment that brought them first. blocks: those whose taps are there, and
    slots[tap] what they need of a tap. reads[tap].at says where a slot lies on S; taps[tap] is its plan and
    codecs[tap] decodes. digest: says what the batches are made of, wherever that lies. partial: whether there will be
    more rows.
    """

    def __init__(
        self,
        url: str,
        groups: Sequence[RowGroup],
        taps: Sequence[str],
        blocks: Sequence[int] | None,
        split: SplitName | None,
        leaving: bool,
        slots: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        """See `CacheSource`. One decoder serves all rows, so all segments must store a tap alike.

        Raises:
            InputError: the groups do not hold these taps or blocks, or not so that they can be read together.
        """
        self.url, self._groups = url, tuple(groups)
        self.split: SplitName | None = split
        self.plan: Plan = self._groups[0].base.plan
        self.digest, self.partial = "", False
        chosen = slots or {}
        self.blocks = _chosen_blocks(self._groups, [name for name in taps if name not in chosen], blocks, url)
        self.slots = {
            name: tuple(chosen[name]) if name in chosen else _slots_of(name, self.blocks, leaving) for name in taps
        }
        self.taps: dict[str, TapPlan] = {}
        self.codecs: dict[str, Codec] = {}
        for name in taps:
            located = [pair[:2] for group in self._groups for pair in group.locate(name, self.slots[name])]
            check_same_codec(name, located)
            segment, self.taps[name] = located[0]
            self.codecs[name] = tap_codec(self.taps[name], segment.signs() if self.taps[name].rotate else {})
        self._reads = self._all_reads()
        self.reads: Mapping[str, TapReads] = self._reads[0]
        self._rows = RowMap(self._groups, [_used_segments(reads) for reads in self._reads])
        self._train_before = self._rows.held_out - np.arange(len(self._rows.held_out))

    def _all_reads(self) -> list[dict[str, TapReads]]:
        """Return the reads of every tap, for each group of rows."""
        found = [
            {name: tap_reads(group, name, self.codecs[name], self.slots[name]) for name in self.taps}
            for group in self._groups
        ]
        for name, first in found[0].items():
            if any(reads[name].at != first.at for reads in found):
                raise InputError(
                    "the segments of a cache store the slots of a delta-coded tap at different indices",
                    {"cache": self.url, "tap": name},
                    "read a copy: distillcache copy joins the segments",
                )
        return found

    @abstractmethod
    def __getitem__(self, indices: Sequence[int]) -> Batch:
        """The batch of these rows, in this order; a row may occur twice. Safe to call from several threads."""

    def __len__(self) -> int:
        total, held_out = len(self._rows), len(self._rows.held_out)
        return {None: total, "train": total - held_out, "eval": held_out}[self.split]

    def __repr__(self) -> str:
        return as_text(f"{type(self).__name__}({self.url!r})", self._facts())

    def _repr_html_(self) -> str:
        """Return the text that a notebook shows."""
        return as_html(f"{type(self).__name__} of {self.url}", self._facts())

    def _facts(self) -> Facts:
        """Return facts about the cache, and about what this source reads of it."""
        total, held_out = len(self._rows), len(self._rows.held_out)
        which = {None: "all", "train": "those for training", "eval": "those held out"}[self.split]
        state = ", partial: those of committed shards" if self.partial else ""
        rows = f"{total - held_out:,} train + {held_out:,} eval of {self.plan.rows.row_tokens:,} tokens{state}"
        taps = [
            (name, f"{described}, codec {describe_codec(tap)}")
            for name, tap in self.taps.items()
            for described in [self._described_stack(name, tap)]
        ]
        return [
            ("rows", f"{rows}; read here: {which}, {len(self):,}"),
            ("blocks", f"{len(self.blocks)} of {self.plan.teacher.num_blocks}: {numbers_in_runs(self.blocks)}"),
            *taps,
            ("batch", f"{in_bytes(self.bytes_per_row)} a row"),
            ("teacher", teacher_words(self.plan)),
            *segment_words(self.segments()),
        ]

    def _described_stack(self, name: str, tap: TapPlan) -> str:
        """The shape of a tap's codes in a batch."""
        part = tap.parts[0]
        shape = f"[{self.reads[name].size(part)}, B, {self.plan.rows.row_tokens}, {part.width}]"
        kind = f"{part.dtype} (the bits of {part.bits_of})" if part.bits_of else part.dtype
        return f"{shape} {kind}"

    def decode(self, batch: Batch, name: str) -> Float[np.ndarray, "S B T D"]:
        """Decode a tap of one of this source's batches to float32, in the order of `slots[name]`; of `topk_logits` the
        values.

        For people: training decodes on the device, inside its scan over blocks.

        Raises:
            InputError: the source does not read this tap.
        """
        if name not in self.taps:
            facts = {"cache": self.url, "tap": name, "read": ", ".join(self.taps) or "none"}
            raise InputError("this source does not read the tap", facts, "name it in taps=(...)")
        tap, codec, stacks = self.taps[name], self.codecs[name], batch[name]
        if tap.k is not None:
            logits: Any = codec.decode(stacks)
            return np.asarray(logits.values, np.float32)
        found: dict[int, np.ndarray] = {}
        wanted = [self.reads[name].at[slot] for slot in self.slots[name]]
        carry: Any = codec.start((len(batch["tokens"]), self.plan.rows.row_tokens, self.plan.teacher.hidden_size))
        for place in sorted({each for last in wanted for each in range(codec.first_slot(last), last + 1)}):
            parts = {part.part: stacks[part.part][place // part.every] for part in tap.parts}
            carry, value = codec.decode_slot(carry, parts, place)
            found[place] = np.asarray(value, np.float32)
        return np.stack([found[place] for place in wanted])

    @property
    def bytes_per_row(self) -> int:
        """Bytes of a row's taps as they are in a batch."""
        return sum(
            ITEM_BYTES[part.dtype] * part.width * len(self.reads[name].of_part(part))
            for name, tap in self.taps.items()
            for part in tap.parts
        ) * (self.plan.rows.row_tokens)

    def has_targets(self) -> bool:
        """Return whether any token of the split is a target. Rows are read until one has targets: usually one row."""
        start = 0
        while start < len(self):
            stop = min(max(2 * start, 1), start + TARGET_ROWS, len(self))
            batch = self._row_batch(self._places(range(start, stop)))
            if num_targets(batch["segment_ids"], batch["loss_mask"]):
                return True
            start = stop
        return False

    def segments(self) -> list[Segment]:
        """All segments of the cache."""
        return [segment for group in self._groups for segment in group.segments]

    def stored(self, tap: str) -> tuple[int, ...]:
        """The slots of a tap that are stored of all rows, whether this source reads them or not.

        Raises:
            InputError: the tap is of no row, or of some rows only.
        """
        shared_blocks(self._groups, (tap,))
        for group in self._groups:
            group.holding(tap)
        return tuple(sorted(set.intersection(*(group.slots(tap) for group in self._groups))))

    def holds(self, name: str, slot: int) -> bool:
        """Return whether this slot of a tap is recorded of all rows."""
        return all(slot in group.slots(name) for group in self._groups)

    @property
    def keeps_head(self) -> bool:
        """Return whether the cache keeps the teacher's last norm and head."""
        return any(segment.plan.keeps_head for segment in self.segments())

    def attention_norms(self) -> np.ndarray:
        """The weights of the teacher's attention norms, float32 `[L, D]`, as the cache keeps them.

        Raises:
            InputError: the teacher has none.
        """
        found = self._groups[0].base.side().get("attention_norm")
        if found is None:
            raise InputError(
                "there is no normed input to inject: the teacher norms attention's output, or its input by a LayerNorm",
                {"cache": self.url, "family": self.plan.teacher.family, "inject": "attn_in"},
                "leave inject at resid",
            )
        return found

    def row_number(self, index: int) -> int:
        """The number, through all rows, of the split's row `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} in the {self.split or 'whole'} split of {self.url}")
        if self.split == "eval":
            return int(self._rows.held_out[index])
        if self.split == "train":
            return int(index + np.searchsorted(self._train_before, index, side="right"))
        return int(index)

    def _places(self, indices: Sequence[int]) -> list[tuple[int, int]]:
        """(group, row in it) of rows of the split."""
        return [self._rows.locate(self.row_number(int(index))) for index in indices]

    def _row_batch(self, places: Sequence[tuple[int, int]]) -> Batch:
        """The batch of these (group, row in it), without taps."""
        rows = read_rows([(self._groups[group].base, row) for group, row in places])
        return stack_rows(rows, self.plan.rows.row_tokens)


def read_rows(places: Sequence[tuple[Segment, int]]) -> list[Row]:
    """These (segment, row in it); from a bucket at the same time, since each may be in another file."""
    if places and places[0][0].store.is_bucket:
        return list(far_pool().map(lambda place: place[0].row(place[1]), places))
    return [segment.row(row) for segment, row in places]


def stack_rows(rows: Sequence[Row], row_tokens: int) -> Batch:
    """Rows as `[B, T]` each; B may be 0."""
    kinds = {"tokens": np.int32, "positions": np.int32, "segment_ids": np.int32, "loss_mask": bool}
    batch = {name: np.empty((len(rows), row_tokens), kind) for name, kind in kinds.items()}
    for place, row in enumerate(rows):
        for name, stacked in batch.items():
            stacked[place] = getattr(row, name)
    return batch


def _used_segments(reads: Mapping[str, TapReads]) -> list[Segment]:
    return [source.segment for tap in reads.values() for source in tap.sources]


def _chosen_blocks(
    groups: Sequence[RowGroup], taps: Sequence[str], wanted: Sequence[int] | None, url: str
) -> tuple[int, ...]:
    recorded = shared_blocks(groups, taps)
    if wanted is None:
        return recorded
    missing = sorted(set(wanted) - set(recorded))
    if missing or not wanted:
        facts = {"cache": url, "missing": missing, "recorded": list(recorded)}
        raise InputError(
            "the cache lacks these blocks" if missing else "no block is requested",
            facts | held_by_rows(groups),
            "choose recorded blocks, or build a cache that has them",
        )
    return tuple(sorted(set(wanted)))


def _slots_of(tap: str, blocks: tuple[int, ...], leaving: bool) -> tuple[int, ...]:
    """The slots that these blocks need: `resid` l enters block l, l + 1 leaves it."""
    return blocks if tap == "resid" and not leaving else tuple(sorted(slots_of(tap, blocks)))
