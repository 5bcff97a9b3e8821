"""`distillcache show`: one row of a cache as text with documents and masks, next to per-token activation statistics."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from distillcache.models.text.cache_tokenizer import cache_tokenizer
from distillcache.schemas import command_line
from distillcache.schemas.config.look import ShowConfig
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import DamageError
from distillcache.schemas.store.store import using
from distillcache.schemas.store.whole_file import refuse_foreign_file
from distillcache.tools.look.row_facts import RowFacts, TapFacts, not_finite, read_row, shown, summary
from distillcache.tools.look.sample_checks import SampleChecks
from distillcache.tools.look.show_image import draw
from distillcache.tools.look.stored_rows import StoredRows
from distillcache.tools.pages.pictures import MARKS
from distillcache.tools.pages.terminal import table_console

CHARACTERS_SHOWN = 20  # characters of a token
TEXT_SHOWN = 400  # characters of a document on a terminal


def run(argv: Sequence[str], command: str, as_json: bool) -> int:
    """Print the row as tables or as one JSON object, and draw it where a picture is requested.

    Returns: the exit code, 2 where some of the row is damaged.
    """
    config = command_line.parse(ShowConfig, argv, command, positional=("cache",))
    with using(config.storage):
        if config.image is not None:
            refuse_foreign_file(config.image, "--image", *MARKS)
        rows = StoredRows(config.cache)
        facts = read_row(rows, config.row, config.block)
        code = 2 if facts.damaged else 0
        texts, odd = _texts(rows, facts), [*map(_told, facts.damaged), *_odd(rows, facts)]
        if config.image is not None:
            draw(facts, config.image, config.block)
    if as_json:
        print(json.dumps({**_describe(rows, facts, texts), "warnings": odd}))
        return code
    _print(rows, facts, texts, odd, range(config.start, min(config.start + config.tokens, len(facts.token_texts))))
    if config.image is not None:
        print(f"the picture of all tokens and slots is written to {config.image}")
    return code


def _told(error: DamageError) -> str:
    return f"{error.what}: {error.facts.get('file', '')}. {error.next or ''}".strip()


def _texts(rows: StoredRows, facts: RowFacts) -> list[str]:
    tokenizer = cache_tokenizer(rows.store, rows.plan)
    return [tokenizer.decode(facts.row.tokens[start:stop].tolist()) for _, start, stop in facts.documents]


def _odd(rows: StoredRows, facts: RowFacts) -> list[str]:
    """Return the impossible values in the row by itself."""
    checks = SampleChecks.of(rows.store, rows.plan)
    checks.row(facts.number, facts.shard, facts.row)
    if any(tap.tap == "resid" for tap in facts.taps):
        for slot, values in rows.slots(facts.number, "resid", [slot for slot in (0,) if _has(rows, facts, slot)]):
            checks.slot("resid", slot, values)
    return [*checks.findings(), *not_finite(facts.taps)]


def _has(rows: StoredRows, facts: RowFacts, slot: int) -> bool:
    return any(stored.tap.name == "resid" and slot in stored.tap.slots for stored in rows.taps(facts.number))


def _describe(rows: StoredRows, facts: RowFacts, texts: Sequence[str]) -> dict[str, Any]:
    """The row as plain values; of every tap and slot one number a token."""
    row = facts.row
    return {
        "cache": rows.store.url,
        "row": facts.number,
        "split": row.split,
        "segment": facts.shard[0],
        "shard": facts.shard[1],
        "documents": [
            {"document": number, "start": start, "stop": stop, "text": text}
            for (number, start, stop), text in zip(facts.documents, texts, strict=True)
        ],
        "tokens": {
            "id": row.tokens.tolist(),
            "text": list(facts.token_texts),
            "position": row.positions.tolist(),
            "document": row.segment_ids.tolist(),
            "target": row.loss_mask.tolist(),
        },
        "slots": [entry for tap in facts.taps for entry in summary(tap, facts.real)],
        "taps": {
            tap.tap: {
                "slots": list(tap.slots),
                "norm": _rounded(tap.norm),
                "cosine_to_next": _rounded(tap.cosine),
                "largest_dimension": tap.dimension.tolist(),
                "largest_value": _rounded(tap.value),
            }
            for tap in facts.taps
        },
    }


def _rounded(values: np.ndarray) -> list[list[float]]:
    return [[float(f"{value:.5g}") for value in line] for line in values]


def _print(rows: StoredRows, facts: RowFacts, texts: Sequence[str], odd: Sequence[str], tokens: range) -> None:
    console, row = table_console(), facts.row
    real, targets = int(facts.real.sum()), int(row.loss_mask.sum())
    console.print(
        f"row {facts.number} of {len(rows):,} ({row.split}), shard {facts.shard[1]} of segment {facts.shard[0]}: "
        f"{counted(len(row.tokens), 'token')}, {real} real, {counted(targets, 'target')}, "
        f"{counted(len(facts.documents), 'document')}"
    )
    for (number, start, stop), text in zip(facts.documents, texts, strict=True):
        cut = f"{text[:TEXT_SHOWN]} ..." if len(text) > TEXT_SHOWN else text
        console.print(f"[bold]document {number}[/], tokens {start} to {stop - 1}: {escape(shown(cut))}")
    console.print()
    if facts.taps:
        console.print(_slot_table(facts))
        console.print()
    console.print(_token_table(facts, tokens))
    if any(len(tap.slots) > 1 for tap in facts.taps):
        console.print(
            "norm and largest are maxima over the slots listed above, cosine (with the next slot) is the minimum; "
            "@ names the slot"
        )
    for words in odd:
        console.print(f"[yellow]warning:[/] {escape(words)}")
    if len(tokens) < len(row.tokens):
        console.print(
            f"tokens {tokens.start} to {tokens.stop - 1} of {len(row.tokens)}: --start and --tokens show others"
        )


def _slot_table(facts: RowFacts) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("tap", "slot", "median norm", "largest", "cosine to next", "largest dimensions (rms)"):
        table.add_column(column, justify="left" if column == "tap" else "right")
    for tap in facts.taps:
        for entry in summary(tap, facts.real):
            norm, cosine = entry["norm"], entry["cosine_to_next"]
            dimensions = ", ".join(f"{at} ({rms:.3g})" for at, rms in entry["largest_dimensions"])
            bad = f"[red] {entry['nonfinite']} not finite[/]" if entry["nonfinite"] else ""
            figures = ["-" if norm[key] is None else f"{norm[key]:.3g}" for key in ("median", "largest")]
            last = "" if cosine is None else f"{cosine:.4f}"
            table.add_row(tap.tap, str(entry["slot"]), *figures, last, dimensions + bad)
    return table


def _token_table(facts: RowFacts, tokens: range) -> Table:
    """A token a line. With several slots: the largest norm, the least similarity, the largest number, and @ where."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("token", "text", "position", "document", "target"):
        table.add_column(column, justify="left" if column == "text" else "right", no_wrap=True)
    for tap in facts.taps:
        for column in (f"{tap.tap} norm", *(["cosine"] if _has_cosine(tap) else []), "largest"):
            table.add_column(column, justify="right", no_wrap=True)
    row = facts.row
    for at in tokens:
        style = None if facts.real[at] else "dim"
        document = str(row.segment_ids[at]) if facts.real[at] else "padding"
        mark = "x" if row.loss_mask[at] else ""
        text = escape(repr(facts.token_texts[at])[1:-1][:CHARACTERS_SHOWN])
        cells = [str(at), text, str(row.positions[at]), document, mark]
        table.add_row(*cells, *(cell for tap in facts.taps for cell in _cells(tap, at)), style=style)
    return table


def _has_cosine(tap: TapFacts) -> bool:
    """Return whether a tap has similarities between blocks: the stream alone; contributions to it have no reason to
    be similar.
    """
    return tap.tap == "resid" and len(tap.cosine) > 0


def _cells(tap: TapFacts, token: int) -> list[str]:
    several = len(tap.slots) > 1

    def where(place: int) -> str:
        return f" @{tap.slots[place]}" if several else ""

    top, far = int(tap.norm[:, token].argmax()), int(np.abs(tap.value[:, token]).argmax())
    cells = [f"{tap.norm[top, token]:.3g}{where(top)}"]
    if _has_cosine(tap):
        least = int(tap.cosine[:, token].argmin())
        cells.append(f"{tap.cosine[least, token]:.3f}{where(least)}")
    return [*cells, f"{tap.dimension[far, token]}: {tap.value[far, token]:.3g}{where(far)}"]
