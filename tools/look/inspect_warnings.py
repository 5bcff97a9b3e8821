"""Warnings about a cache from plans, receipts, statistics and the index; of rows, until some have targets.

Of a cache with many shards some are looked at, evenly drawn.
"""

import math
from collections.abc import Hashable, Iterator, Mapping, Sequence

import numpy as np

from distillcache.models.describe import teacher_context
from distillcache.schemas.cache.segment import Segment
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import DamageError
from distillcache.schemas.format.manifest import Plan, ShardReceipt, Stats, TapPlan, TapStats
from distillcache.schemas.format.rows import SPLITS, Row, Split, no_targets_note, num_targets, too_long_note
from distillcache.schemas.format.times import SegmentTimes, Spread
from distillcache.tools.fidelity.rows import counted_padding
from distillcache.tools.look.segment_facts import (
    damaged_files,
    sampled_receipts,
    sampled_shards,
    segment_stats,
    segment_times,
)

DEAD = 1e-6  # of the median block's rms
OUTLIER = 50.0  # times the rms: normal numbers reach 6
UNLIKE = 1.5  # times the median shard's: rows differ by some percent
FEW = 4  # shards: too few to say which one is unlike the others
SLOW, SLOW_S = 2.0, 1.0  # times the median, and seconds more: what is shorter is the machine's own unrest


def find_warnings(segments: Sequence[Segment]) -> list[str]:
    """One sentence each, by segment; empty where nothing is odd."""
    found = []
    for segment in segments:
        prefix = "" if len(segments) == 1 else f"segment {segment.plan.segment}: "
        try:
            for sentence in _of_segment(segment):
                found.append(prefix + sentence)  # not a list of all: what was found before damage is kept
        except DamageError as error:
            found.append(prefix + _damaged(error))
    for sentence in (*map(_damaged, damaged_files(segments)), *_of_targets(segments), *_of_lengths(segments)):
        found += [] if any(sentence in said for said in found) else [sentence]
    return found


def _of_targets(segments: Sequence[Segment]) -> Iterator[str]:
    """Splits in which no token is a target, as far as the looked-at shards tell."""
    bringing = [segment for segment in segments if segment.plan.rows_of is None]
    shards = {segment.plan.segment: sampled_shards(segment) for segment in bringing}

    def rows(split: Split) -> Iterator[Row]:
        for segment in bringing:
            held_out = set(segment.plan.rows.eval_indices)
            for shard in shards[segment.plan.segment]:
                for row in range(*segment.plan.shard_range(shard)):
                    if (row in held_out) == (split == "eval"):
                        yield segment.row(row)

    def lacks_targets(split: Split) -> bool:
        found = False
        for row in rows(split):
            found = True
            if num_targets(row.segment_ids, row.loss_mask):
                return False
        return found

    try:
        without: list[Split] = [split for split in SPLITS if lacks_targets(split)]
    except DamageError as error:
        yield _damaged(error)
        return
    if without:
        whole = all(len(shards[segment.plan.segment]) == segment.plan.num_shards for segment in bringing)
        yield ("" if whole else "in the shards that were looked at, ") + no_targets_note(without)


def _of_lengths(segments: Sequence[Segment]) -> Iterator[str]:
    """Rows that are longer than what the teacher is made for; all segments have the same teacher."""
    if not segments:
        return
    context = teacher_context(segments[0].plan.teacher)
    change = "build a cache of shorter rows (data.row_tokens)"
    for row_tokens in sorted({segment.plan.rows.row_tokens for segment in segments}):
        if said := too_long_note(row_tokens, context, "the teacher", change):
            yield said


def _damaged(error: DamageError) -> str:
    where = error.facts.get("file", "")
    return f"{error.what} ({where}): run `distillcache verify`"


def _of_segment(segment: Segment) -> Iterator[str]:
    plan, receipts = segment.plan, sampled_receipts(segment)
    try:
        found = segment_stats(segment, receipts)
    except DamageError as error:  # the index may still say something
        found = {}
        yield _damaged(error)
    for tap in plan.taps:
        if tap.name in found:
            yield from _of_tap(tap, found[tap.name])
    if segment.committed is None:
        words = counted_padding(plan, Stats(taps=dict(found)))
        yield from [words] if words else []
    yield from _unlike_statistics(plan, receipts)
    elsewhere = [receipt.shard for receipt in receipts if receipt.numerics is not None]
    if elsewhere:
        yield f"shards {elsewhere[:6]} were computed on another platform than the plan's"
    yield from _of_index(segment, sampled_shards(segment))
    yield from _slow(segment_times(segment, receipts))


def _slow(times: SegmentTimes | None) -> Iterator[str]:
    """Shards, and machines, that took much longer than the others."""
    if times is None or times.shards < FEW:
        return
    phases: list[tuple[str, str, Spread]] = [
        ("compute", "to compute", times.compute),
        ("write", "to write", times.write),
    ]
    for phase, words, spread in phases:
        slow = {
            each.shard: (getattr(each.seconds, phase), each.seconds.host)
            for each in times.slowest
            if _is_slow(getattr(each.seconds, phase), spread.median)
        }
        if slow:
            named = ", ".join(
                f"shard {shard} {seconds:.3g} s on {host}" for shard, (seconds, host) in sorted(slow.items())[:6]
            )
            more = f" and {len(slow) - 6} more" if len(slow) > 6 else ""
            yield f"shards that took much longer {words} than the median of {spread.median:.3g} s: {named}{more}"
        hosts = {host: getattr(each, phase) for host, each in times.hosts.items() if each.shards >= FEW}
        for host, seconds in hosts.items():
            others = [value for name, value in hosts.items() if name != host]
            if others and _is_slow(seconds, float(np.median(others))):
                yield f"{host} took {seconds:.3g} s a shard {words}, other machines {np.median(others):.3g} s"


def _is_slow(seconds: float, usual: float) -> bool:
    return seconds > SLOW * usual and seconds - usual > SLOW_S


def _of_tap(tap: TapPlan, stats: TapStats) -> Iterator[str]:
    if not stats.count:  # of no token: zeros that were never summed
        return
    broken = {slot: count for slot, count in zip(tap.slots, stats.nonfinite, strict=True) if count}
    if broken:
        yield f"{tap.name}: {counted(sum(broken.values()), 'number')} not finite, in slots {list(broken)[:8]}"
    rms = [math.sqrt(total / stats.count) for total in stats.square_sum]
    median = float(np.median(rms))
    dead = [slot for slot, value in zip(tap.slots, rms, strict=True) if value <= DEAD * median]
    dead = [slot for slot in dead if broken.get(slot, 0) < stats.count]  # all NaN: told above, and no zeros
    if dead:
        yield f"{tap.name}: dead blocks, almost zero: {dead[:8]}"
    yield from _twice(tap, stats)
    peaks = {slot: peak / value for slot, peak, value in zip(tap.slots, stats.abs_max, rms, strict=True) if value > 0}
    worst = max(peaks, key=lambda slot: peaks[slot], default=None)
    if worst is not None and peaks[worst] > OUTLIER and tap.codec.startswith("int") and not tap.rotate:
        yield (
            f"{tap.name}: outlier dimensions (up to {peaks[worst]:.0f} times the rms, in slot {worst}) in {tap.codec} "
            "without rotation: `distillcache fidelity CACHE` shows what that costs"
        )


def _twice(tap: TapPlan, stats: TapStats) -> Iterator[str]:
    """Slots whose sums and maxima are equal to the bit: two blocks that differ at all do not have them."""
    pairs = zip(tap.slots, zip(stats.square_sum, stats.abs_max, strict=True), strict=True)
    yield from repeated_slots(tap.name, {slot: figures for slot, figures in pairs if figures[0] > 0})


def repeated_slots(tap: str, figures: Mapping[int, Hashable]) -> Iterator[str]:
    """A sentence for each set of slots that have the same figures, of slots that are not all zeros."""
    slots: dict[Hashable, list[int]] = {}
    for slot, values in figures.items():
        slots.setdefault(values, []).append(slot)
    for same in [group for group in slots.values() if len(group) > 1]:
        reason = "the blocks between add nothing, or the recorder is off" if tap == "resid" else "a recorder off"
        yield f"{tap}: slots {same[:8]} have equal statistics to the bit: {reason} by one"


def _unlike_statistics(plan: Plan, receipts: Sequence[ShardReceipt]) -> Iterator[str]:
    """Warn about an unfinished segment, whose receipts still exist."""
    for tap in plan.taps:
        rms = {
            receipt.shard: math.sqrt(sum(stats.square_sum) / (stats.count * len(stats.square_sum)))
            for receipt in receipts
            for stats in [receipt.stats[tap.name]]
            if stats.count
        }
        yield from _unlike(f"{tap.name}: the rms", rms)


def _unlike(what: str, values: Mapping[int, float]) -> Iterator[str]:
    if len(values) < FEW:
        return
    median = float(np.median(list(values.values())))
    odd = {shard: value / median for shard, value in values.items() if median and _far(value / median)}
    if odd:
        words = ", ".join(f"shard {shard} ({ratio:.3g} times)" for shard, ratio in list(odd.items())[:6])
        yield f"{what} of some shards differs from the others': {words}"


def _far(ratio: float) -> bool:
    return not 1 / UNLIKE <= ratio <= UNLIKE


def _of_index(segment: Segment, shards: Sequence[int]) -> Iterator[str]:
    """Shards that hold the same codes as others, and (of compressed taps) that compress unlike the others."""
    plan = segment.plan
    records = {shard: segment.record(shard) for shard in shards}
    for tap in plan.taps:
        for part in tap.parts:
            digests: dict[bytes, list[int]] = {}
            for shard, record in records.items():
                digests.setdefault(bytes(record[f"{part.array}/digest"]), []).append(shard)
            same = [group for group in digests.values() if len(group) > 1]
            if same and part.part == "codes":
                yield f"{part.array}: shards {same[0][:6]} hold identical codes"
        if tap.compress != "none":
            sizes = {
                shard: sum(float(record[f"{part.array}/lengths"].sum()) for part in tap.parts)
                / (plan.shard_range(shard)[1] - plan.shard_range(shard)[0])
                for shard, record in records.items()
            }
            yield from _unlike(f"{tap.name}: the compressed size", sizes)
