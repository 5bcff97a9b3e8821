"""Checks of rows without a teacher: masks, and impossible numbers.

- Block 0 is entered by an embedding, which is the same for the same token. Where one token has many vectors there,
  numbers and tokens do not belong together; where it has others in some rows alone, those rows are from elsewhere.
- A block adds to the stream, so a slot is more like its neighbours than like those behind them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from distillcache.models.text.cache_tokenizer import cache_tokenizer
from distillcache.schemas.counted import counted
from distillcache.schemas.format.manifest import Plan
from distillcache.schemas.format.rows import Row
from distillcache.schemas.store.store import Store
from distillcache.tools.fidelity.rows import padding_ids, row_faults
from distillcache.tools.look.stored_rows import lengths

NEAR = 0.05  # relative distance of two vectors that are one embedding, after any codec but the coarsest
OCCURRENCES, OF_ROW = 96, 3  # of one token that are kept, and of each row
ROW_BYTES = 2 << 20  # of a row's vectors that are kept
ENOUGH = 4  # tokens of a row that occur elsewhere
ORDER_MARGIN = 0.01  # of mean cosines
ORDER_TOKENS = 32  # of a row


@dataclass
class SampleChecks:
    """Checks of rows in sequence: call `row`, then `slot` for each slot of each tap, and finally `findings`."""

    padding: Sequence[int]
    _rows: dict[int, tuple[str, int]] = field(default_factory=dict)  # row -> (segment, shard)
    _masks: dict[str, list[int]] = field(default_factory=dict)  # what is wrong -> rows
    _embedded: dict[int, list[tuple[int, np.ndarray]]] = field(default_factory=dict)  # id -> (row, vector)
    _now: tuple[int, Row] | None = None
    _units: dict[int, np.ndarray] = field(default_factory=dict)  # slot -> [t, D], of the row that is being read
    _cosines: list[np.ndarray] = field(default_factory=list)
    _slots: tuple[int, ...] = ()

    @classmethod
    def of(cls, store: Store, plan: Plan) -> "SampleChecks":
        """Make the checks for the rows of a cache, whose tokenizer defines the padding.

        Raises:
            DamageError: it is missing, or is not what was committed.
        """
        return cls(sorted(padding_ids(cache_tokenizer(store, plan))))

    def row(self, number: int, shard: tuple[str, int], row: Row) -> None:
        """The next row."""
        self._finish_row()
        self._now, self._rows[number] = (number, row), shard
        for _, evidence in row_faults(row, self.padding):
            self._masks.setdefault(evidence, []).append(number)

    def slot(self, tap: str, slot: int, values: Float[np.ndarray, "T D"]) -> None:
        """A slot of that row."""
        if tap != "resid" or self._now is None:
            return
        number, row = self._now
        places = np.flatnonzero(row.segment_ids > 0)
        if slot == 0:
            self._keep(number, row, places, values)
        some = values[places[:ORDER_TOKENS]]
        if np.isfinite(some).all():
            self._units[slot] = some / np.maximum(lengths(some)[:, None], 1e-30)

    def _keep(self, number: int, row: Row, places: np.ndarray, values: np.ndarray) -> None:
        """Some of the vectors of slot 0, by token."""
        left = max(ROW_BYTES // max(values[0].nbytes, 1), 2 * ENOUGH)
        for place in places[np.isfinite(values[places]).all(-1)]:
            kept = self._embedded.setdefault(int(row.tokens[place]), [])
            if left and len(kept) < OCCURRENCES and sum(at == number for at, _ in kept[-OF_ROW:]) < OF_ROW:
                kept.append((number, values[place].copy()))
                left -= 1

    def findings(self) -> list[str]:
        """A sentence each; empty where nothing is odd."""
        self._finish_row()
        masks = [f"{what}, in {_rows(rows)}" for what, rows in self._masks.items()]
        return [*masks, *self._foreign_rows(), *self._out_of_order()]

    def _finish_row(self) -> None:
        slots = tuple(sorted(self._units))
        if len(slots) > 3 and self._slots in ((), slots):
            self._slots, stack = slots, np.stack([self._units[slot] for slot in slots])
            self._cosines.append(np.einsum("snd,tnd->st", stack, stack) / max(stack.shape[1], 1))
        self._units, self._now = {}, None

    def _foreign_rows(self) -> list[str]:
        right, seen = _agreement(self._embedded)
        tested = {row: right.get(row, 0) / count for row, count in seen.items() if count >= ENOUGH}
        bad = sorted(row for row, share in tested.items() if share < 0.5)
        if not bad:
            return []
        if 2 * len(bad) > len(tested):
            return [
                f"the same token enters block 0 as different vectors, in {len(bad)} of "
                f"{counted(len(tested), 'row')}: the numbers belong to other tokens (shifted, or of other rows); "
                "`distillcache fidelity CACHE` finds out"
            ]
        shards = sorted({self._rows[row] for row in bad})
        named = ", ".join(f"{segment}/{shard}" for segment, shard in shards[:6])
        return [
            f"{_rows(bad)} (shards {named}): their tokens enter block 0 as other vectors than in the other rows: "
            "stale, or from another teacher; `distillcache fidelity CACHE` finds out"
        ]

    def _out_of_order(self) -> list[str]:
        if not self._cosines:
            return []
        pairs = exchanged(np.mean(self._cosines, 0))
        return [
            f"resid {self._slots[at]} and {self._slots[other]} look exchanged: each resembles the other's neighbours "
            "more than its own"
            for at, other in pairs
        ]


def exchanged(cosine: Float[np.ndarray, "S S"]) -> list[tuple[int, int]]:
    """Neighbouring places of a stream that would be more in order the other way round."""
    found = []
    for at in range(1, len(cosine) - 2):
        before = cosine[at - 1, at + 1] - cosine[at - 1, at]
        behind = cosine[at + 2, at] - cosine[at + 2, at + 1]
        if min(before, behind) > ORDER_MARGIN:
            found.append((at, at + 1))
    return found


def _agreement(embedded: Mapping[int, list[tuple[int, np.ndarray]]]) -> tuple[dict[int, int], dict[int, int]]:
    """By row: how many of its tokens are as most others of their id are, and how many have others."""
    right: dict[int, int] = {}
    seen: dict[int, int] = {}
    for kept in embedded.values():
        if len(kept) < 2:
            continue
        vectors = np.stack([vector for _, vector in kept]).astype(np.float64)
        squares = np.square(vectors).sum(-1)
        apart = squares[:, None] + squares[None] - 2 * vectors @ vectors.T
        near = apart <= NEAR**2 * np.maximum(squares, 1e-30)
        usual = near[int(near.sum(1).argmax())]
        for (row, _), same in zip(kept, usual & (usual.sum() > 1), strict=True):
            seen[row] = seen.get(row, 0) + 1
            right[row] = right.get(row, 0) + int(same)
    return right, seen


def _rows(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:6]))
    more = f" and {len(numbers) - 6} more" if len(numbers) > 6 else ""
    return f"row{'s' if len(numbers) > 1 else ''} {shown}{more}"
