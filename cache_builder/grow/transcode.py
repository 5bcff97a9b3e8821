"""Transcoding of one tap: from its stored codec to the codec of the copy.

Codes whose codec stays are copied as they are. Others are decoded and encoded again by the codecs that builder and
trainer use, jitted, a batch at a time; decoding alone gives the statistics.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
import xxhash

from distillcache.models.recorder import Recording, SlotSums, slot_sums
from distillcache.schemas.cache.addressing import CODEC_FIELDS, RowGroup
from distillcache.schemas.cache.segment import DAMAGE_NEXT, Segment
from distillcache.schemas.codecs import TopK
from distillcache.schemas.errors import DamageError
from distillcache.schemas.format.manifest import TapPlan
from distillcache.schemas.format.rows import Row
from distillcache.schemas.format.tap_codec import Signs, tap_codec
from distillcache.schemas.store.disk_errors import step_for

Parts = dict[str, np.ndarray]  # a codec's parts, `[B, S, T, W]` each


class TapCopy:
    """A tap of one row group, on its way into the copy."""

    def __init__(self, group: RowGroup, wanted: TapPlan, signs: Signs) -> None:
        """`wanted`: the copy's plan of the tap; `signs`: the copy's sign vectors."""
        located = group.locate(wanted.name, wanted.slots, as_one=False)
        self._stacks = [_StoredStack(segment, tap, slots) for segment, tap, slots in located]
        self._order = np.argsort([slot for _, _, slots in located for slot in slots], kind="stable")
        self._wanted, self._as_it_is = wanted, all(stack.is_kept_by(wanted, signs) for stack in self._stacks)
        self._as_it_is &= len(located) == 1 or not wanted.delta
        self._encode = jax.jit(tap_codec(wanted, signs).encode)

    @property
    def change(self) -> str:
        """From which codecs to which the tap is recoded; empty where the codes are kept as they are."""
        if self._as_it_is:
            return ""
        return f"{' and '.join(sorted({stack.codec for stack in self._stacks}))} -> {self._wanted.codec}"

    def read(self, rows: Sequence[int], real: np.ndarray) -> tuple[Parts, SlotSums]:
        """The copy's parts of these rows, and their statistics; `real` `[B, T]`: which tokens are no padding."""
        stored = [stack.read(rows) for stack in self._stacks]
        numbers = jnp.concatenate([stack.decode(parts) for stack, parts in zip(self._stacks, stored, strict=True)])
        numbers = numbers[self._order]
        sums = SlotSums(*(np.asarray(value) for value in _sums(numbers, real)))
        if self._as_it_is:
            if len(stored) == 1:
                return stored[0], sums
            return {
                name: np.concatenate([each[name] for each in stored], 1)[:, self._order] for name in stored[0]
            }, sums
        return {name: np.moveaxis(np.asarray(part), 0, 1) for name, part in self._encode(numbers).items()}, sums


def recoded_taps(groups: Sequence[RowGroup], taps: Sequence[TapPlan], signs: Signs) -> dict[str, str]:
    """List the taps of a copy that are decoded and encoded again, with a description of the effect."""
    found = {}
    for tap in taps:
        changes = {TapCopy(group, tap, signs).change for group in groups} - {""}
        if changes:
            effect = "as the source decodes" if tap.codec == "f32" else "not bit-equal to the source"
            found[tap.name] = f"recoded {', '.join(sorted(changes))}, {effect}"
    return found


@jax.jit
def _sums(numbers: jax.Array, real: jax.Array) -> SlotSums:
    """`[B, S]` each, of numbers `[S, B, T, D]`."""
    return jax.vmap(slot_sums, in_axes=(0, None), out_axes=1)(numbers, real)


def _numbers(decoded: jax.Array | TopK) -> jax.Array:
    """Return the numbers that statistics cover: of logits, their values. A copy never encodes logits again."""
    return decoded.values if isinstance(decoded, TopK) else decoded


class _StoredStack:
    """Some slots of a tap in one segment, as stored. A delta codec's need all that stand before them."""

    def __init__(self, segment: Segment, tap: TapPlan, slots: Sequence[int]) -> None:
        self._segment, self._tap = segment, tap
        self._at = [tap.slots.index(slot) for slot in slots]
        codec = tap_codec(tap, segment.signs() if tap.rotate else {})
        first = codec.first_slot(self._at[0])
        self._read = list(range(first, self._at[-1] + 1)) if tap.delta else self._at
        self._arrays = {part.part: segment.open_array(part) for part in tap.parts}
        picked = np.asarray([self._read.index(place) for place in self._at])
        self._decode: Callable[[Mapping[str, Any]], jax.Array] = jax.jit(
            lambda parts: _numbers(codec.decode(parts))[picked]
        )

    @property
    def codec(self) -> str:
        return self._tap.codec

    def is_kept_by(self, wanted: TapPlan, signs: Signs) -> bool:
        """Return whether the copy's codec would read these codes as they are."""
        if any(getattr(self._tap, name) != getattr(wanted, name) for name in CODEC_FIELDS):
            return False
        if wanted.rotate and not np.array_equal(
            signs[f"signs.{wanted.name}"], self._segment.signs()[f"signs.{wanted.name}"]
        ):
            return False
        return not wanted.delta or self._read == self._at  # begins with a keyframe, and has no holes

    def read(self, rows: Sequence[int]) -> Parts:
        """Read these rows' stored parts, checked against the digests, with retries from buckets."""
        for last in self._segment.store.tries():
            try:
                return self._read_once(rows)
            except DamageError:
                if last:
                    raise
        raise AssertionError("the last try returns or raises")

    def _read_once(self, rows: Sequence[int]) -> Parts:
        found, pending = {}, []
        for part in self._tap.parts:
            for row in rows:
                self._segment.check_row_inside(part, row)
        with ts.Batch():
            for part in self._tap.parts:
                places = np.asarray([place // part.every for place in self._read if place % part.every == 0])
                reads = [self._arrays[part.part][row, places].read() for row in rows]
                pending.append((part, places, reads))
        for _, _, reads in pending:  # all of them, whichever fails
            for read in reads:
                read.exception()
        for part, places, reads in pending:
            found[part.part] = np.stack(
                [self._settled(part.array, row, read) for row, read in zip(rows, reads, strict=True)]
            )
            for row, codes in zip(rows, found[part.part], strict=True):
                self._check(part.array, row, places.tolist(), codes)
        return found

    def _settled(self, array: str, row: int, read: ts.Future) -> np.ndarray:
        failure = read.exception()
        if failure is not None:
            raise DamageError(
                "stored activations cannot be read",
                {"cache": self._segment.store.url, "array": array, "row": row, "cause": str(failure).split(" [")[0]},
                step_for(str(failure), reads=True) or DAMAGE_NEXT,
            ) from failure
        return read.result()

    def _check(self, array: str, row: int, places: list[int], codes: np.ndarray) -> None:
        """Raise unless these codes `[S, T, W]` are the ones that were committed."""
        digests = self._segment.chunk_digests(array, row)
        for place, chunk in zip(places, codes, strict=True):
            if xxhash.xxh3_64_intdigest(chunk.data) != digests[place]:
                raise self._segment.chunk_damage(array, row, place)

    def decode(self, parts: Parts) -> jax.Array:
        """The numbers of the wanted slots, `[S, B, T, D]`."""
        return self._decode({name: np.moveaxis(part, 1, 0) for name, part in parts.items()})


def transcode(
    copies: Mapping[int, Mapping[str, TapCopy]], rows: Sequence[Row], places: Sequence[tuple[int, int]]
) -> Recording:
    """The copy's codes and statistics of these rows.

    Args:
        copies: by group, then by tap.
        places: (group, row in it) of every row; the rows of a group stand together.
    """
    real = np.stack([row.segment_ids > 0 for row in rows])
    runs: list[tuple[int, list[int], list[int]]] = []  # group, its rows, their places in the batch
    for place, (group, row) in enumerate(places):
        if not runs or runs[-1][0] != group:
            runs.append((group, [], []))
        runs[-1][1].append(row)
        runs[-1][2].append(place)
    codes: dict[str, dict[str, Any]] = {}
    sums: dict[str, SlotSums] = {}
    for name in next(iter(copies.values())):
        read = [copies[group][name].read(numbers, real[spots]) for group, numbers, spots in runs]
        codes[name] = {part: np.concatenate([parts[part] for parts, _ in read]) for part in read[0][0]}
        sums[name] = SlotSums(*(np.concatenate(values) for values in zip(*(each for _, each in read), strict=True)))
    return Recording(codes, sums)
