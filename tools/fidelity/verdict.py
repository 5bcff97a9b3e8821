"""Verdict of a fidelity check: every finding with its evidence, the gravest first.

A wrong row is explained once: by numbers that are another block's, another token's or scaled, by another input of the
teacher, or else by another teacher (all shards) or a stale shard (some).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from distillcache.schemas.cache.segment import Segment
from distillcache.schemas.counted import counted
from distillcache.tools.fidelity.compare import RowMeasure, TapMeasure
from distillcache.tools.fidelity.live_teacher import VARIANTS
from distillcache.tools.look.segment_facts import damaged_files

# In order of gravity: what spoils every number first.
KINDS = {
    "truncated-object": "a stored object is shorter than it was when it was committed",
    "damaged-object": "a stored object is not what was committed",
    "non-finite": "stored numbers are NaN or infinite",
    "wrong-tokenizer": "the tokens were made with another tokenizer than the teacher's",
    "shifted-tokens": "the numbers belong to other tokens",
    "wrong-masks": "the teacher saw other document boundaries than the rows have",
    "swapped-blocks": "blocks are stored in each other's slots",
    "repeated-block": "a block's numbers are stored in another block's slot too",
    "scaled-block": "a block is multiplied by a factor",
    "stale-shard": "some shards hold wrong numbers for their rows, while others are right",
    "other-rows": "the teacher saw other tokens than the rows hold",
    "other-teacher": "the numbers are another teacher's",
    "other-numbers": "some blocks hold wrong numbers",
    "other-logits": "the recorded logits are wrong",
    "padding-as-text": "padding is marked as text",
    "damaged-file": "a small file of the cache is missing, or is not what was committed",
    "lossy-codec": "the codec loses much of this tap",
    "faithful": "the decoded cache matches the teacher within the error of its codecs",
}
REPAIR = "distillcache build --repair recomputes what is damaged (a copy: distillcache copy SRC DST --repair)"
REBUILD = "build the cache again at another path, and delete this one"
# What to do about it.
NEXT = {
    "truncated-object": REPAIR,
    "damaged-object": REPAIR,
    "non-finite": f"check the teacher's weights, and compute in another dtype: --dtype float32; then {REBUILD}",
    "wrong-tokenizer": "prepare the text with the teacher's own tokenizer (leave out data.tokenizer); then " + REBUILD,
    "shifted-tokens": "do not train on it; find what shifts tokens between the rows and the teacher, then " + REBUILD,
    "wrong-masks": "do not train on it; check that the teacher gets the rows' segment_ids and positions, then "
    + REBUILD,
    "swapped-blocks": "do not train on it; find what sorts layers by name (10 before 2), then " + REBUILD,
    "repeated-block": "do not train on it; find a recorder that is off by one, or writes a block's input in place of "
    f"its output; then {REBUILD}",
    "scaled-block": f"find what scales this block (a norm's weight, a multiplier, a codec's scale); then {REBUILD}",
    "stale-shard": f"{REBUILD}; the shards named here were left by another build, or written by another machine's",
    "other-rows": "check which rows the teacher was given; then " + REBUILD,
    "other-teacher": "name the teacher that made it with --teacher, or " + REBUILD,
    "other-numbers": "compare these blocks with another implementation of the teacher; then " + REBUILD,
    "other-logits": "check with which head, vocabulary and scale the logits were computed; then " + REBUILD,
    "padding-as-text": "check that segment_ids are 0 at padding; prepare the rows again, then " + REBUILD,
    "damaged-file": REPAIR,
    "lossy-codec": "build with taps.<tap>.rotate: true, with groups, or in int8; distillcache plan shows the sizes",
    "faithful": "nothing to do",
}
LOSSY = 0.25  # an error of the codec alone that no training should be given without knowing
EXPLAINED = 0.1  # of a difference: what a factor may leave over and still be called the reason
GAIN = 2.0  # a rotation that makes the error so much smaller was left out wrongly


@dataclass(frozen=True)
class Look:
    """One finding. where: the rows, shards, taps and slots that it was seen in."""

    kind: str
    evidence: str
    where: dict[str, Any] = field(default_factory=dict)

    @property
    def next(self) -> str:
        """Return advice about the finding."""
        return NEXT[self.kind]

    @property
    def line(self) -> str:
        return ": ".join(filter(None, (self.kind, KINDS[self.kind], self.evidence)))


@dataclass(frozen=True)
class Reference:
    """The reference that rows were compared with: a teacher (found, recorded: the digests of its weights and of
    those that the plan names), or another cache.
    """

    name: str
    path: str = ""
    found: str = ""
    recorded: str = ""

    def words(self) -> str:
        if not self.path:
            return "in every sampled shard"
        if self.found == self.recorded:
            return f"although the weights at {self.path} have the digest in the plan"
        return f"and the weights at {self.path} have another digest than the plan names"


def judge(rows: Sequence[RowMeasure], reference: Reference) -> list[Look]:
    """Judge the measured numbers; empty if they are as they should be."""
    found = [*_nonfinite(rows)]
    wrong = [row for row in rows if row.wrong]
    for explain in (_shifted, _variants, _swapped, _scaled):
        looks, wrong = explain(wrong, reference.name)
        found += looks
    return [*found, *_unexplained(rows, wrong, reference)]


def file_looks(segments: Sequence[Segment]) -> list[Look]:
    """Report faults of a cache's small files, whether or not a number depends on them."""
    return [
        Look("damaged-file", f"{error.facts['file']}: {error.what}", {"file": str(error.facts["file"])})
        for error in damaged_files(segments)
    ]


def gravest(looks: Sequence[Look]) -> list[Look]:
    """In order of gravity; a cache without findings is faithful."""
    order = list(KINDS)
    return sorted(looks, key=lambda look: order.index(look.kind)) or [Look("faithful", "")]


def _nonfinite(rows: Sequence[RowMeasure]) -> list[Look]:
    counts: Counter[tuple[str, int]] = Counter()
    for row in rows:
        for tap in row.taps:
            counts.update({(tap.tap, slot): int(n) for slot, n in zip(tap.slots, tap.nonfinite, strict=True) if n})
    if not counts:
        return []
    rows_hit = [row.row for row in rows if any(tap.nonfinite.any() for tap in row.taps)]
    words = ", ".join(f"{count:,} in {tap} {slot}" for (tap, slot), count in counts.most_common(4))
    evidence = f"{words}; in {len(rows_hit)} of {counted(len(rows), 'row')}, such as row {rows_hit[0]}"
    return [Look("non-finite", evidence, {"rows": rows_hit, "slots": [[tap, slot] for tap, slot in sorted(counts)]})]


def _shifted(wrong: list[RowMeasure], name: str) -> tuple[list[Look], list[RowMeasure]]:
    hit = [row for row in wrong if row.shift]
    if not hit:
        return [], wrong
    shift, _ = Counter(row.shift for row in hit).most_common(1)[0]
    evidence = f"what is stored at a token is {name}'s of {abs(shift)} {'before' if shift > 0 else 'behind'} it"
    look = Look("shifted-tokens", f"{evidence}, in {_share(hit, wrong)}", {"shift": shift, **_where(hit)})
    return [look], [row for row in wrong if not row.shift]


def _variants(wrong: list[RowMeasure], _: str) -> tuple[list[Look], list[RowMeasure]]:
    looks = []
    for name, what in VARIANTS.items():
        hit = [row for row in wrong if row.variant == name]
        if hit:
            kind = "shifted-tokens" if name.startswith("shifted") else "wrong-masks"
            looks.append(Look(kind, f"{what}, in {_share(hit, wrong)}", _where(hit)))
    return looks, [row for row in wrong if not row.variant]


def _swapped(wrong: list[RowMeasure], name: str) -> tuple[list[Look], list[RowMeasure]]:
    hit = [row for row in wrong if row.swapped]
    if not hit:
        return [], wrong
    pairs = sorted({swap for row in hit for swap in row.swapped})
    words = ", ".join(f"{tap} {slot} holds {name}'s {own}" for tap, slot, own in pairs[:4])
    kind, twice = "swapped-blocks", sorted({pair for row in hit for pair in _repeated(row)})
    if twice:
        kind = "repeated-block"
        owners = sorted({(tap, own) for tap, _, own in twice})
        words += f"; so do {', '.join(f'{tap} {own}' for tap, own in owners[:4])}"
    look = Look(kind, f"{words}; in {_share(hit, wrong)}", {"slots": [*map(list, pairs)], **_where(hit)})
    return [look], [row for row in wrong if not _explained_by_swaps(row)]


def _repeated(row: RowMeasure) -> list[tuple[str, int, int]]:
    """Select those of a row's swaps whose numbers are in their own place as well: (tap, slot, the slot that it
    repeats).
    """
    right = {(tap.tap, slot) for tap in row.taps for slot in np.asarray(tap.slots)[~tap.wrong].tolist()}
    return [(tap, slot, own) for tap, slot, own in row.swapped if (tap, own) in right]


def _explained_by_swaps(row: RowMeasure) -> bool:
    known = {(tap, slot) for tap, slot, _ in row.swapped}
    return bool(known) and all(
        (tap.tap, slot) in known for tap in row.taps for slot in np.asarray(tap.slots)[tap.wrong].tolist()
    )


def _scaled(wrong: list[RowMeasure], name: str) -> tuple[list[Look], list[RowMeasure]]:
    found: dict[tuple[str, int], list[float]] = {}
    left, hit = [], []
    for row in wrong:
        scaled = {
            (tap.tap, tap.slots[at]): float(tap.slope[at])
            for tap in row.taps
            for at in np.flatnonzero(tap.wrong & _is_scaled(tap))
        }
        for place, factor in scaled.items():
            found.setdefault(place, []).append(factor)
        (hit if scaled else left).append(row)
        if scaled and sum(int(tap.wrong.sum()) for tap in row.taps) > len(scaled):
            left.append(row)
    if not found:
        return [], wrong
    factors = {place: float(np.median(values)) for place, values in found.items()}
    words = ", ".join(f"{tap} {slot} is {factor:.3g} times {name}'s" for (tap, slot), factor in factors.items())
    where = {"factors": [[tap, slot, factor] for (tap, slot), factor in factors.items()], **_where(hit)}
    return [Look("scaled-block", f"{words}; in {_share(hit, wrong)}", where)], left


def _is_scaled(tap: TapMeasure) -> np.ndarray:
    """Return whether the error that remains after scaling is the codec's; tokens of zeros alone are not scaled."""
    off, factor = np.abs(tap.slope - 1), np.maximum(np.abs(tap.slope), 1)
    left = np.maximum(tap.limit, EXPLAINED * off) * factor
    return (tap.rest <= left) & (off > tap.limit) & (np.abs(tap.slope) > 1e-3)


def _unexplained(rows: Sequence[RowMeasure], wrong: list[RowMeasure], reference: Reference) -> list[Look]:
    if not wrong:
        return []
    bad, good = {row.shard for row in wrong}, {row.shard for row in rows if not row.wrong}
    slots = [tap.wrong for row in wrong for tap in row.taps]
    share = float(np.mean(np.concatenate(slots)))
    seen = _seen(wrong)
    where = _where(wrong)
    if good - bad and share > 0.5:
        others = f"{len(good)} other sampled shards are correct"
        shards = ", ".join(f"{segment}/{shard}" for segment, shard in sorted(bad)[:6])
        return [Look("stale-shard", f"shards {shards}: {_far(wrong, reference.name)}; {others}{seen}", where)]
    if seen and share > 0.5:
        return [Look("other-rows", f"{_far(wrong, reference.name)}{seen}", where)]
    if share > 0.5:
        return [Look("other-teacher", f"{_far(wrong, reference.name)}, {reference.words()}", where)]
    named = Counter(
        (tap.tap, int(slot)) for row in wrong for tap in row.taps for slot in np.asarray(tap.slots)[tap.wrong]
    )
    words = ", ".join(f"{tap} {slot}" for (tap, slot), _ in named.most_common(6))
    return [
        Look(
            "other-numbers", f"{words}: {_far(wrong, reference.name)}", {**where, "slots": [*map(list, sorted(named))]}
        )
    ]


def _seen(wrong: list[RowMeasure]) -> str:
    """Find rows whose stored stream embeds other tokens than the row's, all of them known well to this teacher."""
    for row in wrong:
        if row.seen is None:
            continue
        own, found, distance = row.seen
        if own != found and float(np.median(distance)) < 0.2:
            return f"; in row {row.row} the stored stream embeds tokens {found[:6]}, the row has {own[:6]}"
    return ""


def _far(wrong: list[RowMeasure], name: str) -> str:
    cosine = np.concatenate([tap.cosine[tap.wrong] for row in wrong for tap in row.taps if tap.wrong.any()])
    return f"a median cosine distance of {np.median(cosine):.2g} from {name} in {counted(len(wrong), 'row')}"


def _share(hit: Sequence[RowMeasure], wrong: Sequence[RowMeasure]) -> str:
    of = f" ({counted(len(wrong), 'row')} wrong)" if len(wrong) > len(hit) else ""
    return f"{counted(len(hit), 'row')} of {counted(len({row.shard for row in hit}), 'shard')}{of}"


def _where(hit: Sequence[RowMeasure]) -> dict[str, Any]:
    return {"rows": [row.row for row in hit], "shards": [list(shard) for shard in sorted({row.shard for row in hit})]}
