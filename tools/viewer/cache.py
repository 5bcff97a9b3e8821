"""The viewer's pages about a cache as a whole: its description, and its rows, a screen at a time."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from markupsafe import Markup

from distillcache.schemas.counted import counted
from distillcache.schemas.errors import DamageError
from distillcache.tools.look.row_facts import documents_of, shown
from distillcache.tools.look.stored_rows import StoredRows
from distillcache.tools.pages.html import FRAGMENTS, Linked, Numeric, note, number, page_title, paragraph, table
from distillcache.tools.report.cache import (
    array_table,
    build_progress,
    config_table,
    plan_facts,
    slot_statistics,
    storage_table,
)
from distillcache.tools.viewer.asked import choice_in, number_in
from distillcache.tools.viewer.page import View, address, choice, form, number_field, steps
from distillcache.tools.viewer.watch import WatchedCache

ROWS_SHOWN = 50
TEXT_TOKENS = 40  # of a row's beginning
TEXT_LETTERS = 100
SPLITS = {"all": "all rows", "train": "train: for training", "eval": "eval: held out"}


def overview(watched: WatchedCache) -> View:
    """Show facts about the cache, warnings, and links."""
    found, stored = watched.described(), watched.rows()
    rows, state = found["rows"], "" if found["finished"] else ", not finished"
    blocks = counted(len(found["blocks"]), "block")
    words = f"{counted(rows['count'], 'row')} of {rows['row_tokens']:,} tokens, {blocks}{state}"
    view = View(page_title("Cache", stored.store.url), words, "/")
    told = [] if found["finished"] else [f"The cache is not finished: {found['to_finish']}."]
    told += [] if watched.textless is None else [watched.textless]
    view.put(note("Look at this first", [*told, *found["warnings"]]))
    view.put(go_to(stored, watched.taps()))
    view.add("What it is", plan_facts(found), config_table(stored.segments))
    view.add("Progress", *build_progress(found, stored.segments))
    view.add("Storage", storage_table(found), array_table(found))
    view.add("Blocks", slot_links(watched.taps()), *watched.once("statistics", lambda: slot_statistics(found)))
    return view


def go_to(stored: StoredRows, taps: Mapping[str, Sequence[int]]) -> str:
    """Forms that lead to a row and to a slot."""
    most = max((slot for slots in taps.values() for slot in slots), default=0)
    row = form("/row", [number_field("number", "row", 0, len(stored) - 1)], "show the row", "Go to a row")
    if not taps:
        return FRAGMENTS.forms([row])
    fields = [choice("tap", "tap", {name: name for name in taps}, next(iter(taps)))]
    slot = form("/slot", [*fields, number_field("slot", "slot", 0, most)], "show the slot", "Go to a slot")
    return FRAGMENTS.forms([row, slot])


def slot_links(taps: Mapping[str, Sequence[int]]) -> str:
    """Every slot of every tap."""
    return Markup("\n").join(
        steps(f"Slots of {name}", [(str(slot), f"/slot/{name}/{slot}") for slot in slots], f"{name}:")
        for name, slots in taps.items()
    )


def row_list(watched: WatchedCache, query: Mapping[str, str]) -> View:
    """Some rows with their beginning; `start` counts within the split.

    Raises:
        NotUnderstood: what is requested makes no sense.
    """
    stored, split = watched.rows(), choice_in(query, "split", list(SPLITS), "all")
    held_out = _held_out(stored)
    count = {"all": len(stored), "eval": len(held_out), "train": len(stored) - len(held_out)}[split]
    start = number_in(query, "start", 0, max(count - 1, 0))
    stop = min(start + ROWS_SHOWN, count)
    numbers = [_number(place, split, held_out) for place in range(start, stop)]
    which = SPLITS[split].partition(": ")[2] or "all"
    words = f"{start + 1:,} to {stop:,} of {count:,}, {which}" if count else f"none, {which}"
    view = View("Rows", words, "/rows")
    fields = [choice("split", "which", SPLITS, split), number_field("start", "starting at", start, max(count - 1, 0))]
    view.put(form("/rows", fields, "list them", "Choose rows"))
    before = address("/rows", split=split, start=max(start - ROWS_SHOWN, 0)) if start else None
    after = address("/rows", split=split, start=stop) if stop < count else None
    moves = steps("Pages of rows", [("← earlier rows", before), ("later rows →", after)])
    header = ("row", "begins with", "split", "shard", "tokens", "targets", "documents")
    view.put(moves, table("The rows", header, _lines(watched, stored, numbers)) or paragraph("There is no such row."))
    return view


def _lines(watched: WatchedCache, stored: StoredRows, numbers: Sequence[int]) -> Iterator[tuple[object, ...]]:
    """A damaged row is a line that says so."""
    for at in numbers:
        link, (segment, shard) = Linked(f"{at}", f"/row/{at}"), stored.shard(at)
        where = Numeric(f"{shard}" if len(stored.groups) == 1 else f"{segment}/{shard}")
        blank = (Numeric(""), Numeric(""), Numeric(""))
        if not stored.committed(at):
            yield link, "not committed yet", "", where, *blank
            continue
        try:
            row = stored.row(at)
        except DamageError as error:
            yield link, f"damaged: {error.what}", "", where, *blank
            continue
        real = row.segment_ids > 0
        begins = shown(watched.decode(row.tokens[real][:TEXT_TOKENS].tolist()))[:TEXT_LETTERS]
        figures = (int(real.sum()), int(row.loss_mask.sum()), len(documents_of(row)))
        yield link, begins, row.split, where, *map(number, figures)


def _held_out(stored: StoredRows) -> np.ndarray:
    """The numbers of all held-out rows, ascending."""
    starts = np.cumsum([0, *(group.base.plan.rows.count for group in stored.groups)])
    found = [
        start + np.asarray(group.base.plan.rows.eval_indices, np.int64)
        for start, group in zip(starts, stored.groups, strict=False)
    ]
    return np.concatenate(found)


def _number(place: int, split: str, held_out: np.ndarray) -> int:
    """The number, through all rows, of a split's row."""
    if split == "eval":
        return int(held_out[place])
    if split == "train":  # behind as many held-out rows as have fewer rows for training before them
        return int(place + np.searchsorted(held_out - np.arange(len(held_out)), place, side="right"))
    return place
