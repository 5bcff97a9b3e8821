"""Comparison of a row's stored taps with the teacher's, and with the best that their codec can represent.

All sums are over real tokens, in float64. An *error* is relative: the norm of a difference over the norm of the
teacher's own numbers. What is wrong is decided by the *weighted* error, which divides every dimension by its own rms:
a few outlier dimensions carry the norm of a residual stream, and neighbouring blocks would look alike by it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import jax
import numpy as np
from jaxtyping import Bool, Float

from distillcache.schemas.codecs import get_codec, make_signs
from distillcache.schemas.format.manifest import TapPlan
from distillcache.tools.look.stored_rows import finite

# By how much a teacher's own numbers may differ from run to run: other batches and machines round otherwise. Measured
# on a CPU, weighted, between one row a call and four: 0.028 in bfloat16 after 30 blocks. Accelerators multiply float32
# in shorter formats too.
EXACT_NOISE, ROUNDED_NOISE = 1e-3, 6e-2
CODEC_MARGIN = 1.5  # the codec's error is computed on nearly the same numbers: more than this is not the codec's
SLOPE_MARGIN = 0.02  # 1 + this is called scaled
TINY = 1e-30
SWAP_TOKENS = 64  # of a row, compared with every block
SHIFTS = (-2, -1, 1, 2)


@dataclass(frozen=True)
class TapMeasure:
    """One tap of one row; arrays have one entry a stored slot.

    slots: as the plan numbers them. error, cosine: of stored against teacher, the cosine distance a mean over tokens.
    expected: the error of the plan's codec on the teacher's numbers. worst: (token, its error). nonfinite: numbers.
    weighted: the weighted error, and limit: how large it may be. slope: what the teacher's numbers must be multiplied
    with to be nearest to the stored ones. rest: the weighted error that is left then.
    """

    tap: str
    slots: tuple[int, ...]
    error: Float[np.ndarray, " S"]
    cosine: Float[np.ndarray, " S"]
    expected: Float[np.ndarray, " S"]
    weighted: Float[np.ndarray, " S"]
    limit: Float[np.ndarray, " S"]
    slope: Float[np.ndarray, " S"]
    rest: Float[np.ndarray, " S"]
    worst: tuple[tuple[int, float], ...]
    nonfinite: np.ndarray

    @property
    def wrong(self) -> Bool[np.ndarray, " S"]:
        """The slots that differ from the encoded numbers of the teacher, as far as these are finite."""
        scaled = np.abs(self.slope - 1) > SLOPE_MARGIN + self.limit / CODEC_MARGIN
        return ((self.weighted > self.limit) | scaled) & (self.nonfinite == 0)


@dataclass
class RowMeasure:
    """One row: its taps and, if slots are wrong, what its numbers resemble instead.

    shard: (segment, shard). swapped: (tap, slot, the teacher's slot that it is). shift: by how many tokens the stored
    numbers stand later. variant: of `live_teacher.VARIANTS`. seen: (the row's tokens, those that the stored stream
    embeds, the relative distances of the embeddings), some places.
    """

    row: int
    shard: tuple[str, int]
    taps: list[TapMeasure]
    swapped: list[tuple[str, int, int]] = field(default_factory=list)
    shift: int = 0
    variant: str = ""
    seen: tuple[list[int], list[int], list[float]] | None = None

    @property
    def wrong(self) -> bool:
        return any(tap.wrong.any() for tap in self.taps)


def teacher_noise(dtype: str, *platforms: str) -> float:
    """The weighted error that is no fault of a teacher in this dtype, computed on these platforms."""
    return EXACT_NOISE if dtype == "float32" and all(each.startswith("cpu") for each in platforms) else ROUNDED_NOISE


def measure_tap(
    name: str,
    slots: Sequence[int],
    values: Float[np.ndarray, "S T D"],
    reference: Float[np.ndarray, "S T D"],
    coded: Float[np.ndarray, "S T D"],
    real: Bool[np.ndarray, " T"],
    noise: float | Float[np.ndarray, " S"],
) -> TapMeasure:
    """The figures of one tap of one row.

    Args:
        slots: of all three arrays.
        coded: what the codec of `values` keeps of `reference`.
        noise: an error that is no fault, beside the codec's.
    """
    given, own, kept = (each[:, real].astype(np.float64) for each in (values, reference, coded))
    nonfinite = np.count_nonzero(~np.isfinite(given), axis=(1, 2))
    given, own, kept = map(finite, (given, own, kept))
    norms = np.linalg.norm(own, axis=-1)
    tokens = np.linalg.norm(given - own, axis=-1) / np.maximum(norms, TINY)
    places = np.flatnonzero(real)
    weights = dimension_weights(own)
    flat, flat_own, flat_kept = given * weights, own * weights, kept * weights
    norm = np.maximum(_norm(flat_own), TINY)
    slope, kept_slope = ((each * flat_own).sum((1, 2)) / norm**2 for each in (flat, flat_kept))
    return TapMeasure(
        tap=name,
        slots=tuple(slots),
        error=error(given, own),
        cosine=_cosine_distance(given, own),
        expected=error(kept, own),
        weighted=error(flat, flat_own),
        limit=CODEC_MARGIN * error(flat_kept, flat_own) + noise,
        slope=np.where(kept_slope > TINY, slope / np.maximum(kept_slope, TINY), 1.0),
        rest=_norm(flat - slope[:, None, None] * flat_own) / norm,
        worst=tuple((int(places[at]), float(each[at])) for each in tokens for at in [int(each.argmax())]),
        nonfinite=nonfinite,
    )


def dimension_weights(own: Float[np.ndarray, "S T D"]) -> Float[np.ndarray, "S 1 D"]:
    """One over the rms of every dimension of every slot; of dimensions that are hardly used, not much more."""
    rms = np.sqrt(np.square(own.astype(np.float64)).mean(1, keepdims=True))
    return 1 / np.maximum(rms, np.maximum(0.01 * np.median(rms, -1, keepdims=True), TINY))


def weighted_error(
    values: Float[np.ndarray, "S T D"], reference: Float[np.ndarray, "S T D"]
) -> Float[np.ndarray, " S"]:
    """Error over all tokens, weighted by the reference's dimensions."""
    weights = dimension_weights(reference)
    return error(finite(values) * weights, reference * weights)


def error(values: Float[np.ndarray, "S T D"], reference: Float[np.ndarray, "S T D"]) -> Float[np.ndarray, " S"]:
    """Error over all tokens."""
    return _norm(values - reference) / np.maximum(_norm(reference), TINY)


def rotated_error(
    tap: TapPlan, teacher: Float[np.ndarray, "S T D"], real: Bool[np.ndarray, " T"]
) -> Float[np.ndarray, " S"] | None:
    """The error that the tap's codec would have with rotation; None if it has rotation or cannot."""
    if tap.rotate or not tap.codec.startswith("int"):
        return None
    signs = make_signs(tap.name, teacher.shape[-1])
    codec = get_codec(tap.codec, group=tap.group, signs=signs, delta=tap.delta, keyframe_every=tap.keyframe_every)
    coded = np.asarray(jax.jit(lambda values: codec.decode(codec.encode(values)))(teacher), np.float32)
    return _norm((coded - teacher)[:, real]) / np.maximum(_norm(teacher[:, real]), TINY)


def outlier_dimensions(values: Float[np.ndarray, "T D"], times: float = 6.0) -> dict[int, float]:
    """The dimensions whose rms is that many times the median dimension's: their rms over it."""
    rms = np.sqrt(np.square(values.astype(np.float64)).mean(0))
    ratio = rms / max(float(np.median(rms)), TINY)
    return {int(at): round(float(ratio[at]), 1) for at in np.argsort(-ratio) if ratio[at] > times}


def find_swaps(
    measure: TapMeasure,
    values: Float[np.ndarray, "S T D"],
    teacher: Float[np.ndarray, "L T D"],
    real: Bool[np.ndarray, " T"],
) -> list[tuple[str, int, int]]:
    """The wrong slots that are another block's numbers: (tap, slot, the teacher's slot that they are).

    `teacher`: all slots of all blocks.
    """
    wrong = np.flatnonzero(measure.wrong)
    if not len(wrong):
        return []
    tokens = np.flatnonzero(real)[:SWAP_TOKENS]
    own = teacher[:, tokens]
    found = []
    for at in wrong:
        errors = weighted_error(np.broadcast_to(values[at, tokens], own.shape), own)
        best = int(errors.argmin())
        # Codec errors differ from slot to slot (keyframes) and on fewer tokens; what is swapped is far nearer.
        near = errors[best] <= 2 * measure.limit.max() and errors[best] < measure.weighted[at] / 2
        if best != measure.slots[at] and near:
            found.append((measure.tap, measure.slots[at], best))
    return found


def find_shift(
    measures: Sequence[TapMeasure],
    values: Sequence[Float[np.ndarray, "S T D"]],
    teacher: Sequence[Float[np.ndarray, "S T D"]],
    real: Bool[np.ndarray, " T"],
) -> int:
    """By how many tokens the stored numbers stand later than the teacher's, in every tap; 0: by none."""
    for shift in SHIFTS:
        both = real & np.roll(real, shift)
        both[: max(shift, 0)], both[len(both) + min(shift, 0) :] = False, False
        errors = [
            weighted_error(given[:, both], np.roll(own, shift, axis=1)[:, both])
            for given, own in zip(values, teacher, strict=True)
        ]
        fits = [float(np.mean(e <= m.limit)) for e, m in zip(errors, measures, strict=True)]
        if both.any() and min(fits) > 0.5:  # block 0's stream alone would follow single repeated tokens
            return shift
    return 0


def explains(
    values: Sequence[Float[np.ndarray, "S T D"]],
    measures: Sequence[TapMeasure],
    variant: Sequence[Float[np.ndarray, "S T D"]],
    real: Bool[np.ndarray, " T"],
) -> bool:
    """Return whether most of the stored slots match the teacher's output for another input."""
    fits = [
        np.mean(weighted_error(given[:, real], own[:, real]) <= measure.limit)
        for given, own, measure in zip(values, variant, measures, strict=True)
    ]
    return float(np.min(fits)) > 0.5


def _norm(values: np.ndarray) -> np.ndarray:
    """`[S]` of `[S, t, D]`."""
    return np.sqrt(np.square(values.astype(np.float64)).sum((1, 2)))


def _cosine_distance(given: np.ndarray, own: np.ndarray) -> np.ndarray:
    """`[S]`: as half the squared distance of the unit vectors, whose rounding is smaller than that of 1 - cos."""
    units = [v / np.maximum(np.linalg.norm(v, axis=-1, keepdims=True), TINY) for v in (given, own)]
    return np.square(units[0] - units[1]).sum(-1).mean(-1) / 2
