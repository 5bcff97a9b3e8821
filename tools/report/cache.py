"""Sections of a report about a cache: description, progress, storage, statistics of its blocks, some of its rows."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from distillcache.schemas.cache.describe import layers_words
from distillcache.schemas.cache.segment import Segment
from distillcache.schemas.config.yaml_text import as_yaml
from distillcache.schemas.counted import counted
from distillcache.schemas.format.manifest import TOPK_LOGITS
from distillcache.schemas.store.redaction import shown
from distillcache.schemas.store.store import Store
from distillcache.tools.diff.flat import flattened
from distillcache.tools.look.inspect import describe_cache
from distillcache.tools.look.inspect_print import said_of_times
from distillcache.tools.look.segment_facts import SAMPLED_SHARDS
from distillcache.tools.look.stored_rows import StoredRows
from distillcache.tools.pages.figures import SERIES, Figure, HeatMap, Line, draw_lines, draw_maps, limits_of
from distillcache.tools.pages.html import (
    Numeric,
    Page,
    facts,
    figures,
    folded,
    note,
    number,
    page_title,
    paragraph,
    progress,
    size,
    table,
)
from distillcache.tools.pages.pictures import pooled
from distillcache.tools.report.leases import workers
from distillcache.tools.report.rows import STREAM, Likeness, RowLook, Sample, row_warnings, sample_rows

COLUMNS = 360  # of a row's picture, one a point of its width: more tokens share one, which shows their largest
ROWS_A_FIGURE = 3
BF16_BYTES = 2
NAMES = {"resid": "residual stream", "attn_out": "attention output", "mlp_out": "MLP output"}


def cache_page(store: Store, rows: int, seed: int, footer: str) -> tuple[Page, dict[str, Any]]:
    """The page, and a summary of it as plain values.

    Args:
        rows, seed: how many rows are drawn and shown, and which.

    Raises:
        InputError: there is no cache here.
        DamageError: what is read is not what was committed.
    """
    found, stored = describe_cache(store), StoredRows(store.url)
    segments, sample = stored.segments, sample_rows(stored, rows, seed)
    unfinished = f"The cache is not finished: {found['to_finish']}."
    told = [*([] if found["finished"] else [unfinished]), *found["warnings"], *row_warnings(sample)]
    page = Page(page_title("Cache", store.url), _subtitle(found), footer)
    page.add("What it is", note("Look at this first", told), plan_facts(found), config_table(segments))
    page.add("Progress", *build_progress(found, segments))
    page.add("Storage", storage_table(found), array_table(found))
    page.add("Blocks", *slot_statistics(found))
    page.add("Rows", *_rows(sample))
    page.add("Similarity of slots", *_similarity(sample.likeness))
    return page, {"of": "cache", "rows": [row.number for row in sample.rows], "warnings": told}


def _subtitle(found: dict[str, Any]) -> str:
    rows, state = found["rows"], "" if found["finished"] else ", not finished"
    blocks = counted(len(found["blocks"]), "block")
    return f"{counted(rows['count'], 'row')} of {rows['row_tokens']:,} tokens, {blocks}{state}"


def plan_facts(found: dict[str, Any]) -> str:
    """Return facts about the cache."""
    rows, teacher, numerics, made = found["rows"], found["teacher"], found["numerics"], found["created"]
    times = said_of_times(found["segments"])
    return facts(
        "The cache",
        {
            "Cache": found["cache"],
            "Made": f"{made.get('at', 'at an unknown time')} on {made.get('host', 'an unknown host')}, "
            f"distillcache {made.get('distillcache', '')}",
            "Format": found["format"],
            "Teacher": f"{teacher['path']} ({teacher['family']}, "
            f"{layers_words(teacher['num_blocks'], teacher['hidden_size'])}, vocabulary {teacher['vocab_size']:,})",
            "Weights": teacher["weights_digest"],
            "Computed": f"{numerics['dtype']} on {numerics['platform']}, attention {numerics['attention']}, mesh "
            f"{' x '.join(map(str, numerics['mesh']))}, "
            + ", ".join(f"{name} {version}" for name, version in numerics["versions"].items()),
            "Rows": f"{rows['train']:,} for training, {rows['eval']:,} held out, {rows['row_tokens']:,} tokens each",
            "Tokens": f"{rows['tokens']:,} without padding "
            f"({rows['tokens'] / max(rows['count'] * rows['row_tokens'], 1):.1%} of all positions)",
            "Blocks": _some(found["blocks"], most=200),
            **({"Time": "; ".join(times)} if times else {}),
        },
    )


def config_table(segments: Sequence[Segment]) -> str:
    """The build's config, to unfold."""
    rows = [(name, as_yaml(value)) for name, value in flattened(shown(segments[0].plan.config)).items()]
    return folded("The config of the build", table("Config of the build", ("field", "value"), rows))


def build_progress(found: dict[str, Any], segments: Sequence[Segment]) -> list[str]:
    """Describe the progress of a build; nothing for a cache that is finished and was never extended."""
    if found["finished"] and len(segments) == 1:
        return []
    rows = [
        (
            entry["segment"],
            "brings its own" if entry["rows_of"] is None else f"those of {entry['rows_of']}",
            number(entry["rows"]),
            number(entry["shards"]["done"]),
            number(entry["shards"]["of"]),
            "yes" if entry["finished"] else "no",
        )
        for entry in found["segments"]
    ]
    fragments = [table("Segments", ("segment", "rows", "count", "shards done", "of", "finished"), rows)]
    for segment in segments:
        if segment.committed is not None:
            done = len(segment.committed)
            fragments.insert(0, progress(f"Shards of segment {segment.plan.segment}", done, segment.plan.num_shards))
            fragments.append(workers(segment))
    return fragments


def storage_table(found: dict[str, Any]) -> str:
    """Bytes of every tap."""
    tokens = sum(entry["rows"] for entry in found["segments"] if entry["rows_of"] is None) * found["rows"]["row_tokens"]
    hidden = found["teacher"]["hidden_size"]
    rows = []
    for tap in found["taps"]:
        plain = tap["bytes_per_token"] and BF16_BYTES * hidden * len(tap["slots"])
        share = None if tap["name"] == TOPK_LOGITS else tap["stored_bytes"] / max(tap["bytes"], 1)
        saved = None if share is None else plain / (tap["bytes_per_token"] * share)
        cells = (number(tap["bytes_per_token"]), Numeric(size(tap["bytes"])), Numeric(size(tap["stored_bytes"])))
        rows.append((_label(found, tap), tap["codec"], number(len(tap["slots"])), *cells, number(saved, 3)))
    total = (number(found["bytes_per_token"]), Numeric(size(found["bytes"])), Numeric(size(found["stored_bytes"])))
    rows.append(("all", "", Numeric(""), *total, Numeric("")))
    header = ("tap", "codec", "slots", "bytes a token", "before compression", "stored", "times smaller than bf16")
    shards, rows_each = counted(found["shards"]["of"], "shard"), counted(found["shards"]["rows_per_shard"], "row")
    shard = f"{shards} of {rows_each} each; {tokens:,} token positions, padding included."
    return table("Bytes by tap", header, rows) + paragraph(shard)


def array_table(found: dict[str, Any]) -> str:
    """The zarr arrays, to unfold."""
    rows = [
        (
            array if tap["segment"] == found["segments"][0]["segment"] else f"{array} ({tap['segment']})",
            " x ".join(f"{extent:,}" for extent in each["shape"]),
            each["bits_of"] or each["dtype"],
            each["dtype"],
            tap["compress"],
        )
        for tap in found["taps"]
        for array, each in tap["arrays"].items()
    ]
    header = ("array", "rows x slots x tokens x width", "holds", "stored as", "compressed")
    return folded("The arrays", table("Arrays on disk", header, rows))


def slot_statistics(found: dict[str, Any]) -> list[str]:
    """Root mean square and largest number of every slot, as the build recorded them."""
    taps = [tap for tap in found["taps"] if "rms" in tap]
    if not taps:
        return [paragraph("No shard is committed yet.")]
    words = "Statistics over all rows, written by the build; the report read no activations for them."
    if not found["finished"]:
        words += f" Of a segment that is being built, they are those of up to {SAMPLED_SHARDS} committed shards."
    fragments = [paragraph(words)]
    titles = {"rms": "Root mean square of each tap", "abs_max": "Largest magnitude in each tap"}
    drawn = [_stats_figure(found, taps, key, title) for key, title in titles.items()]
    fragments.append(figures(drawn))
    for tap in taps:
        label, width = _label(found, tap), len(tap["slots"])
        rows = [
            (str(slot), number(rms), number(peak), number(peak / rms if rms else None, 3))
            for slot, rms, peak in zip(tap["slots"], tap["rms"], tap["abs_max"], strict=True)
        ]
        shown = table(f"Statistics of {label}", ("slot", "rms", "largest", "largest / rms"), rows)
        fragments.append(folded(f"{label}: {counted(width, 'slot')}, {_finite(tap['nonfinite'])}", shown))
    return fragments


def _finite(broken: int) -> str:
    return f"{counted(broken, 'number')} not finite" if broken else "all numbers finite"


def _stats_figure(found: dict[str, Any], taps: Sequence[dict[str, Any]], key: str, title: str) -> Figure | None:
    """Draw a statistic by slot; none of a single slot, which the table has."""
    lines = [
        Line(_label(found, tap), np.asarray(tap["slots"], float), np.asarray(tap[key], float))
        for tap in taps
        if tap["name"] != TOPK_LOGITS  # of no block
    ]
    if not any(len(line.x) > 1 for line in lines):
        return None
    drawn, more = lines[: len(SERIES)], len(lines) - len(SERIES)  # of other segments, whose lines would look alike
    spans = "; ".join(low_and_high(line) for line in drawn)
    left_out = f" {counted(more, 'more tap')} of later segments: see below." if more > 0 else ""
    return Figure(
        title=f"{title} by slot",
        caption=f"{spans}.{left_out} {_slots_meaning([tap['name'] for tap in taps])}",
        alt=f"Line chart of the {title.lower()} by slot: {spans}.",
        svg=draw_lines(
            drawn, "slot", {"rms": "root mean square", "abs_max": "magnitude"}[key], points=True, whole=True
        ),
    )


def _slots_meaning(names: Sequence[str]) -> str:
    """Say what a slot is: the number of a block, except behind the last block."""
    words = "Slot l belongs to block l"
    return f"{words}; of resid it is the stream that enters the block." if "resid" in names else f"{words}."


def low_and_high(line: Line) -> str:
    """`resid: lowest 0.9 (slot 0), highest 2.6e+04 (slot 27)`."""
    low, high = int(np.argmin(line.y)), int(np.argmax(line.y))
    return (
        f"{line.name}: lowest {line.y[low]:.3g} (slot {line.x[low]:.0f}), "
        f"highest {line.y[high]:.3g} (slot {line.x[high]:.0f})"
    )


def _rows(sample: Sample) -> list[str]:
    if not sample.rows:
        return []
    tokens = sample.rows[0].real.size
    words = (
        "The Euclidean norm of every token's vector in every slot. A dashed line marks where a document begins; "
        "padding is blank."
    )
    if len(sample.rows) > 1:
        words += " All rows share one scale of colours for each tap."
    if tokens > COLUMNS:
        words += f" Each column shows the largest norm of {-(-tokens // COLUMNS)} neighbouring tokens."
    names = list(dict.fromkeys(name for row in sample.rows for name in row.norms))
    drawn = [
        figure for name in names for figure in _norm_figures([row for row in sample.rows if name in row.norms], name)
    ]
    return [_text_table(sample.rows), paragraph(words), figures(drawn), _row_table(sample)]


def _text_table(rows: Sequence[RowLook]) -> str:
    cells = [
        (
            str(row.number),
            " ".join(row.text.split()),
            "held out" if row.held_out else "training",
            number(int(row.real.sum())),
            number(len(row.starts) + 1),
        )
        for row in rows
    ]
    return table("The rows that are shown", ("row", "begins with", "split", "tokens", "documents"), cells)


def _norm_figures(rows: Sequence[RowLook], name: str) -> Iterator[Figure]:
    """Draw the norms of one tap, a few rows a figure and all on one scale of colours."""
    limits = limits_of([_norm_map(row, name) for row in rows])
    for first in range(0, len(rows), ROWS_A_FIGURE):
        some = rows[first : first + ROWS_A_FIGURE]
        maps = [_norm_map(row, name, alone=len(some) == 1) for row in some]
        peaks = " ".join(f"Row {row.number}: {_peak(row, name)}." for row in some)
        words = f"{NAMES.get(name, name)} in row{'s' if len(some) > 1 else ''} {_and(row.number for row in some)}"
        yield Figure(
            title=f"Token norms of the {words}",
            caption=peaks,
            alt=f"Heat maps of token norms by slot of the {words}. {peaks}",
            svg=draw_maps(maps, 1.9 if len(some) > 1 else 3.3, limits),
        )


def _norm_map(row: RowLook, name: str, *, alone: bool = False) -> HeatMap:
    """Map of norms, slot by token; of a row that is `alone` in its figure with its tokens' text along the axis."""
    values = np.where(row.real, row.norms[name], np.nan)
    return HeatMap(
        values=pooled(values, COLUMNS),
        title=f"row {row.number}, {'held out' if row.held_out else 'for training'}",
        x="token",
        y=f"slot of {name}",
        unit="norm",
        left=-0.5,
        right=values.shape[1] - 0.5,
        row_labels=row.slots[name],
        x_labels=row.labels if alone else None,
        log=True,
        marks=[start - 0.5 for start in row.starts] if len(row.starts) <= 30 else (),
    )


def _and(numbers: Iterable[int]) -> str:
    """`3, 17 and 25`."""
    *others, last = map(str, numbers)
    return f"{', '.join(others)} and {last}" if others else last


def _peak(row: RowLook, name: str) -> str:
    """`largest 41.2 at token 0 of slot 3, median 5.1`."""
    values = np.where(row.real, row.norms[name], np.nan)
    if not np.isfinite(values).any():
        return "no finite norm"
    slot, token = np.unravel_index(np.nanargmax(np.where(np.isfinite(values), values, -1.0)), values.shape)
    where = f"token {token} of slot {row.slots[name][slot]}"
    return f"largest {values[slot, token]:.4g} at {where}, median {np.nanmedian(values):.4g}"


def _row_table(sample: Sample) -> str:
    rows = [(str(row.number), name, _peak(row, name)) for row in sample.rows for name in row.norms]
    return folded("The largest norms in numbers", table("Norms by row and tap", ("row", "tap", "norms"), rows))


def _similarity(alike: Likeness | None) -> list[str]:
    """Similarity of the stream in every two slots; a figure of three slots and more, fewer are in the table."""
    if alike is None or len(alike.slots) < 2:
        return []
    slots, matrix = alike.slots, alike.cosine
    near = [float(matrix[at, at + 1]) for at in range(len(slots) - 1)]
    pairs = [f"{slots[at]} and {slots[at + 1]}" for at in range(len(near))]
    low, high = int(np.argmin(near)), int(np.argmax(near))
    words = (
        f"mean over {alike.tokens:,} tokens. Of neighbouring slots {pairs[low]} are least alike ({near[low]:.3f}), "
        f"{pairs[high]} most ({near[high]:.3f})"
    )
    name = NAMES[STREAM]
    drawn = Figure(
        title=f"Similarity of the {name} in two slots",
        caption=f"Cosine of a token's vectors in both slots, {words}. The blocks between two slots that are much alike "
        "change the stream's direction little.",
        alt=f"Heat map of the cosine between slots of the {name}, {words}.",
        svg=draw_maps(
            [HeatMap(matrix, "", "slot", "slot", "cosine", x_labels=[*map(str, slots)], row_labels=slots)], 3.4
        ),
    )
    listed = table(
        f"Neighbouring slots of {STREAM}", ("slots", "mean cosine"), zip(pairs, map(number, near), strict=True)
    )
    return [figures([drawn] if len(slots) > 2 else []), folded("Neighbouring slots in numbers", listed)]


def _label(found: dict[str, Any], tap: dict[str, Any]) -> str:
    first = found["segments"][0]["segment"]
    return tap["name"] if tap["segment"] == first else f"{tap['name']} ({tap['segment']})"


def _some(numbers: Sequence[int], most: int = 12) -> str:
    """`0, 1, 2 and 9 more`; whole ranges are joined."""
    if list(numbers) == list(range(numbers[0], numbers[0] + len(numbers))) and len(numbers) > 2:
        return f"{numbers[0]} to {numbers[-1]}"
    listed = ", ".join(map(str, numbers[:most]))
    return listed if len(numbers) <= most else f"{listed} and {len(numbers) - most} more"
