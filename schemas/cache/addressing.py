"""Rows and slots of a cache of several segments.

A segment brings rows of its own, or adds taps or blocks to the rows of an earlier one (`Plan.rows_of`). A *row group*
is the rows that one segment brought, with every segment that holds taps of them. A row has one number through the
cache: its group's rows follow those of the groups before it, in the order of the manifest.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from distillcache.schemas.cache.describe import numbers_in_runs
from distillcache.schemas.cache.segment import Segment
from distillcache.schemas.errors import DamageError, InputError
from distillcache.schemas.format.manifest import TOPK_LOGITS, TOPK_SLOTS, TapPlan

# what says how a tap's bytes are read
CODEC_FIELDS = ("codec", "group", "rotate", "delta", "keyframe_every", "k", "vocab_size")


@dataclass(frozen=True)
class RowGroup:
    """segments: the one that brought the rows, then those that add to them, in the manifest's order."""

    segments: tuple[Segment, ...]

    @property
    def base(self) -> Segment:
        """The segment that holds the rows."""
        return self.segments[0]

    def blocks(self, taps: Sequence[str]) -> tuple[int, ...]:
        """The recorded blocks whose slots of all these taps are stored."""
        slots = {name: {slot for _, tap in self.holding(name) for slot in tap.slots} for name in taps}
        recorded = sorted({block for segment in self.segments for block in segment.plan.blocks})
        return tuple(block for block in recorded if all(slots_of(name, [block]) <= slots[name] for name in taps))

    def holds(self, name: str) -> bool:
        """Return whether a segment has the tap."""
        return any(tap.name == name for segment in self.segments for tap in segment.plan.taps)

    def slots(self, name: str) -> set[int]:
        """The slots of a tap that are stored, in any of the segments; none where no segment has the tap."""
        taps = (tap for segment in self.segments for tap in segment.plan.taps if tap.name == name)
        return {slot for tap in taps for slot in tap.slots}

    def holding(self, name: str) -> list[tuple[Segment, TapPlan]]:
        """The segments that hold a tap, each with its plan of it.

        Raises:
            InputError: none does.
        """
        found = [(segment, tap) for segment in self.segments for tap in segment.plan.taps if tap.name == name]
        if not found:
            recorded = sorted({tap.name for segment in self.segments for tap in segment.plan.taps})
            raise InputError(
                "the cache lacks this tap",
                {"cache": self.base.store.url, "wanted": name, "found": ", ".join(recorded)},
                f"build a cache with taps.{name}, or add it: distillcache build --extend "
                "(online: name it in online.taps)",
            )
        return found

    def locate(
        self, name: str, slots: Sequence[int], *, as_one: bool = True
    ) -> list[tuple[Segment, TapPlan, tuple[int, ...]]]:
        """Return where these slots of a tap are stored: (segment, its plan of the tap, the slots to take from it).

        Args:
            as_one: the slots will be one encoded stack.

        Raises:
            InputError: a slot is not stored, or delta-coded slots of one stack lie in several segments.
        """
        found = self.holding(name)
        for segment, tap in found:
            if set(slots) <= set(tap.slots):
                return [(segment, tap, tuple(slots))]
        left, located = set(slots), []
        for segment, tap in found:
            taken = tuple(slot for slot in slots if slot in left and slot in tap.slots)
            left.difference_update(taken)
            located += [(segment, tap, taken)] if taken else []
        facts = {"cache": self.base.store.url, "tap": name}
        if left:
            raise InputError(
                "the cache lacks these slots of a tap",
                {**facts, "missing": sorted(left)},
                "choose other blocks, or add them: distillcache build --extend "
                "(online: set online.taps, which records every block)",
            )
        if as_one and any(tap.delta for _, tap, _ in located):
            places = {f"segment {segment.plan.segment}": f"slots {list(taken)}" for segment, _, taken in located}
            raise InputError(
                "delta-coded slots of several segments cannot be read together",
                {**facts, **places},
                "choose blocks of one segment, or read a copy: distillcache copy joins the segments",
            )
        return located


def row_groups(segments: Sequence[Segment]) -> tuple[RowGroup, ...]:
    """The groups of a cache, in the order of their rows.

    Raises:
        DamageError: a segment adds to rows that are not there.
    """
    groups: dict[str, list[Segment]] = {}
    for segment in segments:
        base = segment.plan.rows_of
        if base is None:
            groups[segment.plan.segment] = [segment]
        elif base in groups:
            groups[base].append(segment)
        else:
            raise DamageError(
                "a segment adds to rows that the cache lacks",
                {"cache": segment.store.url, "segment": segment.plan.segment, "rows of": base},
                "copy the cache again from its source",
            )
    return tuple(RowGroup(tuple(members)) for members in groups.values())


def shared_blocks(
    groups: Sequence[RowGroup], taps: Sequence[str], used: Collection[int] | None = None
) -> tuple[int, ...]:
    """The recorded blocks that every group of rows has, with all these taps.

    Args:
        used: the numbers of the groups that count; None: all.

    Raises:
        InputError: a tap is of no row, or of some rows only.
    """
    counted = [group for number, group in enumerate(groups) if used is None or number in used]
    for name in taps:
        if not all(group.holds(name) for group in counted) and any(group.holds(name) for group in groups):
            raise _held_by_some(groups, name)
    first, *others = [group.blocks(taps) for group in counted]
    return tuple(block for block in first if all(block in blocks for blocks in others))


def held_by_rows(groups: Sequence[RowGroup]) -> dict[str, str]:
    """The taps and blocks that each group of rows holds, and in which segments: facts of an error.

    Nothing where there is one group: what the cache holds is then what its rows hold.
    """
    facts, first = {}, 0
    for group in groups:
        count = group.base.plan.rows.count
        taps = ", ".join(sorted({tap.name for segment in group.segments for tap in segment.plan.taps}))
        blocks = numbers_in_runs(sorted({block for segment in group.segments for block in segment.plan.blocks}))
        segments = ", ".join(segment.plan.segment for segment in group.segments)
        facts[f"rows {first} to {first + count - 1}"] = f"{taps}; blocks {blocks}; in segments {segments}"
        first += count
    return facts if len(groups) > 1 else {}


def _held_by_some(groups: Sequence[RowGroup], name: str) -> InputError:
    """The error of a tap that only some rows have."""
    ends = np.cumsum([0, *(group.base.plan.rows.count for group in groups)]).tolist()
    at = next(number for number, group in enumerate(groups) if group.holds(name))
    flag = f"--taps.{name.replace('_', '-')}"
    return InputError(
        "only some rows of the cache hold this tap",
        {"cache": groups[0].base.store.url, "wanted": name, **held_by_rows(groups)},
        f"add it to the other rows: distillcache build --extend {flag}.codec ..., with the config of their text; "
        f"or copy without it (copy {flag} null), or rows that hold it (copy --rows {ends[at]}:{ends[at + 1]})",
    )


def slots_of(tap: str, blocks: Sequence[int]) -> set[int]:
    """The slots that these blocks need: of `resid`, the stream entering and leaving each; of `topk_logits`, its one."""
    if tap == TOPK_LOGITS:
        return set(TOPK_SLOTS)
    return {*blocks, *(block + 1 for block in blocks)} if tap == "resid" else set(blocks)


def check_same_codec(name: str, found: Sequence[tuple[Segment, TapPlan]]) -> None:
    """Raise `InputError` unless all of these store the tap in one way, so that one decoder reads all of them."""
    first, tap = found[0]
    for segment, other in found[1:]:
        differing = [field for field in CODEC_FIELDS if getattr(tap, field) != getattr(other, field)]
        if not differing and tap.rotate:
            same = np.array_equal(first.signs()[f"signs.{name}"], segment.signs()[f"signs.{name}"])
            differing = [] if same else ["signs"]
        if differing:
            facts = {
                f"segment {each.plan.segment}": ", ".join(f"{key} {getattr(plan, key, 'others')}" for key in differing)
                for each, plan in ((first, tap), (segment, other))
            }
            raise InputError(
                "the segments of a cache store a tap in different ways",
                {"cache": segment.store.url, "tap": name, **facts},
                "choose blocks of one segment, or read a copy in one codec: distillcache copy",
            )


class RowMap:
    """A row's number through the cache to its group and its number there; only visible rows count."""

    def __init__(self, groups: Sequence[RowGroup], used: Sequence[Sequence[Segment]]) -> None:
        """`used`: for every group, the segments that are read; rows are visible once all of these have them."""
        self._visible = [
            _visible_rows([group.base, *segments]) for group, segments in zip(groups, used, strict=True)
        ]  # None: all
        counts = [
            group.base.plan.rows.count if seen is None else len(seen)
            for group, seen in zip(groups, self._visible, strict=True)
        ]
        self._starts = np.cumsum([0, *counts])
        self.held_out = np.concatenate(
            [
                start + _places(group, seen)
                for start, group, seen in zip(self._starts, groups, self._visible, strict=False)
            ]
        )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def groups(self, numbers: np.ndarray) -> np.ndarray:
        """The numbers of the groups that rows of the cache lie in."""
        return np.searchsorted(self._starts, numbers, side="right") - 1

    def locate(self, number: int) -> tuple[int, int]:
        """(group, row in it) of a row of the cache."""
        group = int(np.searchsorted(self._starts, number, side="right")) - 1
        seen, place = self._visible[group], number - int(self._starts[group])
        return group, place if seen is None else int(seen[place])


def _visible_rows(segments: Sequence[Segment]) -> np.ndarray | None:
    """The rows of a group that all these segments have committed, ascending; None: all."""
    unfinished = [segment for segment in segments if segment.committed is not None]
    if not unfinished:
        return None
    seen = [_committed_rows(segment) for segment in unfinished]
    return reduce(np.intersect1d, seen)


def _committed_rows(segment: Segment) -> np.ndarray:
    """Ascending; only committed ones take memory, whatever the plan says of all."""
    ranges = [np.arange(*segment.plan.shard_range(shard)) for shard in sorted(segment.committed or ())]
    return np.concatenate([np.zeros(0, np.int64), *ranges])


def _places(group: RowGroup, seen: np.ndarray | None) -> np.ndarray:
    """The held-out rows of a group, numbered among those that are visible."""
    held_out = np.asarray(group.base.plan.rows.eval_indices, np.int64)
    if seen is None:
        return held_out
    return np.searchsorted(seen, held_out[np.isin(held_out, seen)])
