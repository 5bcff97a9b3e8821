"""What is odd about a cache, from plans, receipts, statistics and the index alone: no row and no tap is read.

Of a cache with many shards some are looked at, evenly drawn.
"""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from schemas import layout
from schemas.canonical import read_canonical
from schemas.errors import DamageError
from schemas.manifest import Plan, ShardReceipt, Stats, TapPlan, TapStats
from schemas.segment import Segment
from tools.fidelity_rows import counted_padding

SAMPLED_SHARDS = 64
DEAD = 1e-6  # of the median block's rms
OUTLIER = 50.0  # times the rms: normal numbers reach 6
UNLIKE = 1.5  # times the median shard's: rows differ by some percent
FEW = 4  # shards: too few to say which one is unlike the others


def find_warnings(segments: Sequence[Segment]) -> list[str]:
    """One sentence each, by segment; empty where nothing is odd."""
    found = []
    for segment in segments:
        prefix = "" if len(segments) == 1 else f"segment {segment.plan.segment}: "
        try:
            found += [prefix + sentence for sentence in _of_segment(segment)]
        except DamageError as error:
            where = next(iter(error.facts.values()), "")
            found.append(f"{prefix}{error.what} ({where}): run `distillcache verify`")
    return found


def _of_segment(segment: Segment) -> Iterator[str]:
    plan, shards = segment.plan, _sampled(segment)
    if segment.committed is None:
        stats = read_canonical(segment.store, f"{layout.segment_prefix(plan.segment)}/stats.json", Stats)
        found = stats.taps if stats is not None else {}
        words = "" if stats is None else counted_padding(plan, stats)
        yield from [words] if words else []
    else:
        receipts = _receipts(segment, shards)
        found = receipts[0].stats if receipts else {}
        yield from _unlike_statistics(plan, receipts)
        elsewhere = [receipt.shard for receipt in receipts if receipt.numerics is not None]
        if elsewhere:
            yield f"shards {elsewhere[:6]} were computed on another platform than the plan's"
    for tap in plan.taps:
        if tap.name in found:
            yield from _of_tap(tap, found[tap.name])
    yield from _of_index(segment, shards)


def _sampled(segment: Segment) -> list[int]:
    shards = range(segment.plan.num_shards) if segment.committed is None else sorted(segment.committed)
    if not shards:
        return []
    return [
        shards[at] for at in sorted({*np.linspace(0, len(shards) - 1, SAMPLED_SHARDS).round().astype(int).tolist()})
    ]


def _receipts(segment: Segment, shards: Sequence[int]) -> list[ShardReceipt]:
    """Those that are still there: a build may be finished meanwhile."""
    keys = [layout.receipt_key(segment.plan.segment, shard) for shard in shards]
    found = (read_canonical(segment.store, key, ShardReceipt) for key in keys)
    return [receipt for receipt in found if receipt is not None]


def _of_tap(tap: TapPlan, stats: TapStats) -> Iterator[str]:
    broken = {slot: count for slot, count in zip(tap.slots, stats.nonfinite, strict=True) if count}
    if broken:
        yield f"{tap.name}: {sum(broken.values()):,} numbers are not finite, in slots {list(broken)[:8]}"
    rms = [math.sqrt(total / max(stats.count, 1)) for total in stats.square_sum]
    median = float(np.median(rms))
    dead = [slot for slot, value in zip(tap.slots, rms, strict=True) if value <= DEAD * median]
    if dead:
        yield f"{tap.name}: dead blocks, all but zero: {dead[:8]}"
    peaks = {slot: peak / value for slot, peak, value in zip(tap.slots, stats.abs_max, rms, strict=True) if value > 0}
    worst = max(peaks, key=lambda slot: peaks[slot], default=None)
    if worst is not None and peaks[worst] > OUTLIER and tap.codec.startswith("int") and not tap.rotate:
        yield (
            f"{tap.name}: outlier dimensions (up to {peaks[worst]:.0f} times the rms, in slot {worst}) in {tap.codec} "
            "without rotation: `distillcache fidelity` says what that costs"
        )


def _unlike_statistics(plan: Plan, receipts: Sequence[ShardReceipt]) -> Iterator[str]:
    """Of an unfinished segment, whose receipts are still there."""
    for tap in plan.taps:
        rms = {
            receipt.shard: math.sqrt(sum(stats.square_sum) / max(stats.count * len(stats.square_sum), 1))
            for receipt in receipts
            for stats in [receipt.stats[tap.name]]
        }
        yield from _unlike(f"{tap.name}: the rms", rms)


def _unlike(what: str, values: Mapping[int, float]) -> Iterator[str]:
    if len(values) < FEW:
        return
    median = float(np.median(list(values.values())))
    odd = {shard: value / median for shard, value in values.items() if median and _far(value / median)}
    if odd:
        words = ", ".join(f"shard {shard} ({ratio:.3g} times)" for shard, ratio in list(odd.items())[:6])
        yield f"{what} of some shards is unlike the others': {words}"


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
                yield f"{part.array}: shards {same[0][:6]} hold the very same codes"
        if tap.compress != "none":
            sizes = {
                shard: sum(float(record[f"{part.array}/lengths"].sum()) for part in tap.parts)
                / (plan.shard_range(shard)[1] - plan.shard_range(shard)[0])
                for shard, record in records.items()
            }
            yield from _unlike(f"{tap.name}: the compressed size", sizes)
