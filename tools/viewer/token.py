"""The viewer's page about one token: its vector in every slot and, if recorded, the teacher's prediction."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from distillcache.schemas.errors import DamageError, StorageError
from distillcache.schemas.format.manifest import TOPK_LOGITS
from distillcache.schemas.format.rows import Row
from distillcache.tools.look.row_facts import shown
from distillcache.tools.look.stored_rows import StoredRows, finite, lengths
from distillcache.tools.pages.figures import Figure, Line, draw_lines
from distillcache.tools.pages.html import FRAGMENTS, Linked, Numeric, facts, figures, note, number, paragraph, table
from distillcache.tools.report.cache import low_and_high
from distillcache.tools.viewer.asked import NotThere
from distillcache.tools.viewer.page import View, steps
from distillcache.tools.viewer.row import committed_row, one_line, running_text
from distillcache.tools.viewer.watch import WatchedCache

AROUND = 32  # tokens shown on each side
LARGEST = 5  # dimensions
TINY = 1e-30


@dataclass(frozen=True)
class SlotVector:
    """One token's vector in one slot. cosine: to the next stored slot's; None: of the last."""

    slot: int
    norm: float
    cosine: float | None
    largest: tuple[tuple[int, float], ...]
    nonfinite: int


def token_page(watched: WatchedCache, at: int, token: int) -> View:
    """One token of a row, across blocks.

    Raises:
        InputError: there is no such row, or it is not committed yet.
        NotThere: the row has no such token.
        DamageError: the row's tokens are not what was committed.
    """
    stored, row = watched.rows(), committed_row(watched.rows(), at)
    count = len(row.tokens)
    if token >= count:
        raise NotThere(f"Row {at} has no token {token}: its tokens are 0 to {count - 1}.")
    view = View(f"Token {token} of row {at}", _subtitle(watched, row, token), "/rows")
    before = f"/row/{at}/token/{token - 1}" if token else None
    after = f"/row/{at}/token/{token + 1}" if token + 1 < count else None
    place = token // 64 * 64
    back = f"/row/{at}" + (f"?start={place}" if place else "")
    links = [("← token " + str(token - 1), before), (f"token {token + 1} →", after), (f"row {at}", back)]
    view.put(steps("Neighbours", links))
    view.add("Context", _context(watched, row, token), _facts(row, token))
    vectors, damaged = _vectors(watched, at, token)
    view.put(note("Damaged data", damaged))
    view.add("By slot", *_by_slot(vectors))
    view.add("The teacher's next-token prediction", *_expected(watched, stored, at, row, token))
    return view


def _subtitle(watched: WatchedCache, row: Row, token: int) -> str:
    decoded = watched.decode([int(row.tokens[token])])
    return f"{shown(decoded)!r}, id {int(row.tokens[token])}" + ("" if row.segment_ids[token] else ", padding")


def _context(watched: WatchedCache, row: Row, token: int) -> str:
    """The tokens around it, of its own document."""
    same = np.flatnonzero(row.segment_ids == row.segment_ids[token])
    start, stop = max(int(same[0]), token - AROUND), min(int(same[-1]) + 1, token + AROUND + 1)
    inside = running_text(watched, row, start, stop, token)
    return FRAGMENTS.running("Text around the token", inside)


def _facts(row: Row, token: int) -> str:
    document = int(row.segment_ids[token])
    return facts(
        "The token",
        {
            "Id": int(row.tokens[token]),
            "Position": int(row.positions[token]),
            "Document": document or "padding",
            "Target": "counts" if row.loss_mask[token] else "does not count",
        },
    )


def _vectors(watched: WatchedCache, at: int, token: int) -> tuple[dict[str, tuple[SlotVector, ...]], list[str]]:
    """Read the vectors of each readable tap; returns the faults of the others too."""
    stored, found, damaged = watched.rows(), {}, []
    for name in (name for name in stored.tap_names(at) if name != TOPK_LOGITS):
        try:
            found[name] = watched.recent(
                (at, name, "token", token), lambda name=name: slot_vectors(stored, at, name, token)
            )
        except (DamageError, StorageError) as error:
            damaged.append(f"{name}: {one_line(error)}")
    return found, damaged


def slot_vectors(stored: StoredRows, at: int, name: str, token: int) -> tuple[SlotVector, ...]:
    """A token's vectors, one slot at a time; numbers that are not finite count as zeros, and are counted."""
    found: list[SlotVector] = []
    before: tuple[int, np.ndarray, int] | None = None
    for slot, values in stored.slots(at, name):
        raw = values[token].astype(np.float32)
        now = (slot, finite(raw), int(np.count_nonzero(~np.isfinite(raw))))
        if before is not None:
            found.append(_described(*before, now[1]))
        before = now
    return (*found, _described(*before, None)) if before is not None else ()


def _described(
    slot: int, vector: Float[np.ndarray, " D"], nonfinite: int, following: Float[np.ndarray, " D"] | None
) -> SlotVector:
    norm, cosine = float(lengths(vector)), None
    if following is not None:
        cosine = float(vector.astype(np.float64) @ following / max(norm * float(lengths(following)), TINY))
    largest = tuple((int(at), float(vector[at])) for at in np.argsort(-np.abs(vector))[:LARGEST])
    return SlotVector(slot, norm, cosine, largest, nonfinite)


def _by_slot(vectors: dict[str, tuple[SlotVector, ...]]) -> Iterator[str]:
    if not vectors:
        yield paragraph("There are no numbers to show.")
        return
    yield figures([_norms(vectors), _alike(vectors)])
    for name, found in vectors.items():
        rows = [
            (
                Linked(str(each.slot), f"/slot/{name}/{each.slot}"),
                number(each.norm),
                number(each.cosine),
                number(each.nonfinite),
                ", ".join(f"{at}: {value:.4g}" for at, value in each.largest),
            )
            for each in found
        ]
        header = ("slot", "norm", "cosine to next", "not finite", "largest dimensions")
        yield table(f"This token in {name}", header, rows)


def _norms(vectors: dict[str, tuple[SlotVector, ...]]) -> Figure | None:
    """Draw the norms of the token's vectors; none where every tap has one slot, which the tables have."""
    lines = [
        Line(name, np.asarray([each.slot for each in found], float), np.asarray([each.norm for each in found]))
        for name, found in vectors.items()
    ]
    if not any(len(line.x) > 1 for line in lines):
        return None
    words = "; ".join(map(low_and_high, lines))
    svg = draw_lines(lines, "slot", "norm", points=True, whole=True)
    title = "Norm of the token's vector by slot"
    return Figure(title, f"{words}.", f"Line chart of the norm of the token's vector by slot: {words}.", svg)


def _alike(vectors: dict[str, tuple[SlotVector, ...]]) -> Figure | None:
    """Return similarities of the stream, which changes little from block to block."""
    found = [(each.slot, each.cosine) for each in vectors.get("resid", ()) if each.cosine is not None]
    if len(found) < 2:
        return None
    slots, cosines = np.asarray([slot for slot, _ in found], float), np.asarray([value for _, value in found], float)
    words = f"lowest {cosines.min():.4g} (slot {int(slots[cosines.argmin()])})"
    svg = draw_lines([Line("cosine", slots, cosines)], "slot", "cosine", points=True, whole=True, linear=True)
    title = "Cosine of the token's stream with the next slot"
    return Figure(title, f"L{words[1:]}.", f"Line chart of the {title.lower()}: {words}.", svg)


def _expected(watched: WatchedCache, stored: StoredRows, at: int, row: Row, token: int) -> Iterator[str]:
    """Return the likeliest next tokens by recorded logits, with their probabilities."""
    for each in (each for each in stored.taps(at) if each.tap.name == TOPK_LOGITS):
        try:
            codes = each.read(stored.locate(at)[1])
        except (DamageError, StorageError) as error:
            yield note("Damaged data", [one_line(error)])
            return
        found: Any = each.codec.decode({part.part: codes[part.part][0] for part in each.tap.parts})  # a TopK
        values, ids = np.asarray(found.values)[token], np.asarray(found.ids)[token]
        probabilities = np.exp(values - float(np.asarray(found.logsumexp)[token]))
        following = int(row.tokens[token + 1]) if token + 1 < len(row.tokens) else None
        rows = [
            (
                number(int(vocabulary)),
                repr(watched.decode([int(vocabulary)])),
                number(float(value)),
                Numeric(f"{probability:.2%}"),
                "yes" if vocabulary == following else "",
            )
            for vocabulary, value, probability in zip(ids, values, probabilities, strict=True)
        ]
        yield table("The largest logits", ("id", "text", "logit", "probability", "is what follows"), rows)
        yield paragraph(f"Together {probabilities.sum():.1%} of the probability.")
        return
