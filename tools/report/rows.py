"""Figures of some rows of a cache: the norm of every token's vectors, and the similarity of slots of the stream.

Rows are read one at a time and slot by slot, so memory does not grow with the cache; of tokens' vectors only a sample
is kept, for the similarity of slots.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from distillcache.models.text.cache_tokenizer import cache_tokenizer
from distillcache.models.text.tokenizer import TextTokenizer
from distillcache.schemas.counted import counted
from distillcache.schemas.errors import DamageError
from distillcache.schemas.format.manifest import TOPK_LOGITS
from distillcache.schemas.format.rows import Row
from distillcache.tools.fidelity.rows import padding_ids
from distillcache.tools.look.row_facts import token_labels
from distillcache.tools.look.sample_checks import SampleChecks
from distillcache.tools.look.stored_rows import StoredRows, lengths

KEPT_BYTES = 128 * 2**20  # of one row's sampled vectors
KEPT_TOKENS = 64  # of a row, at most: hundreds over all rows, enough for two digits of a mean cosine
TEXT_TOKENS = 48
STREAM = "resid"


@dataclass(frozen=True)
class RowLook:
    """number: through all rows of the cache. real: which tokens are no padding. starts: of its documents but the first.

    slots, norms: of each tap that the row has by now; the Euclidean norm of every token's vector in every slot.
    labels: each token's number and text, for a figure of this row alone.
    """

    number: int
    held_out: bool
    real: Bool[np.ndarray, " T"]
    starts: tuple[int, ...]
    text: str
    slots: dict[str, tuple[int, ...]]
    norms: dict[str, Float[np.ndarray, "S T"]]
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Likeness:
    """cosine: the mean of a token's vectors in two slots, over `tokens` tokens."""

    slots: tuple[int, ...]
    cosine: Float[np.ndarray, "S S"]
    tokens: int


@dataclass(frozen=True)
class Sample:
    """likeness: of slots of the stream; None where it is not recorded. damaged: of rows that are not what was
    committed, what is wrong. odd: what cannot be right.
    """

    rows: tuple[RowLook, ...]
    likeness: Likeness | None
    damaged: tuple[str, ...]
    odd: tuple[str, ...] = ()


def sample_rows(stored: StoredRows, count: int, seed: int) -> Sample:
    """Look at `count` committed rows, drawn by `seed`; fewer where there are fewer."""
    numbers = stored.sample(count, seed) if count else []
    if not numbers:
        return Sample((), None, ())
    tokenizer, looks = cache_tokenizer(stored.store, stored.plan), []
    damaged: dict[str, list[int]] = {}
    likeness: Likeness | None = None
    checks = SampleChecks(sorted(padding_ids(tokenizer)))
    for number in numbers:
        try:
            look, alike = _look(stored, number, tokenizer, checks)
        except DamageError as error:
            damaged.setdefault(f"{error.what} ({error.facts.get('file', '')})", []).append(number)
            continue
        looks.append(look)
        likeness = likeness if alike is None else _joined(likeness, alike)
    told = [f"Row{'s' if len(rows) > 1 else ''} {_listed(rows)}: {what}." for what, rows in damaged.items()]
    return Sample(tuple(looks), likeness, tuple(told), tuple(checks.findings()))


def row_warnings(sample: Sample) -> list[str]:
    """Warnings: damaged rows, impossible values, and real tokens whose numbers are not finite or all zero in a slot."""
    told = [*sample.damaged, *(f"{each}." for each in sample.odd)]
    for name in sorted({name for row in sample.rows for name in row.norms}):
        odd: dict[int, int] = {}
        silent: dict[tuple[int, ...], list[int]] = {}
        for row in (row for row in sample.rows if name in row.norms):
            norms = row.norms[name][:, row.real]
            if not np.isfinite(norms).all():
                odd[row.number] = int((~np.isfinite(norms)).sum())
            slots = tuple(slot for slot, of in zip(row.slots[name], norms, strict=True) if of.size and not of.any())
            if slots:
                silent.setdefault(slots, []).append(row.number)
        if odd:
            told.append(f"{name}: {counted(sum(odd.values()), 'vector')} not finite, in rows {_listed(odd)}.")
        for slots, rows in silent.items():
            told.append(f"{name}: only zeros in slots {_listed(slots)} of rows {_listed(rows)}.")
    return told


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def _look(
    stored: StoredRows, number: int, tokenizer: TextTokenizer, checks: SampleChecks
) -> tuple[RowLook, Likeness | None]:
    """One row, and the likeness of the stream's slots in it."""
    row = stored.row(number)
    real = row.segment_ids > 0
    checks.row(number, stored.shard(number), row)
    slots, norms, alike = {}, {}, None
    for name in stored.tap_names(number):
        if name != TOPK_LOGITS:  # which belongs to no block
            slots[name], norms[name], found = _look_at_tap(stored, number, name, real, checks)
            alike = found or alike
    look = RowLook(
        number=number,
        held_out=row.split == "eval",
        real=real,
        starts=_starts(row),
        text=tokenizer.decode(row.tokens[real][:TEXT_TOKENS].tolist()),
        slots=slots,
        norms=norms,
        labels=tuple(token_labels([tokenizer.decode([token]) for token in row.tokens.tolist()], real)),
    )
    return look, alike


def _look_at_tap(
    stored: StoredRows, number: int, name: str, real: Bool[np.ndarray, " T"], checks: SampleChecks
) -> tuple[tuple[int, ...], Float[np.ndarray, "S T"], Likeness | None]:
    """Slots and norms of a tap; of the stream, which goes on from slot to slot, also how alike they are.

    What two blocks add to the stream has no reason to be alike.
    """
    count = len({slot for each in stored.taps(number) if each.tap.name == name for slot in each.tap.slots})
    most = KEPT_BYTES // (4 * stored.plan.teacher.hidden_size * max(count, 1))
    picked = _spread(np.flatnonzero(real), max(1, min(KEPT_TOKENS, most)))
    norms, kept = {}, {}
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is shown, and told
        for slot, values in stored.slots(number, name):
            norms[slot] = lengths(values)
            if name == STREAM:
                kept[slot] = _unit(values[picked])
            checks.slot(name, slot, values)
    slots = tuple(sorted(norms))
    stacked = np.stack([norms[slot] for slot in slots])
    if not kept:
        return slots, stacked, None
    stack = np.stack([kept[slot] for slot in slots])
    cosine = np.einsum("snd,tnd->st", stack, stack, optimize=True) / max(len(picked), 1)
    return slots, stacked, Likeness(slots, cosine, len(picked))


def _unit(values: Float[np.ndarray, "n D"]) -> Float[np.ndarray, "n D"]:
    """Scale to length 1; zeros if there is no direction."""
    length = lengths(values)[:, None]
    return np.divide(values, length, out=np.zeros_like(values), where=np.isfinite(length) & (length > 0))


def _joined(known: Likeness | None, found: Likeness) -> Likeness:
    """Join the slots of both rows; the first alone if they differ, as rows of another segment may."""
    if known is None or known.slots != found.slots or found.tokens == 0:
        return found if known is None else known
    tokens = known.tokens + found.tokens
    return Likeness(known.slots, (known.cosine * known.tokens + found.cosine * found.tokens) / tokens, tokens)


def _spread(places: np.ndarray, most: int) -> np.ndarray:
    """At most so many of these, evenly drawn."""
    return places[np.unique(np.linspace(0, max(len(places) - 1, 0), min(most, len(places))).round().astype(int))]


def _starts(row: Row) -> tuple[int, ...]:
    changes = np.flatnonzero(np.diff(row.segment_ids) != 0) + 1
    return tuple(int(place) for place in changes if row.segment_ids[place])  # padding is no document
