"""Comparison of recorded logits with the teacher's: the k largest values, their ids, and the logsumexp of all.

Ids that nearly tie change places from run to run, so an id counts as wrong only where the teacher's k-th logit is
clearly below the value that is stored for it, or where most ids are others. All sums are over real tokens, in float64.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool

from distillcache.schemas.codecs import TopK
from distillcache.schemas.counted import counted
from distillcache.schemas.format.manifest import TOPK_LOGITS
from distillcache.tools.fidelity.compare import CODEC_MARGIN, SHIFTS, SLOPE_MARGIN, TINY
from distillcache.tools.fidelity.verdict import Look
from distillcache.tools.look.stored_rows import StoredTap, finite

FEW_SHARED = 0.5  # of the ids: below this they are others, however near the logits are to each other
MANY_MISPLACED = 0.05
CLEARLY = 4.0  # times the allowed error, above the teacher's k-th


@dataclass(frozen=True)
class TopKMeasure:
    """One row's logits.

    first: the share of tokens whose likeliest id is the teacher's. shared: of the k ids, the share that the teacher's k
    have. misplaced: the share of ids that clearly do not belong there. error: relative, of the values of shared ids;
    expected: the codec's; limit: how large it may be. slope: what the teacher's values must be multiplied with. above:
    by how much logsumexp is too large, a mean in nats, and above_limit. impossible: tokens whose k probabilities add up
    to more than 1. shift: by how many tokens the ids stand later. worst: (token, the largest difference of a value).
    """

    row: int
    shard: tuple[str, int]
    first: float
    shared: float
    misplaced: float
    error: float
    expected: float
    limit: float
    slope: float
    above: float
    above_limit: float
    impossible: int
    nonfinite: int
    shift: int
    worst: tuple[int, float]

    @property
    def wrong(self) -> bool:
        return bool(self.reasons())

    def reasons(self) -> list[str]:
        """Return the faults in words."""
        if self.shift:
            where = "before" if self.shift > 0 else "behind"
            return [f"the ids at a token are those of {abs(self.shift)} {where} it"]
        found = []
        if self.shared < FEW_SHARED or self.misplaced > MANY_MISPLACED:
            found.append(f"{1 - self.shared:.0%} of the ids are others")
        if self.error > self.limit:
            scaled = abs(self.slope - 1) > SLOPE_MARGIN + self.limit
            found.append(f"values are {self.slope:.3g} times its own" if scaled else f"values err by {self.error:.2g}")
        if abs(self.above) > self.above_limit:
            found.append(f"logsumexp is off by {self.above:+.3g} nats")
        if self.impossible:
            found.append(f"probabilities that add up to more than 1, of {counted(self.impossible, 'token')}")
        return found


def stored_logits(stored: StoredTap, row: int) -> TopK:
    """The logits of a row of the segment, `[T, k]` each, logsumexp `[T]`."""
    codes = stored.read(row)
    found: Any = stored.codec.decode({name: values[0] for name, values in codes.items()})
    return TopK(*map(np.asarray, found))  # type: ignore[arg-type]


def rounding_of(stored: StoredTap) -> float:
    """By how much storing a value may have changed it, relative to it."""
    return 2.0**-8 if stored.tap.parts[0].bits_of == "bfloat16" else 2.0**-24


def kept_values(stored: StoredTap, logits: TopK) -> np.ndarray:
    """Return other values after a round trip through the tap's codec."""
    given: Any = logits
    found: Any = stored.codec.decode(stored.codec.encode(given))
    return np.asarray(found.values, np.float64)


def measure_topk(
    row: int,
    shard: tuple[str, int],
    given: TopK,
    own: TopK,
    kept: np.ndarray,
    real: Bool[np.ndarray, " T"],
    noise: float,
    rounding: float,
) -> TopKMeasure:
    """The figures of one row.

    Args:
        own: the teacher's. kept: what the codec of `given` keeps of its values.
        noise: a relative error that is no fault, beside the codec's.
        rounding: what storing did to `given`, relative; also where `own` was stored as well.
    """
    values, theirs = (np.asarray(each.values, np.float64)[real] for each in (given, own))
    ids, own_ids = (np.asarray(each.ids)[real] for each in (given, own))
    sums, own_sums = (np.asarray(each.logsumexp, np.float64)[real] for each in (given, own))
    nonfinite = int(np.count_nonzero(~np.isfinite(values)) + np.count_nonzero(~np.isfinite(sums)))
    values, sums = finite(values), finite(sums)
    shared, matched = _matched(ids, own_ids, theirs)
    scale = float(np.sqrt(np.mean(np.square(theirs)))) + TINY
    expected = float(np.sqrt(np.mean(np.square(kept[real] - theirs)))) / scale
    limit = CODEC_MARGIN * expected + noise
    clearly = CLEARLY * limit * scale
    apart = np.where(shared, values - matched, 0.0)
    worst = int(np.abs(apart).max(-1).argmax())
    # A value's own rounding moves the logarithm of its probability by as much.
    rounded = rounding * np.abs(values).max(-1, initial=0.0)
    too_much = np.exp(values - sums[:, None]).sum(-1) > np.exp(np.maximum(clearly, rounded)) + 1e-3
    return TopKMeasure(
        row=row,
        shard=shard,
        first=float(np.mean(ids[:, 0] == own_ids[:, 0])),
        shared=float(shared.mean()),
        misplaced=float((~shared & (values > theirs[:, -1:] + clearly)).mean()),
        error=float(np.sqrt(np.square(apart).sum() / max(shared.sum(), 1))) / scale,
        expected=expected,
        limit=limit,
        slope=float((values * matched).sum() / (np.square(matched).sum() + TINY)),
        above=float(np.mean(sums - own_sums)),
        above_limit=max(limit * scale, 0.01),
        impossible=int(np.count_nonzero(too_much)),
        nonfinite=nonfinite,
        shift=_shift(ids, own_ids, float(shared.mean())),
        worst=(int(np.flatnonzero(real)[worst]), float(np.abs(apart[worst]).max())),
    )


def _matched(ids: np.ndarray, own: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which ids `[t, k]` the teacher has too, and its values of them (0 of the others)."""
    same = ids[:, :, None] == own[:, None, :]
    shared = same.any(-1)
    return shared, np.take_along_axis(theirs, same.argmax(-1), 1) * shared


def _shift(ids: np.ndarray, own: np.ndarray, shared: float) -> int:
    """By how many tokens the ids stand later than the teacher's; 0: by none."""
    for shift in SHIFTS if shared < FEW_SHARED else ():
        rolled, inside = np.roll(own, shift, axis=0), slice(max(shift, 0), len(own) + min(shift, 0))
        same = (ids[:, :, None] == rolled[:, None, :]).any(-1)[inside]
        if same.size and same.mean() > max(0.9, 2 * shared):
            return shift
    return 0


def judge_topk(rows: Sequence[TopKMeasure], name: str, known: Sequence[int]) -> list[Look]:
    """Judge the recorded logits of rows whose other numbers are right.

    Args:
        name: of what they were compared with.
        known: rows whose other numbers are wrong, so that these must be.
    """
    looks = []
    broken = [row for row in rows if row.nonfinite]
    if broken:
        count = sum(row.nonfinite for row in broken)
        evidence = f"{count:,} in {TOPK_LOGITS}; in {len(broken)} of {counted(len(rows), 'row')}"
        looks.append(Look("non-finite", evidence, _where(broken)))
    wrong = [row for row in rows if row.wrong and not row.nonfinite and row.row not in known]
    if not wrong:
        return looks
    shifted = [row for row in wrong if row.shift]
    kind, hit = ("shifted-tokens", shifted) if shifted else ("other-logits", wrong)
    words = ", ".join(hit[0].reasons())
    evidence = (
        f"{TOPK_LOGITS} against {name}: {words}; in {len(hit)} of {counted(len(rows), 'row')}, such as row {hit[0].row}"
    )
    return [*looks, Look(kind, evidence, _where(hit))]


def figures(rows: Sequence[TopKMeasure]) -> dict[str, Any] | None:
    """Means over all rows as plain values, and the worst token; None where there is nothing."""
    if not rows:
        return None
    names = ("first", "shared", "misplaced", "error", "expected", "above")
    entries = [asdict(row) for row in rows]
    worst = max(rows, key=lambda row: row.worst[1])
    return {
        **{name: float(np.mean([entry[name] for entry in entries])) for name in names},
        "impossible": sum(row.impossible for row in rows),
        "wrong_rows": sum(row.wrong for row in rows),
        "worst": {"row": worst.row, "token": worst.worst[0], "difference": worst.worst[1]},
    }


def words(found: dict[str, Any]) -> str:
    """The figures in a line."""
    return (
        f"{TOPK_LOGITS}: the same most likely id in {found['first']:.1%} of tokens; {found['shared']:.1%} of all ids "
        f"are the teacher's; error of their logits {found['error']:.2g} (codec's own {found['expected']:.2g}), of "
        f"logsumexp {found['above']:+.2g} nats; largest difference {found['worst']['difference']:.2g} in row "
        f"{found['worst']['row']} at token {found['worst']['token']}; wrong rows {found['wrong_rows']}"
    )


def _where(rows: Sequence[TopKMeasure]) -> dict[str, Any]:
    return {"rows": [row.row for row in rows], "shards": [list(shard) for shard in sorted({row.shard for row in rows})]}
