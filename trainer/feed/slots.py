"""Selection of the stored slots of a tap that a reader needs, with the index of each in a batch's stack.

A codec without memory needs the wanted slots alone. A delta codec needs every slot from the last keyframe on; its stack
keeps keyframes at multiples of `keyframe_every`, as they are stored, so that decoding needs no other addresses.

A tap's slots may come from several segments: each fills its own places of the one stack.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from distillcache.schemas.cache.addressing import RowGroup
from distillcache.schemas.cache.segment import Segment
from distillcache.schemas.codecs import Codec
from distillcache.schemas.errors import InputError
from distillcache.schemas.format.manifest import PartPlan, TapPlan


@dataclass(frozen=True)
class SlotReads:
    """pairs: (place in the stack, stored slot) of all that is read, both ascending. at: a wanted slot's place."""

    pairs: tuple[tuple[int, int], ...]
    at: dict[int, int]

    def size(self, part: PartPlan) -> int:
        """Slots of the part's stack."""
        return self.pairs[-1][0] // part.every + 1

    def of_part(self, part: PartPlan) -> list[tuple[int, int]]:
        """(place in the part's stack, stored slot of the part) of everything that is read."""
        return [(place // part.every, slot // part.every) for place, slot in self.pairs if slot % part.every == 0]

    def runs(self, part: PartPlan) -> list[tuple[slice, slice]]:
        """`of_part` as pairs of slices, consecutive ones joined: fewer, larger reads."""
        joined: list[list[int]] = []
        for place, slot in self.of_part(part):
            if joined and (place, slot) == (joined[-1][0] + joined[-1][2], joined[-1][1] + joined[-1][2]):
                joined[-1][2] += 1
            else:
                joined.append([place, slot, 1])
        return [(slice(place, place + count), slice(slot, slot + count)) for place, slot, count in joined]


def slot_reads(tap: TapPlan, codec: Codec, slots: Sequence[int], url: str) -> SlotReads:
    """Return the reads that these slots (as the plan numbers them) need.

    Raises:
        InputError: the cache lacks one of them.
    """
    missing = sorted(set(slots) - set(tap.slots))
    if missing:
        raise InputError(
            "the cache lacks these slots of a tap",
            {"cache": url, "tap": tap.name, "missing": missing},
            "choose other blocks, or build a cache that has them",
        )
    stored = {slot: tap.slots.index(slot) for slot in slots}
    needed = sorted({each for last in stored.values() for each in range(codec.first_slot(last), last + 1)})
    if tap.keyframe_every:
        groups = sorted({each // tap.keyframe_every for each in needed})
        place_of = {
            each: groups.index(each // tap.keyframe_every) * tap.keyframe_every + each % tap.keyframe_every
            for each in needed
        }
    else:
        place_of = {each: place for place, each in enumerate(needed)}
    return SlotReads(tuple((place_of[each], each) for each in needed), {slot: place_of[stored[slot]] for slot in slots})


@dataclass(frozen=True)
class SegmentReads:
    """The contribution of one segment to a tap's stack."""

    segment: Segment
    tap: TapPlan
    reads: SlotReads


@dataclass(frozen=True)
class TapReads:
    """The reads of a tap for the rows of one group. at: a wanted slot's position in the stack."""

    sources: tuple[SegmentReads, ...]
    at: dict[int, int]

    def size(self, part: PartPlan) -> int:
        """Slots of the part's stack."""
        return max(source.reads.size(part) for source in self.sources)

    def of_part(self, part: PartPlan) -> list[tuple[int, int]]:
        """(place in the part's stack, stored slot of the part) of everything that is read."""
        return [pair for source in self.sources for pair in source.reads.of_part(part)]


def tap_reads(group: RowGroup, name: str, codec: Codec, slots: Sequence[int]) -> TapReads:
    """Return the reads that these slots of a tap need.

    Raises:
        InputError: the group's segments do not hold one of them, or not so that they can be read together.
    """
    url, located = group.base.store.url, group.locate(name, slots)
    if len(located) == 1:
        segment, tap, taken = located[0]
        reads = slot_reads(tap, codec, taken, url)
        return TapReads((SegmentReads(segment, tap, reads),), reads.at)
    place_of = {slot: place for place, slot in enumerate(sorted(slots))}
    sources = []
    for segment, tap, taken in located:
        pairs = tuple((place_of[slot], tap.slots.index(slot)) for slot in sorted(taken))
        sources.append(SegmentReads(segment, tap, SlotReads(pairs, {slot: place_of[slot] for slot in taken})))
    return TapReads(tuple(sources), place_of)
