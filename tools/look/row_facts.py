"""Facts about every token of one row in all blocks: its text, masks, and figures by slot and token.

Slots are decoded one by one, so that memory is two slots of one tap, whatever the model is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float

from distillcache.models.text.cache_tokenizer import cache_tokenizer
from distillcache.schemas.cache.describe import numbers_in_runs
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import DamageError, InputError
from distillcache.schemas.format.manifest import TOPK_LOGITS
from distillcache.schemas.format.rows import Row
from distillcache.tools.look.stored_rows import StoredRows, finite, lengths

LARGEST = 3  # dimensions named of a slot
LABEL_LETTERS = 12  # of a token along an axis
TINY = 1e-30


@dataclass(frozen=True)
class TapFacts:
    """One tap of one row; `[S, T]` each.

    norm: of the token's vector. cosine: its similarity to the next stored slot's, one slot fewer. dimension, value: its
    largest number. largest: of every slot, (dimension, rms over real tokens) of the largest ones.
    """

    tap: str
    slots: tuple[int, ...]
    norm: Float[np.ndarray, "S T"]
    cosine: Float[np.ndarray, "S1 T"]
    dimension: np.ndarray
    value: Float[np.ndarray, "S T"]
    largest: tuple[tuple[tuple[int, float], ...], ...]
    nonfinite: np.ndarray


@dataclass(frozen=True)
class RowFacts:
    """token_texts: the text of every token. documents: (segment id, first token, token behind the last). damaged: why
    some of the row's taps are missing.
    """

    number: int
    shard: tuple[str, int]
    row: Row
    token_texts: tuple[str, ...]
    documents: tuple[tuple[int, int, int], ...]
    taps: tuple[TapFacts, ...]
    damaged: tuple[DamageError, ...] = ()

    @property
    def real(self) -> np.ndarray:
        return self.row.segment_ids > 0


def read_row(rows: StoredRows, number: int, block: int | None = None) -> RowFacts:
    """
    Args:
        block: read only what enters, happens in and leaves this block.

    Raises:
        InputError: there is no such row, or not yet, or the block is not recorded.
    """
    if not rows.committed(number):
        raise InputError(
            "this row is not committed yet", {"cache": rows.store.url, "row": number}, "choose another, or wait"
        )
    row = rows.row(number)
    tokenizer = cache_tokenizer(rows.store, rows.plan)
    token_texts = tuple(tokenizer.decode([int(token)]) for token in row.tokens)
    found, damaged = [], []
    for name in (name for name in rows.tap_names(number) if name != TOPK_LOGITS):
        try:
            tap = tap_facts(rows, number, name, row, block)
        except DamageError as error:
            damaged.append(error)
            continue
        found += [] if tap is None else [tap]
    if block is not None and not found and not damaged:
        recorded = sorted({slot for stored in rows.taps(number) for slot in stored.tap.slots})
        raise InputError(
            "the cache lacks this block",
            {"cache": rows.store.url, "block": block, "slots": numbers_in_runs(recorded)},
            "choose one of these",
        )
    return RowFacts(number, rows.shard(number), row, token_texts, documents_of(row), tuple(found), tuple(damaged))


def not_finite(taps: Sequence[TapFacts]) -> list[str]:
    """A sentence for each tap that has numbers which are NaN or infinite."""
    broken = [(tap, [tap.slots[at] for at in np.flatnonzero(tap.nonfinite)]) for tap in taps]
    return [
        f"{tap.tap}: {counted(int(tap.nonfinite.sum()), 'number')} not finite, in slots {numbers_in_runs(slots)}"
        for tap, slots in broken
        if slots
    ]


def documents_of(row: Row) -> tuple[tuple[int, int, int], ...]:
    """(segment id, first token, token behind the last) of each document."""
    edges = [0, *(np.flatnonzero(np.diff(row.segment_ids)) + 1).tolist(), len(row.segment_ids)]
    runs = pairwise(edges)
    return tuple((int(row.segment_ids[a]), a, b) for a, b in runs if row.segment_ids[a] > 0)


def tap_facts(rows: StoredRows, number: int, name: str, row: Row, block: int | None) -> TapFacts | None:
    """One tap of a committed row; None where it does not hold the block. See `read_row`."""
    stored = sorted({slot for each in rows.taps(number) if each.tap.name == name for slot in each.tap.slots})
    near = (block, block + 1) if block is not None and name == "resid" else (block,)
    wanted = [slot for slot in stored if block is None or slot in near]
    if not wanted:
        return None
    real, found, before = row.segment_ids > 0, [], None
    for slot, values in rows.slots(number, name, wanted):
        found.append(_slot_facts(slot, values, before, real))
        before = values
    norms, cosines, dimensions, values, largest, nonfinite = zip(*(each for _, *each in found), strict=True)
    return TapFacts(
        tap=name,
        slots=tuple(slot for slot, *_ in found),
        norm=np.stack(norms),
        cosine=np.stack(cosines[1:]) if len(found) > 1 else np.zeros((0, len(real)), np.float32),
        dimension=np.stack(dimensions),
        value=np.stack(values),
        largest=largest,
        nonfinite=np.asarray(nonfinite),
    )


def _slot_facts(slot: int, values: np.ndarray, before: np.ndarray | None, real: np.ndarray) -> tuple[Any, ...]:
    nonfinite = int(np.count_nonzero(~np.isfinite(values[real])))
    clean = finite(values.astype(np.float64))
    norm = lengths(clean)
    cosine = np.zeros_like(norm)
    if before is not None:
        earlier = finite(before)
        cosine = (clean * earlier).sum(-1) / np.maximum(norm * lengths(earlier), TINY)
    at = np.abs(clean).argmax(-1)
    rms = np.sqrt(np.square(clean[real]).mean(0)) if real.any() else np.zeros(values.shape[-1])
    largest = tuple((int(each), float(rms[each])) for each in np.argsort(-rms)[:LARGEST])
    return slot, norm, cosine, at, np.take_along_axis(clean, at[:, None], 1)[:, 0], largest, nonfinite


def shown(text: str) -> str:
    """A token's text on one line."""
    return "".join({"\n": "\\n", "\t": "\\t", "\r": "\\r"}.get(letter, letter) for letter in text)


def token_labels(texts: Sequence[str], real: Sequence[bool] | np.ndarray) -> list[str]:
    """The words of a picture's axis: a token's number and its text, `7 fox`; nothing for padding."""
    return [
        f"{at} {_label(text)}" if is_real else "" for at, (text, is_real) in enumerate(zip(texts, real, strict=True))
    ]


def _label(text: str) -> str:
    """Text of a few letters in which nothing is invisible: a picture's file may hold no control characters."""
    if not text.strip():
        return repr(text)[: LABEL_LETTERS + 2]
    line = shown(text).strip()
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)[:LABEL_LETTERS].rstrip()


def summary(tap: TapFacts, real: Sequence[bool] | np.ndarray) -> list[dict[str, Any]]:
    """Summarise every slot over the real tokens; None if there are none."""
    mask = np.asarray(real)
    some = bool(mask.any())
    entries = []
    for at, slot in enumerate(tap.slots):
        norm = tap.norm[at][mask]
        cosine = tap.cosine[at][mask] if at < len(tap.cosine) else None
        entries.append(
            {
                "tap": tap.tap,
                "slot": slot,
                "norm": {
                    name: float(figure(norm)) if some else None
                    for name, figure in (("median", np.median), ("largest", np.max), ("smallest", np.min))
                },
                "cosine_to_next": float(cosine.mean()) if cosine is not None and some else None,
                "largest_dimensions": [list(pair) for pair in tap.largest[at]],
                "nonfinite": int(tap.nonfinite[at]),
            }
        )
    return entries
