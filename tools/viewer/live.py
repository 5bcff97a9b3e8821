"""The viewer's live page about a build: progress, speed, active processes, newest shards."""

import time
from collections.abc import Sequence

import numpy as np

from distillcache.schemas.cache.segment import Segment
from distillcache.schemas.counted import counted
from distillcache.schemas.runtime.progress import format_seconds
from distillcache.tools.pages.figures import Figure, Line, draw_lines
from distillcache.tools.pages.html import Linked, Numeric, facts, figures, number, paragraph, progress, size, table
from distillcache.tools.report.leases import workers
from distillcache.tools.viewer.page import View
from distillcache.tools.viewer.watch import Committed, WatchedCache

EVERY_S = 5.0
WINDOW_S = 600.0  # a rate is that of the last ten minutes
FEW = 5  # shards, or of so many
MOST_COUNTED = 10_000
PAUSE, PAUSE_S = 8.0, 60.0  # times the usual time between two shards, and seconds: nobody was at work
POINTS = 180
LAST_SHARDS = 12


def build_page(watched: WatchedCache) -> View:
    """Show the build in progress; of a finished cache, that it is finished."""
    segments = watched.unfinished()
    if not segments:
        view = View("The build", "The cache is finished.", "/build", 0)
        view.put(paragraph("No build is running. The overview shows when and by whom the cache was built."))
        return view
    segment = segments[0]
    done, of = len(segment.committed or ()), segment.plan.num_shards
    view = View("The build", f"{done:,} of {counted(of, 'shard')} of segment {segment.plan.segment}", "/build", EVERY_S)
    view.put(progress("Shards", done, of))
    view.add("Speed", _speed(watched, segment), figures([_curve(watched.committed(segment), of)]))
    view.add("Active processes", workers(segment))
    view.add("Newest shards", *_last(watched, segment))
    return view


def shards_a_second(committed: Committed, now: float) -> float | None:
    """Return the rate over the last ten minutes, or over the last shards if those take longer; None: too few are known,
    or nothing moves.

    Time in which nothing was built does not count: a gap that is much longer than the others.
    """
    known = np.sort([at for at in committed.times.values() if at is not None and at <= now])[-MOST_COUNTED:]
    if len(known) < 2:
        return None
    gaps = np.diff(known)
    usual = float(np.percentile(gaps, 90, method="lower"))  # shards of one teacher call come in bursts
    longest = max(PAUSE_S, PAUSE * usual)
    pauses = np.flatnonzero(gaps > longest)
    begun = int(pauses[-1]) + 1 if len(pauses) else 0
    begun = max(begun, min(int(np.searchsorted(known, now - WINDOW_S)) - 1, len(known) - FEW))
    if now - known[-1] > longest or begun >= len(known) - 1:
        return None
    return (len(known) - 1 - begun) / max(now - float(known[begun]), 1e-9)


def _speed(watched: WatchedCache, segment: Segment) -> str:
    plan, committed, now = segment.plan, watched.committed(segment), time.time()
    rate, shard_bytes = shards_a_second(committed, now), _shard_bytes(watched, segment)
    left = plan.num_shards - len(segment.committed or ())
    known = [at for at in committed.times.values() if at is not None]
    values: dict[str, object] = {
        "Written so far": size(len(segment.committed or ()) * shard_bytes),
        "Left to write": size(left * shard_bytes),
    }
    if rate is None:
        values["Speed"] = "not known: it takes two shards in quick succession"
    else:
        tokens = rate * plan.shard_rows * plan.rows.row_tokens
        values["Speed"] = f"{size(rate * shard_bytes)}/s, {tokens:,.0f} tokens/s, {rate * 60:.3g} shards a minute"
        values["Time left"] = f"about {format_seconds(left / rate)}, at this speed"
    if known:
        values["Last shard"] = f"{_clock(max(known))}, {format_seconds(max(now - max(known), 0))} ago"
    return facts("Speed of the build", values)


def _shard_bytes(watched: WatchedCache, segment: Segment) -> float:
    """Return the stored bytes of a whole shard's taps: by the plan; if compressed, by the newest receipts."""
    plan = segment.plan
    receipts = [watched.receipt(segment, shard) for shard in _newest(watched, segment)] if plan.is_compressed else []
    known = [receipt for receipt in receipts if receipt is not None]
    if not known:
        return plan.bytes_per_row * plan.shard_rows
    stored = sum(each.length for receipt in known for part in receipt.parts.values() for each in part.objects)
    return stored / sum(receipt.rows[1] - receipt.rows[0] for receipt in known) * plan.shard_rows


def _newest(watched: WatchedCache, segment: Segment) -> list[int]:
    times = watched.committed(segment).times
    return sorted(times, key=lambda shard: (times[shard] or 0.0, shard), reverse=True)[:LAST_SHARDS]


def _curve(committed: Committed, of: int) -> Figure | None:
    """Committed shards by time."""
    known = np.sort(np.asarray([at for at in committed.times.values() if at is not None]))
    if len(known) < 2:
        return None
    before = len(committed.times) - len(known)
    places = np.unique(np.linspace(0, len(known) - 1, min(len(known), POINTS)).round().astype(int))
    minutes, counts = (known[places] - known[0]) / 60, before + places + 1.0
    words = f"{before + len(known):,} of {of:,}, from {_clock(known[0])} to {_clock(known[-1])}"
    svg = draw_lines([Line("shards", minutes, counts)], "minutes since the first", "shards", linear=True)
    return Figure("Committed shards by time", f"{words}.", f"Line chart of committed shards by time: {words}.", svg)


def _last(watched: WatchedCache, segment: Segment) -> list[str]:
    """The newest receipts."""
    times = watched.committed(segment).times
    rows = [_shard_cells(watched, segment, shard, times[shard]) for shard in _newest(watched, segment)]
    if not rows:
        return [paragraph("No shard is committed yet.")]
    taps = [f"{tap.name} rms" for tap in segment.plan.taps]
    header = ("shard", "first row", "committed", "took", "by", *taps, "not finite")
    return [table("The newest shards", header, rows)]


def _shard_cells(watched: WatchedCache, segment: Segment, shard: int, at: float | None) -> Sequence[object]:
    plan = segment.plan
    receipt = watched.receipt(segment, shard)
    cells: list[object] = [
        str(shard),
        _row_link(watched, segment, shard),
        _brief(at) if at else "before the viewer began",
    ]
    if receipt is None:  # the build was finished meanwhile
        return [*cells, "", "", *(Numeric("") for _ in plan.taps), Numeric("")]
    took = "" if receipt.seconds is None else format_seconds(receipt.seconds.total)
    cells += [took, "" if receipt.seconds is None else receipt.seconds.host]
    for tap in plan.taps:
        stats = receipt.stats[tap.name]
        numbers = stats.count * len(stats.square_sum)
        cells.append(number(float(np.sqrt(sum(stats.square_sum) / numbers)) if numbers else None))
    return [*cells, number(sum(sum(stats.nonfinite) for stats in receipt.stats.values()))]


def _row_link(watched: WatchedCache, segment: Segment, shard: int) -> Linked:
    first, start = segment.plan.shard_range(shard)[0], 0
    for group in watched.rows().groups:
        if segment in group.segments:
            break
        start += group.base.plan.rows.count
    return Linked(str(start + first), f"/row/{start + first}", right=True)


def _brief(moment: float) -> str:
    """The time alone, of what happened today."""
    words = _clock(moment)
    return words.partition(" ")[2] if time.time() - moment < 24 * 3600 else words


def _clock(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(moment))
