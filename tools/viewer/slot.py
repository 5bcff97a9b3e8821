"""The viewer's page about one slot of a tap: statistics of every dimension in a sample of rows, and similar slots."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from distillcache.schemas.counted import counted
from distillcache.schemas.errors import DamageError, StorageError
from distillcache.tools.look.stats import RANK_TOKENS, SlotStats
from distillcache.tools.look.stored_rows import StoredRows, finite, lengths
from distillcache.tools.pages.figures import Figure, Line, draw_lines
from distillcache.tools.pages.html import facts, figures, note, number, paragraph, table
from distillcache.tools.report.cache import NAMES
from distillcache.tools.viewer.asked import NotThere, number_in
from distillcache.tools.viewer.page import View, address, form, number_field, steps
from distillcache.tools.viewer.row import one_line
from distillcache.tools.viewer.watch import WatchedCache

ROWS = 4  # read for a page: hundreds of tokens, a second of a local disk
MOST_ROWS = 16
DIMENSIONS_SHOWN = 24
RANKS_DRAWN = 180
TINY = 1e-30


@dataclass
class SlotSample:
    """cosine: (sum over tokens, tokens) with the stored slots before and behind, by slot. damaged: rows left out."""

    rows: list[int] = field(default_factory=list)
    stats: SlotStats = field(default_factory=SlotStats)
    cosine: dict[int, tuple[float, int]] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)


def slot_page(watched: WatchedCache, tap: str, slot: int, query: Mapping[str, str]) -> View:
    """One slot of one tap.

    Args:
        tap: one of the cache's.

    Raises:
        NotThere: the tap has no such slot.
        NotUnderstood: what is requested makes no sense.
    """
    slots = watched.taps()[tap]
    if slot not in slots:
        raise NotThere(f"{tap} has no slot {slot}; its slots are {', '.join(map(str, slots))}.")
    count, seed = number_in(query, "rows", ROWS, MOST_ROWS), number_in(query, "seed", 0, 10**9)
    place = slots.index(slot)
    near = slots[max(place - 1, 0) : place + 2]
    found = watched.recent((tap, slot, count, seed), lambda: sample_slot(watched.rows(), tap, slot, near, count, seed))
    view = View(f"{NAMES.get(tap, tap).capitalize()} ({tap}), slot {slot}", _subtitle(watched, tap, slot, found), "/")
    moves = [(words, f"/slot/{tap}/{each}") for words, each in _around(slots, place)]
    others = [
        (f"{name} of this block", f"/slot/{name}/{slot}")
        for name, of in watched.taps().items()
        if name != tap and slot in of
    ]
    view.put(steps("Neighbouring slots", [*moves, *others]))
    asked = [
        number_field("rows", "rows to read", count, MOST_ROWS),
        number_field("seed", "seed of the draw", seed, 10**9),
    ]
    view.put(form(f"/slot/{tap}/{slot}", asked, "read them", "Choose a sample"))
    view.put(note("Damaged data, left out", found.damaged))
    view.add("The slot", _facts(watched, tap, slot, found))
    if found.stats.count:
        view.add("Dimensions", figures([_ranks_figure(found.stats)]), _table(found.stats))
    listed = [(str(row), address(f"/row/{row}", block=slot)) for row in found.rows]
    view.add("Rows of the sample", steps("Rows", listed) or paragraph("None is committed yet, or none was asked for."))
    return view


def sample_slot(stored: StoredRows, tap: str, slot: int, near: Sequence[int], count: int, seed: int) -> SlotSample:
    """Sums over some rows' real tokens, one row at a time.

    Args:
        near: the slot itself and its neighbours.
    """
    found = SlotSample()
    for at in stored.sample(count, seed) if count else []:
        try:
            real = stored.row(at).segment_ids > 0
            values = {each: numbers[real] for each, numbers in stored.slots(at, tap, near)}
        except (DamageError, StorageError) as error:
            found.damaged.append(f"row {at}: {one_line(error)}")
            continue
        if slot not in values:  # of a segment that does not hold it, or not yet
            continue
        found.rows.append(at)
        found.stats.add(values[slot], max(RANK_TOKENS // count, 2))
        for other in (each for each in values if each != slot):
            total, tokens = found.cosine.get(other, (0.0, 0))
            found.cosine[other] = (total + _cosine_sum(values[slot], values[other]), tokens + len(values[slot]))
    return found


def _cosine_sum(a: Float[np.ndarray, "t D"], b: Float[np.ndarray, "t D"]) -> float:
    a, b = finite(a), finite(b)
    norms = lengths(a) * lengths(b)
    return float(((a.astype(np.float64) * b).sum(-1) / np.maximum(norms, TINY)).sum())


def _around(slots: Sequence[int], place: int) -> list[tuple[str, int]]:
    return [
        *([(f"← slot {slots[place - 1]}", slots[place - 1])] if place else []),
        *([(f"slot {slots[place + 1]} →", slots[place + 1])] if place + 1 < len(slots) else []),
    ]


def _subtitle(watched: WatchedCache, tap: str, slot: int, found: SlotSample) -> str:
    what = {"resid": f"the stream entering block {slot}", "attn_out": f"what attention adds in block {slot}"}
    words = what.get(tap, f"block {slot}")
    if tap == "resid" and slot == watched.rows().plan.teacher.num_blocks:
        words = "the stream leaving the last block"
    return f"{words}; over {counted(found.stats.count, 'token')} of {counted(len(found.rows), 'row')}"


def _facts(watched: WatchedCache, tap: str, slot: int, found: SlotSample) -> str:
    """Return facts of the sample, and of all rows as the build recorded them."""
    values: dict[str, object] = {}
    if found.stats.count:
        said = found.stats.describe()
        values = {
            "Root mean square": number(said["rms"]).value,
            "Largest number": number(said["abs_max"]).value,
            "Kurtosis": f"{number(said['kurtosis']).value} (3 for normal numbers)",
            "Effective rank": f"{said['effective_rank']:.1f} of {said['rank_tokens']} sampled tokens",
            "Not finite": f"{said['nonfinite']:,}",
            "Dead dimensions": f"{said['dead_dimensions']:,}",
            "Outlier dimensions": ", ".join(
                f"{at} ({times:.3g} times the median)" for at, times in said["outlier_dimensions"][:8]
            )
            or "none",
        }
    for other, (total, tokens) in sorted(found.cosine.items()):
        values[f"Cosine to slot {other}"] = f"{total / tokens:.4f}" if tokens else "undefined (no token is compared)"
    return facts("Over the sample", values | _of_all_rows(watched, tap, slot))


def _of_all_rows(watched: WatchedCache, tap: str, slot: int) -> dict[str, object]:
    found: dict[str, object] = {}
    for each in watched.described()["taps"]:
        if each["name"] == tap and slot in each["slots"] and "rms" in each:
            place, words = each["slots"].index(slot), f"Recorded by the build, segment {each['segment']}"
            found[words] = f"rms {each['rms'][place]:.4g}, largest {each['abs_max'][place]:.4g}"
    return found


def _ranks_figure(stats: SlotStats) -> Figure:
    """Draw the dimensions by size. By number they have no figure: neighbours have nothing in common, and the table
    names the largest.
    """
    rms = stats.rms
    order = np.argsort(-rms)
    words = f"largest {rms[order[0]]:.4g} in dimension {order[0]}, median {np.median(rms):.4g}"
    ranks = np.unique(np.geomspace(1, len(rms), min(len(rms), RANKS_DRAWN)).round().astype(int))
    line = Line("rms", ranks.astype(float), rms[order[ranks - 1]])
    return Figure(
        title="Root mean square of the dimensions, largest first",
        caption=f"{words[:1].upper()}{words[1:]}. A cliff at the left means outlier dimensions.",
        alt=f"Line chart of the sorted root mean squares: {words}.",
        svg=draw_lines([line], "rank of the dimension", "root mean square", whole=True),
    )


def _table(stats: SlotStats) -> str:
    rms, mean, kurtosis = stats.rms, stats.total / max(stats.count, 1), stats.kurtosis
    median = max(float(np.median(rms)), TINY)
    rows = [
        (
            str(at),
            *map(number, (float(rms[at]), float(rms[at]) / median, float(mean[at]))),
            *map(number, (float(stats.largest[at]), float(kurtosis[at]))),
        )
        for at in np.argsort(-rms)[:DIMENSIONS_SHOWN].tolist()
    ]
    header = ("dimension", "rms", "times the median", "mean", "largest", "kurtosis")
    return table(f"The {len(rows)} largest of {len(rms):,} dimensions", header, rows)
