"""The viewer's search: rows that hold some text or token ids. A page reads for a bounded time and can continue."""

import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from distillcache.schemas.counted import counted
from distillcache.schemas.errors import DamageError, StorageError
from distillcache.schemas.format.rows import Row
from distillcache.tools.look.row_facts import documents_of, shown
from distillcache.tools.look.stored_rows import StoredRows
from distillcache.tools.pages.html import FRAGMENTS, note, paragraph
from distillcache.tools.viewer.asked import NotUnderstood, number_in
from distillcache.tools.viewer.page import View, address, form, number_field, steps, text_field
from distillcache.tools.viewer.row import one_line
from distillcache.tools.viewer.watch import WatchedCache

SECONDS = 3.0  # of reading for a page
MOST_ROWS = 5000  # likewise, on fast disks
HITS = 20
MOST_LETTERS = 200
MOST_IDS = 32
AROUND = 60  # letters on each side of what was found

Hit = tuple[int, int, str]  # (first token, how often in the row, HTML of what is around)


@dataclass
class Hits:
    """next_row: where to continue; None: all rows were looked at. damaged: rows that could not be read."""

    hits: list[tuple[int, Hit]] = field(default_factory=list)
    rows: int = 0
    next_row: int | None = None
    damaged: list[str] = field(default_factory=list)


def search_page(watched: WatchedCache, query: Mapping[str, str]) -> View:
    """The form, and what was found.

    Raises:
        NotUnderstood: what is requested makes no sense.
    """
    stored, words = watched.rows(), query.get("text", "")[:MOST_LETTERS]
    ids, start = _ids(query.get("ids", "")), number_in(query, "start", 0, max(len(stored) - 1, 0))
    view = View("Search", "rows that hold a text, or these token ids in this order", "/search")
    fields = [
        text_field("text", "text, case-insensitive", words, MOST_LETTERS),
        text_field("ids", "or token ids, such as 12 345 6", " ".join(map(str, ids)), 8 * MOST_IDS),
        number_field("start", "from row", start, max(len(stored) - 1, 0)),
    ]
    view.put(form("/search", fields, "search", "Search"))
    if not words and not ids:
        return view
    look = (lambda row: _find_ids(watched, row, ids)) if ids else (lambda row: _find_text(watched, row, words))
    found = scan(stored, start, look)
    view.put(note("Unreadable, left out", found.damaged[:8]))
    view.add("Found", *_listed(found, start))
    if found.next_row is not None:
        to = address("/search", text=words or None, ids=" ".join(map(str, ids)) or None, start=found.next_row)
        view.put(steps("Go on", [(f"continue from row {found.next_row:,}", to)]))
    return view


def scan(stored: StoredRows, start: int, look: Callable[[Row], Hit | None]) -> Hits:
    """Committed rows from `start` on, until there are enough hits, rows or seconds."""
    found, began = Hits(), time.monotonic()
    for at in range(start, len(stored)):
        if len(found.hits) >= HITS or found.rows >= MOST_ROWS or time.monotonic() - began > SECONDS:
            found.next_row = at
            break
        found.rows += 1
        try:
            hit = look(stored.row(at)) if stored.committed(at) else None
        except (DamageError, StorageError) as error:
            found.damaged.append(f"row {at}: {one_line(error)}")
            continue
        if hit is not None:
            found.hits.append((at, hit))
    return found


def _listed(found: Hits, start: int) -> list[str]:
    of = f"of {counted(found.rows, 'row')} from row {start:,} on" + (
        ", all to the end" if found.next_row is None else ""
    )
    count = len(found.hits)
    lines = [paragraph(f"{count} {'row holds' if count == 1 else 'rows hold'} it, {of}.")]
    for row, (token, times, around) in found.hits:
        place = token // 64 * 64
        link = address(f"/row/{row}", start=place or None)
        lines.append(FRAGMENTS.hit(row, link, token, times, around))
    return lines


def _ids(words: str) -> list[int]:
    parts = words.replace(",", " ").split()
    if len(parts) > MOST_IDS or not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise NotUnderstood(f"ids must be up to {MOST_IDS} whole numbers, such as 12 345 6.")
    return [int(part) for part in parts]


def _find_text(watched: WatchedCache, row: Row, words: str) -> Hit | None:
    """Within documents: a text does not continue in the next one."""
    pattern, decode, first, times = re.compile(re.escape(words), re.IGNORECASE), watched.decode, None, 0
    for _, start, stop in documents_of(row):
        body = decode(row.tokens[start:stop].tolist())
        hits = list(pattern.finditer(body))
        times += len(hits)
        if hits and first is None:
            begin, end = hits[0].span()
            first = (start + _token_at(row, start, stop, begin, decode), _marked(body, begin, end))
    return None if first is None else (first[0], times, first[1])


def _token_at(row: Row, start: int, stop: int, letter: int, decode: Callable[[list[int]], str]) -> int:
    """Which token of the document holds this letter: by halving, since tokens alone may decode otherwise."""
    low, high = 0, stop - start - 1
    while low < high:
        middle = (low + high) // 2
        if len(decode(row.tokens[start : start + middle + 1].tolist())) > letter:
            high = middle
        else:
            low = middle + 1
    return low


def _find_ids(watched: WatchedCache, row: Row, ids: list[int]) -> Hit | None:
    tokens = row.tokens[row.segment_ids > 0]
    starts = np.flatnonzero(tokens[: max(len(tokens) - len(ids) + 1, 0)] == ids[0])
    starts = [int(at) for at in starts if tokens[at : at + len(ids)].tolist() == ids]
    if not starts:
        return None
    at, decode = starts[0], watched.decode
    before, inside = decode(tokens[max(at - 16, 0) : at].tolist()), decode(ids)
    body = before + inside + decode(tokens[at + len(ids) : at + len(ids) + 16].tolist())
    place = int(np.flatnonzero(row.segment_ids > 0)[at])
    return place, len(starts), _marked(body, len(before), len(before) + len(inside))


def _marked(body: str, begin: int, end: int) -> str:
    """Return the text around letters `begin` to `end`, which are highlighted."""
    before, inside, after = body[max(begin - AROUND, 0) : begin], body[begin:end], body[end : end + AROUND]
    return FRAGMENTS.runs([("on", shown(before)), ("mark", shown(inside)), ("on", shown(after))])
