"""The viewer's page about one row: its text with documents and masks, and per-token activation statistics.

A damaged tap is reported on the page; the others are shown.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from markupsafe import Markup

from distillcache.schemas.counted import counted
from distillcache.schemas.errors import DamageError, InputError, StorageError
from distillcache.schemas.format.manifest import TOPK_LOGITS
from distillcache.schemas.format.rows import Row
from distillcache.tools.look.row_facts import (
    TapFacts,
    documents_of,
    not_finite,
    shown,
    summary,
    tap_facts,
    token_labels,
)
from distillcache.tools.look.sample_checks import SampleChecks
from distillcache.tools.look.stored_rows import StoredRows
from distillcache.tools.pages.figures import Figure, HeatMap, Line, draw_lines, draw_maps
from distillcache.tools.pages.html import FRAGMENTS, Linked, Numeric, figures, folded, note, number, paragraph, table
from distillcache.tools.pages.pictures import pooled
from distillcache.tools.report.cache import COLUMNS, NAMES
from distillcache.tools.viewer.asked import choice_in, number_in
from distillcache.tools.viewer.page import View, address, choice, form, number_field, steps
from distillcache.tools.viewer.watch import WatchedCache

TOKENS_SHOWN = 64
ALL_BLOCKS_BYTES = 64 << 20  # of a row's activations: larger rows are shown one block at a time, unless asked for all
MARKS_SHOWN = 30
TOKEN_LETTERS = 20  # of a token: some are long rules of dashes


@dataclass(frozen=True)
class RowLook:
    """A row with its readable taps, and the damage of the others."""

    number: int
    row: Row
    taps: tuple[TapFacts, ...]
    damaged: tuple[str, ...]

    @property
    def real(self) -> np.ndarray:
        return self.row.segment_ids > 0


def row_page(watched: WatchedCache, at: int, query: Mapping[str, str]) -> View:
    """One row.

    Raises:
        InputError: there is no such row, or it is not committed yet.
        DamageError: its tokens are not what was committed.
        NotUnderstood: what is requested makes no sense.
    """
    stored, row = watched.rows(), committed_row(watched.rows(), at)
    names = [name for name in stored.tap_names(at) if name != TOPK_LOGITS]
    slots = {name: places for name, places in watched.taps().items() if name in names}
    tap = choice_in(query, "tap", ["all", *names], "all")
    block = _block(query, stored, slots)
    start = number_in(query, "start", 0, len(row.tokens) - 1)
    found = look(watched, at, row, names if tap == "all" else [tap], block)
    view = View(f"Row {at}", _subtitle(stored, at, row), "/rows")
    view.put(_moves(stored, at, query), note("Damaged data", found.damaged))
    view.put(note("Impossible values", _odd(watched, found)))
    view.add("Text", *_text(watched, row))
    view.add("Blocks", _chooser(at, tap, names, block, slots, start), *_blocks(watched, found, block))
    view.add("Tokens", *_tokens(watched, found, start, {"tap": query.get("tap"), "block": query.get("block")}))
    return view


def committed_row(stored: StoredRows, at: int) -> Row:
    """A row's tokens.

    Raises:
        InputError: there is no such row, or it is not committed yet.
        DamageError: they are not what was committed.
    """
    if not stored.committed(at):
        raise InputError("this row is not committed yet", {"row": at}, "choose another, or wait")
    return stored.row(at)


def look(watched: WatchedCache, at: int, row: Row, names: Sequence[str], block: int | None) -> RowLook:
    """The taps of a row, each by itself."""
    stored, found, damaged = watched.rows(), [], []
    for name in names:
        try:
            each = watched.recent((at, name, block), lambda name=name: tap_facts(stored, at, name, row, block))
        except (DamageError, StorageError) as error:
            damaged.append(f"{name}: {one_line(error)}")
        else:
            found += [each] if each is not None else []
    return RowLook(at, row, tuple(found), tuple(damaged))


def _odd(watched: WatchedCache, found: RowLook) -> list[str]:
    """Return the impossible values in the row by itself, as `show` reports them."""
    stored, at = watched.rows(), found.number
    checks = SampleChecks(watched.padding)
    checks.row(at, stored.shard(at), found.row)
    if any(tap.tap == "resid" for tap in found.taps) and 0 in watched.taps().get("resid", ()):
        with suppress(DamageError, InputError, StorageError):  # told above, or not there yet
            for slot, values in stored.slots(at, "resid", [0]):
                checks.slot("resid", slot, values)
    return [*checks.findings(), *not_finite(found.taps)]


def one_line(error: DamageError | StorageError) -> str:
    """A message with its facts."""
    facts_of = {**error.facts, **({"next": error.next} if error.next else {})}
    return f"{error.what} ({'; '.join(f'{name} {value}' for name, value in facts_of.items())})"


def running_text(watched: WatchedCache, row: Row, start: int, stop: int, marked: int | None = None) -> str:
    """Tokens as text; those that are no targets, and the marked one, set apart."""
    decode, fragments = watched.decode, []
    kinds = [("mark" if at == marked else "on" if row.loss_mask[at] else "off") for at in range(start, stop)]
    edges = [0, *(at for at in range(1, len(kinds)) if kinds[at] != kinds[at - 1]), len(kinds)]
    for first, last in pairwise(edges):
        kind = kinds[first] if first < len(kinds) else "on"
        fragments.append((kind, decode(row.tokens[start + first : start + last].tolist())))
    return FRAGMENTS.runs(fragments)


def _block(query: Mapping[str, str], stored: StoredRows, slots: Mapping[str, Sequence[int]]) -> int | None:
    """Which block, None: all."""
    known = sorted({slot for places in slots.values() for slot in places})
    large = max(segment.plan.bytes_per_row for segment in stored.segments) > ALL_BLOCKS_BYTES
    default = str(known[0]) if large and known else "all"
    word = choice_in(query, "block", ["all", *map(str, known)], default)
    return None if word == "all" else int(word)


def _subtitle(stored: StoredRows, at: int, row: Row) -> str:
    segment, shard = stored.shard(at)
    real, targets, documents = int((row.segment_ids > 0).sum()), int(row.loss_mask.sum()), len(documents_of(row))
    split = "held out" if row.split == "eval" else "for training"
    return (
        f"of {len(stored):,}, {split}, shard {shard} of segment {segment}: {counted(len(row.tokens), 'token')}, "
        f"{real:,} without padding, {counted(targets, 'target')}, {counted(documents, 'document')}"
    )


def _moves(stored: StoredRows, at: int, query: Mapping[str, str]) -> str:
    kept = {"tap": query.get("tap"), "block": query.get("block")}
    before = address(f"/row/{at - 1}", **kept) if at else None
    after = address(f"/row/{at + 1}", **kept) if at + 1 < len(stored) else None
    return steps("Other rows", [("← row " + str(at - 1), before), (f"row {at + 1} →", after)])


def _text(watched: WatchedCache, row: Row) -> Iterator[str]:
    real = int((row.segment_ids > 0).sum())
    if real > int((row.loss_mask & (row.segment_ids > 0)).sum()):
        yield paragraph("Tokens that are not targets are dotted and slanted.")
    documents = []
    for document, start, stop in documents_of(row):
        tag = f"document {document}, tokens {start} to {stop - 1}"
        documents.append(FRAGMENTS.document(tag, running_text(watched, row, start, stop)))
    if documents:
        yield FRAGMENTS.running("Text of the row", Markup("").join(documents))
    if real < len(row.tokens):
        yield paragraph(f"The other {counted(len(row.tokens) - real, 'token')} of the row are padding.")


def _chooser(
    at: int, tap: str, names: Sequence[str], block: int | None, slots: Mapping[str, Sequence[int]], start: int
) -> str:
    blocks = sorted({slot for places in slots.values() for slot in places})
    fields = [
        choice("tap", "tap", {"all": "all taps", **{name: name for name in names}}, tap),
        choice(
            "block",
            "block",
            {"all": "all blocks", **{str(each): str(each) for each in blocks}},
            "all" if block is None else str(block),
        ),
        FRAGMENTS.hidden_field("start", start),
    ]
    return form(f"/row/{at}", fields, "show them", "Choose tap and block")


def _blocks(watched: WatchedCache, found: RowLook, block: int | None) -> Iterator[str]:
    if not found.taps or not found.real.any():
        yield paragraph("There are no activations of real tokens to show.")
        return
    labels = token_labels([watched.decode([token]) for token in found.row.tokens.tolist()], found.real)
    yield figures([*(_map(found, tap, labels) for tap in found.taps if len(tap.slots) > 2), _curves(found, labels)])
    yield from (_summary(found, tap) for tap in found.taps)
    if block is not None:
        yield paragraph("A block has two slots of resid: the stream that enters it and the stream that leaves it.")


def _map(found: RowLook, tap: TapFacts, labels: Sequence[str]) -> Figure:
    """Norms, slot by token, and of the stream how alike neighbouring slots are."""
    starts = [start for _, start, _ in documents_of(found.row)][1:]
    marks = [start - 0.5 for start in starts] if len(starts) <= MARKS_SHOWN else []

    def drawn(values: np.ndarray, title: str, unit: str, slots: Sequence[int], log: bool) -> HeatMap:
        width = len(found.real) - 0.5
        return HeatMap(values, title, "token", "slot", unit, -0.5, width, slots, labels, log, marks)

    norms = tap.norm[:, found.real]
    words = f"from {norms.min():.4g} to {norms.max():.4g}, median {np.median(norms):.4g}"
    drawn_of, what = "Token norms", "norm of every token's vector"
    pooled_norms = pooled(np.where(found.real, tap.norm, np.nan), COLUMNS)
    maps = [drawn(pooled_norms, f"{tap.tap}: norm", "norm", tap.slots, True)]
    if tap.tap == "resid":
        least = -pooled(-np.where(found.real, tap.cosine, np.nan), COLUMNS)  # where the stream turns
        maps.append(drawn(least, f"{tap.tap}: cosine to the next slot", "cosine", tap.slots[:-1], False))
        drawn_of, what = "Token norms and cosines", f"{what}, and its cosine to the next slot's"
    return Figure(
        title=f"{drawn_of} of the {NAMES.get(tap.tap, tap.tap)} by slot",
        caption=f"The {what}; norms {words}. A dashed line starts a document; padding is blank.",
        alt=f"Heat map of the {what} in {tap.tap}, slot by token; norms {words}.",
        svg=draw_maps(maps, 2.6),
    )


def _curves(found: RowLook, labels: Sequence[str]) -> Figure | None:
    """Draw the norm of every token for a few slots."""
    lines = []
    for tap in (tap for tap in found.taps if len(tap.slots) <= 2):
        for slot, norms in zip(tap.slots, tap.norm, strict=True):
            values = pooled(np.where(found.real, norms, np.nan)[None], COLUMNS)[0]
            width = -(-len(norms) // COLUMNS)
            lines.append(Line(f"{tap.tap} {slot}", np.arange(len(values), dtype=float) * width, values))
    if not lines:
        return None
    words = "; ".join(f"{line.name} up to {np.nanmax(line.y):.4g}" for line in lines)
    return Figure(
        title="Norm of each token's vector",
        caption=f"{words}.",
        alt=f"Line chart of the norm of every token's vector: {words}.",
        svg=draw_lines(lines, "token", "norm", x_labels=labels),
    )


def _summary(found: RowLook, tap: TapFacts) -> str:
    rows = []
    for entry in summary(tap, found.real):
        norm, cosine = entry["norm"], entry["cosine_to_next"]
        link = Linked(str(entry["slot"]), f"/slot/{tap.tap}/{entry['slot']}")
        dimensions = ", ".join(f"{at} ({rms:.3g})" for at, rms in entry["largest_dimensions"])
        cells = [number(norm[key]) for key in ("median", "largest")]
        rows.append((link, *cells, number(cosine), number(entry["nonfinite"]), dimensions))
    header = ("slot", "median norm", "largest", "cosine to next", "not finite", "largest dimensions (rms)")
    drawn = table(f"Slots of {tap.tap} in this row", header, rows)
    return drawn if len(rows) <= 4 else folded(f"{tap.tap}: {counted(len(rows), 'slot')} in numbers", drawn)


def _tokens(watched: WatchedCache, found: RowLook, start: int, kept: Mapping[str, str | None]) -> Iterator[str]:
    """Some tokens, a line each, with what is extreme among the slots that are shown."""
    count = len(found.row.tokens)
    stop = min(start + TOKENS_SHOWN, count)
    if any(len(tap.slots) > 1 for tap in found.taps):
        yield paragraph(
            "norm and largest are maxima over the slots shown, cosine (with the next slot) is the minimum; @ names the "
            "slot."
        )
    before = address(f"/row/{found.number}", **kept, start=max(start - TOKENS_SHOWN, 0)) if start else None
    after = address(f"/row/{found.number}", **kept, start=stop) if stop < count else None
    yield steps("Pages of tokens", [("← earlier tokens", before), ("later tokens →", after)])
    header = ["token", "text", "position", "document", "target"]
    for tap in found.taps:
        header += [f"{tap.tap} norm", *([f"{tap.tap} cosine"] if _has_cosine(tap) else []), f"{tap.tap} largest"]
    rows = [_token_cells(watched, found, at) for at in range(start, stop)]
    yield table(f"Tokens {start} to {stop - 1} of {count:,}", header, rows)
    last = count - 1
    yield form(
        f"/row/{found.number}",
        [*_hidden(kept), number_field("start", "tokens from", start, last)],
        "show them",
        "Choose tokens",
    )


def _hidden(values: Mapping[str, str | None]) -> list[str]:
    return [FRAGMENTS.hidden_field(name, value) for name, value in values.items() if value is not None]


def _token_cells(watched: WatchedCache, found: RowLook, at: int) -> list[object]:
    row, real = found.row, bool(found.real[at])
    token_text = shown(watched.decode([int(row.tokens[at])]))[:TOKEN_LETTERS]
    cells: list[object] = [
        Linked(str(at), f"/row/{found.number}/token/{at}", right=True),
        token_text if token_text.strip() else repr(token_text),
        number(int(row.positions[at])),
        number(int(row.segment_ids[at])) if real else Numeric("padding"),
        Numeric("yes" if row.loss_mask[at] else "no"),
    ]
    for tap in found.taps:
        cells += _tap_cells(tap, at)
    return cells


def _tap_cells(tap: TapFacts, at: int) -> list[Numeric]:
    def where(place: int) -> str:
        return f" @{tap.slots[place]}" if len(tap.slots) > 1 else ""

    top, far = int(tap.norm[:, at].argmax()), int(np.abs(tap.value[:, at]).argmax())
    cells = [Numeric(f"{tap.norm[top, at]:.4g}{where(top)}")]
    if _has_cosine(tap):
        least = int(tap.cosine[:, at].argmin())
        cells.append(Numeric(f"{tap.cosine[least, at]:.3f}{where(least)}"))
    return [*cells, Numeric(f"{tap.dimension[far, at]}: {tap.value[far, at]:.3g}{where(far)}")]


def _has_cosine(tap: TapFacts) -> bool:
    """Return whether a tap has similarities between blocks: the stream alone; contributions to it have no reason to
    be similar.
    """
    return tap.tap == "resid" and len(tap.cosine) > 0
