"""Rows of a cache by number, finished or not, with their decoded taps.

Rows are numbered as planned, so that row 17 is the same one while the cache is still being built. One row of one tap is
read at a time, checked against the digests, and decoded slot by slot: memory does not grow with the cache.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import xxhash
from jaxtyping import Float

from distillcache.cache_builder.repair.check_shard import check_object, stored_objects
from distillcache.models.text.cache_tokenizer import cache_tokenizer
from distillcache.schemas.cache.addressing import RowGroup, row_groups
from distillcache.schemas.cache.describe import (
    Facts,
    as_html,
    as_text,
    describe_codec,
    numbers_in_runs,
    segment_words,
    teacher_words,
)
from distillcache.schemas.cache.segment import Segment, open_cache
from distillcache.schemas.codecs import Codec, TopK
from distillcache.schemas.errors import DamageError, InputError
from distillcache.schemas.format import layout
from distillcache.schemas.format.manifest import TOPK_LOGITS, PartPlan, TapPlan
from distillcache.schemas.format.rows import Row
from distillcache.schemas.format.tap_codec import tap_codec
from distillcache.schemas.store.buckets import FAILURES
from distillcache.schemas.store.disk_errors import step_for
from distillcache.schemas.store.store import Store

TAP_ORDER = ("resid", "attn_out", "mlp_out")  # as a block computes them; `topk_logits` belongs to no block


class StoredTap:
    """One tap of one segment, with its codec."""

    def __init__(self, segment: Segment, tap: TapPlan) -> None:
        self.segment, self.tap = segment, tap
        self.codec: Codec = tap_codec(tap, segment.signs() if tap.rotate else {})
        context = segment.store.context({"cache_pool": {"total_bytes_limit": 0}})  # a row is read once
        self._arrays = {part.part: segment.open_array(part, context) for part in tap.parts}
        self._decode = jax.jit(self.codec.decode_slot)
        self._round_trip = jax.jit(lambda values: self.codec.decode(self.codec.encode(values)))

    def read(self, row: int, stored: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """The codes of a row, by part, `[slots of the part, T, W]`; places of slots that are not read hold zeros.

        Args:
            row: its number in the segment.
            stored: which stored slots; None: all.

        Raises:
            DamageError: they are not what was committed.
        """
        wanted = range(len(self.tap.slots)) if stored is None else stored
        return {part.part: self._read_part(part, row, _of_part(part, wanted)) for part in self.tap.parts}

    def _read_part(self, part: PartPlan, row: int, places: list[int]) -> np.ndarray:
        self.segment.check_row_inside(part, row)
        digests = self.segment.chunk_digests(part.array, row)
        out = np.zeros((part.slots, self.segment.plan.rows.row_tokens, part.width), part.dtype)

        def read() -> bytes:
            try:
                return np.asarray(self._arrays[part.part][row, places].read().result()).tobytes()
            except FAILURES:
                return b""

        def check(data: bytes) -> np.ndarray:
            if not data and places:
                raise damage_of(self.segment, part, row, places)
            out[places] = np.frombuffer(data, part.dtype).reshape(len(places), *out.shape[1:])
            wrong = [slot for slot in places if xxhash.xxh3_64_intdigest(out[slot].data) != digests[slot]]
            if wrong:
                raise damage_of(self.segment, part, row, wrong)
            return out

        return self.segment.store.checked(read, check)

    def decoded(
        self, codes: dict[str, np.ndarray], stored: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Float[np.ndarray, "T D"]]]:
        """(slot, its numbers in float32) of codes `[S, T, W]`; with `stored`, those alone, ascending."""
        wanted = set(range(len(self.tap.slots)) if stored is None else stored)
        carry = None
        for place in sorted({each for slot in wanted for each in range(self.codec.first_slot(slot), slot + 1)}):
            parts = {part.part: codes[part.part][place // part.every] for part in self.tap.parts}
            if self.tap.k is not None:
                value: Any = self.codec.decode(parts)
            else:
                if carry is None:
                    carry = self.codec.start((self.segment.plan.rows.row_tokens, self.hidden))
                carry, value = self._decode(carry, parts, place)
            if place in wanted:
                numbers = value.values if isinstance(value, TopK) else value
                yield self.tap.slots[place], np.asarray(numbers, np.float32)

    def kept(self, values: Float[np.ndarray, "S T D"]) -> Float[np.ndarray, "S T D"]:
        """Return other numbers for the same slots after a round trip through the codec."""
        return np.asarray(self._round_trip(values), np.float32)

    @property
    def hidden(self) -> int:
        return self.segment.plan.teacher.hidden_size

    def needed(self, slots: Sequence[int]) -> list[int]:
        """The stored slots that must be read to decode these slots (as the plan numbers them)."""
        stored = [self.tap.slots.index(slot) for slot in slots]
        return sorted({each for slot in stored for each in range(self.codec.first_slot(slot), slot + 1)})


class StoredRows:
    """All rows of a cache. `len` counts the planned ones; `committed(number)` says whether a row is there yet."""

    def __init__(self, url: str) -> None:
        """
        Raises:
            InputError: there is no cache here.
        """
        self.store = Store(url)
        self.segments = open_cache(self.store, partial=True)
        self.groups: tuple[RowGroup, ...] = row_groups(self.segments)
        self.plan = self.groups[0].base.plan
        self.finished = all(segment.committed is None for segment in self.segments)
        self._starts = np.cumsum([0, *(group.base.plan.rows.count for group in self.groups)])
        self._taps: dict[tuple[str, str], StoredTap] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        return as_text(f"StoredRows({self.store.url!r})", self._facts())

    def _repr_html_(self) -> str:
        """Return the text that a notebook shows."""
        return as_html(f"StoredRows of {self.store.url}", self._facts())

    def _facts(self) -> Facts:
        """Return facts about the cache; taps as `slots` gives them."""
        own = [group.base.plan.rows for group in self.groups]
        held_out, plan = sum(len(rows.eval_indices) for rows in own), self.plan
        taps = [
            (
                tap.name,
                f"[{plan.rows.row_tokens}, {tap.numbers_per_token(plan.teacher.hidden_size)}] float32 in slots "
                f"{numbers_in_runs(tap.slots)}, codec {describe_codec(tap)}, "
                f"{sum(part.bytes_per_token for part in tap.parts):,} bytes a token",
            )
            for segment in self.segments
            for tap in segment.plan.taps
        ]
        rows = f"{len(self) - held_out:,} train + {held_out:,} eval of {plan.rows.row_tokens:,} tokens"
        state = "" if self.finished else "; not finished: `committed(number)` tells which rows exist"
        facts = [("rows", rows + state), ("tokens", f"{sum(rows.tokens for rows in own):,} without padding")]
        return [*facts, *taps, ("teacher", teacher_words(plan)), *segment_words(self.segments)]

    def locate(self, number: int) -> tuple[int, int]:
        """(group, row in it).

        Raises:
            InputError: the cache plans no such row.
        """
        if not 0 <= number < len(self):
            raise InputError(
                "the cache has no such row",
                {"cache": self.store.url, "row": number, "rows": f"0 to {len(self) - 1}"},
                "choose one of these",
            )
        group = int(np.searchsorted(self._starts, number, side="right")) - 1
        return group, number - int(self._starts[group])

    def committed(self, number: int) -> bool:
        """Return whether the row's shard is committed in the segment that brought it."""
        group, row = self.locate(number)
        return has_row(self.groups[group].base, row)

    def shard(self, number: int) -> tuple[str, int]:
        """(segment, shard) that holds the row's tokens."""
        group, row = self.locate(number)
        plan = self.groups[group].base.plan
        return plan.segment, row // plan.shard_rows

    def row(self, number: int) -> Row:
        """Its tokens and masks.

        Raises:
            InputError: it is not committed yet.
            DamageError: it is not what was committed.
        """
        group, row = self.locate(number)
        return self.groups[group].base.row(row)

    def text(self, number: int) -> list[str]:
        """The documents of a row, as the cache's tokenizer reads them; padding left out.

        Raises:
            DistillcacheError: the cache has lost its tokenizer.
        """
        row, tokenizer = self.row(number), cache_tokenizer(self.store, self.plan)
        documents = [row.tokens[row.segment_ids == each] for each in np.unique(row.segment_ids[row.segment_ids > 0])]
        return [tokenizer.decode(tokens.tolist()) for tokens in documents]

    def taps(self, number: int) -> list[StoredTap]:
        """List the sources of a row's taps so far, in the order in which a block computes them."""
        group, row = self.locate(number)
        found = [
            self._open(segment, tap)
            for segment in self.groups[group].segments
            if has_row(segment, row)
            for tap in segment.plan.taps
        ]
        order = {name: place for place, name in enumerate((*TAP_ORDER, TOPK_LOGITS))}
        return sorted(found, key=lambda stored: order[stored.tap.name])

    def tap_names(self, number: int) -> list[str]:
        return list(dict.fromkeys(stored.tap.name for stored in self.taps(number)))

    def slots(
        self, number: int, name: str, wanted: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Float[np.ndarray, "T D"]]]:
        """(slot, its numbers) of a tap of one row, ascending within a segment; None: all that are stored.

        Raises:
            DamageError: what is stored is not what was committed.
        """
        _, row = self.locate(number)
        left = None if wanted is None else set(wanted)
        seen: set[int] = set()
        for stored in self.taps(number):
            slots = [slot for slot in stored.tap.slots if (left is None or slot in left) and slot not in seen]
            if stored.tap.name != name or not slots:
                continue
            seen |= set(slots)
            codes = stored.read(row, stored.needed(slots))
            yield from stored.decoded(codes, [stored.tap.slots.index(slot) for slot in slots])

    def sample(self, count: int, seed: int) -> list[int]:
        """Numbers of committed rows, ascending: from as many shards as possible, then rows drawn in each of them."""
        drawn = random.Random(seed)  # draws from a range without making a list of it
        shards = [
            (int(start), group.base, shard)
            for start, group in zip(self._starts, self.groups, strict=False)
            for shard in _drawn_shards(group.base, count, drawn)
        ]
        picks = []
        for start, base, shard in shards:
            first, stop = base.plan.shard_range(shard)
            picks.append([start + row for row in drawn.sample(range(first, stop), min(count, stop - first))])
        turns = [pick[turn] for turn in range(count) for pick in picks if turn < len(pick)]
        last = len(self) - 1  # rows are packed: padding is at the end of the last one, if anywhere
        chosen = turns[:count]
        if count > 1 and last not in chosen and self.committed(last):
            chosen = [*chosen[:-1], last] if len(chosen) == count else [*chosen, last]
        return sorted(chosen)

    def _open(self, segment: Segment, tap: TapPlan) -> StoredTap:
        key = (segment.plan.segment, tap.name)
        if key not in self._taps:
            self._taps[key] = StoredTap(segment, tap)
        return self._taps[key]


def finite(values: np.ndarray) -> np.ndarray:
    """NaN and infinite numbers as zeros."""
    return np.where(np.isfinite(values), values, np.zeros((), values.dtype))


def lengths(values: np.ndarray) -> np.ndarray:
    """The norm of every vector, float64 `[*A]` of `[*A, D]`: float32's squares overflow above 1.8e19."""
    return np.linalg.norm(values.astype(np.float64), axis=-1)


def has_row(segment: Segment, row: int) -> bool:
    """Return whether a segment has committed the shard of one of its rows."""
    return segment.committed is None or row // segment.plan.shard_rows in segment.committed


def repair_of(segment: Segment) -> str:
    """Return how damage in a segment is repaired."""
    if segment.plan.copied_from is not None:
        return f"restore it: distillcache copy <its source> {segment.store.url} --repair"
    return "recompute it: distillcache build --repair"


def damage_of(segment: Segment, part: PartPlan, row: int, slots: Sequence[int]) -> DamageError:
    """Return the damage of the object that holds one of these stored slots, in the words of `verify`."""
    shard = row // segment.plan.shard_rows
    for slot in slots:
        key = layout.object_key(segment.plan.segment, part.array, shard, slot // part.slots_per_object)
        for stored in stored_objects(segment.plan, 0, shard, segment.record(shard)):
            fault = check_object(segment.store, segment.plan, stored, False) if stored.key == key else None
            if fault is not None:
                facts = {"file": segment.store.where(key), "shard": shard, "row": row, "found": fault.finding.what}
                facts["detail"] = fault.finding.detail
                if fault.finding.what == "unreadable":
                    step = step_for(fault.finding.detail, reads=True) or "run the same command again"
                    return DamageError("a stored object cannot be read", facts, step)
                return DamageError("a stored object is not what was committed", facts, repair_of(segment))
    return segment.chunk_damage(part.array, row, slots[0])


def _of_part(part: PartPlan, stored: Sequence[int]) -> list[int]:
    return sorted({slot // part.every for slot in stored if slot % part.every == 0})


def _drawn_shards(segment: Segment, count: int, drawn: random.Random) -> list[int]:
    """Up to `count` of the committed shards, ascending."""
    shards = range(segment.plan.num_shards) if segment.committed is None else sorted(segment.committed)
    return sorted(drawn.sample(shards, min(count, len(shards))))
