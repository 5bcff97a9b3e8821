"""Exact losses over the whole vocabulary from streams and heads: logits exist for a few tokens at a time.

Teacher and student each give the normed stream that leaves their last block, `[B, T, D]`, and their head, `[D, V]`. A
scan goes over tiles of the sequence; a tile's logits are made, compared, differentiated in closed form and dropped.
The gradients of stream and head are made in the same pass, so a training step computes each side's logits once, as
the plain way does, and `[B, T, V]` never exists, forward or backward.

Divergences between nearly equal distributions are small differences of large terms. Here each is a sum of terms of
which none is negative (Σ p (e^x - 1 - x) with x = log(q / p) is KL(p || q), since Σ q = Σ p), and x comes from the
differences of logits. So a divergence of 1e-9 nats has as many right digits as one of 1.

Sources: Hinton et al. 2015 (tau); Agarwal et al. 2306.13649 (generalised JSD); Ko et al. 2402.03898 (skew KL).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from distillcache.models.head import LogitShape
from distillcache.models.layers.norm import softcap
from distillcache.models.mesh.ambient import ROW_AXES, TENSOR_AXIS, splitting_axes
from distillcache.trainer.losses import NO_MASS, MaskedSum, SupportLogits, counted_predictions, support_kl

TILE_LOGITS = 2**24  # logits of one side that exist at a time: 64 MiB in float32
NEAR = 20.0  # differences of logits up to which their powers are summed
SERIES_TERMS = 8  # 0.5^9 / 9! is beyond float32
SERIES_WITHIN = 0.5  # below it e^x - 1 - x is summed as a series; beyond it the difference has lost at most 3 bits

SIMPLE = LogitShape()  # a head of its own and nothing else

Direction = Literal["forward", "reverse", "jsd", "skew"]


@dataclass(frozen=True)
class Divergence:
    """The distance of the student's distribution s from the teacher's t, in nats.

    forward: KL(t || s). reverse: KL(s || t).
    skew: KL(t || a t + (1 - a) s), a = `share`: 0 is forward.
    jsd: b KL(t || m) + (1 - b) KL(s || m) with m = b t + (1 - b) s, b = `share` in (0, 1).
    """

    direction: Direction = "forward"
    share: float = 0.5


class Side(NamedTuple):
    """One model's end. stream: normed by its last norm. head: `[D, V]`, or tied `[V, D]`."""

    stream: Float[Array, "B T D"]
    head: Float[Array, "D V"] | Float[Array, "V D"]


class HeadSums(NamedTuple):
    """Sums over the predictions that count (`losses.counted_predictions`), float32; no gradient flows into them.

    divergence: at tau. kl: KL(teacher || student) at temperature 1. cross_entropy, teacher_cross_entropy: of the next
    token. agreement: predictions whose first choices are the same. targets: how many predictions count.
    """

    divergence: Float[Array, ""]
    kl: Float[Array, ""]
    cross_entropy: Float[Array, ""]
    teacher_cross_entropy: Float[Array, ""]
    agreement: Float[Array, ""]
    targets: Float[Array, ""]


class HeadWeights(NamedTuple):
    """Factors of the sums in the loss: `divergence * D + cross_entropy * CE`, D at temperature `tau`."""

    divergence: Float[Array, ""] | float
    cross_entropy: Float[Array, ""] | float
    tau: Float[Array, ""] | float


@dataclass(frozen=True)
class HeadLosses:
    """The static side of the losses.

    student, teacher: how each one's logits are made. real_vocab: ids from here on are padding, of no mass on either
    side; the heads may then differ in their number of columns. tile_logits: see `TILE_LOGITS`.
    """

    divergence: Divergence = Divergence()
    student: LogitShape = SIMPLE
    teacher: LogitShape = SIMPLE
    real_vocab: int | None = None
    tile_logits: int = TILE_LOGITS

    def __call__(
        self,
        student: Side,
        teacher: Side,
        weights: HeadWeights,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        loss_mask: Bool[Array, "B T"],
    ) -> tuple[Float[Array, ""], HeadSums]:
        """The weighted sum, which can be differentiated by the student's stream and head, and the sums themselves.

        The temperature's usual factor tau^2 is the caller's: it belongs to `weights.divergence`.

        Raises:
            ValueError: the heads have different numbers of columns and `real_vocab` does not say which are padding.
        """
        student, teacher = self._with_equal_columns(student, teacher)
        given = _Given(
            student.stream,
            teacher.stream,
            jnp.pad(tokens[:, 1:], ((0, 0), (0, 1))),
            counted_predictions(segment_ids, loss_mask),
        )
        weights = HeadWeights(*(jnp.asarray(weight, jnp.float32) for weight in weights))
        return _weighted(self, given, student.head, teacher.head, weights)

    def _with_equal_columns(self, student: Side, teacher: Side) -> tuple[Side, Side]:
        """The shorter head with columns of zeros, which count as padding."""
        sides = (student, self.student.vocabulary_axis), (teacher, self.teacher.vocabulary_axis)
        columns = [side.head.shape[axis] for side, axis in sides]
        if columns[0] == columns[1]:
            return student, teacher
        if self.real_vocab is None or self.real_vocab > min(columns):
            raise ValueError(f"heads of {columns[0]} and {columns[1]} columns need a vocabulary that both have")

        def longer(side: Side, axis: int) -> Side:
            missing = (0, max(columns) - side.head.shape[axis])
            return Side(side.stream, jnp.pad(side.head, [missing if dim == axis else (0, 0) for dim in range(2)]))

        return longer(*sides[0]), longer(*sides[1])


class _Given(NamedTuple):
    """Inputs that are cut into tiles, `[B, T, ...]`, or of a tile `[n, ...]`. targets: the next token's id."""

    student: Float[Array, "*N D"]
    teacher: Float[Array, "*N D"]
    targets: Int[Array, "*N"]
    counts: Bool[Array, "*N"]


class _Wanted(NamedTuple):
    """Which gradients are to be made: a frozen head's costs a quarter of the step."""

    stream: bool
    head: bool


class _Gradients(NamedTuple):
    """Gradients of the loss by the student's stream and head; None: not wanted."""

    stream: Float[Array, "B T D"] | None
    head: Float[Array, "D V"] | Float[Array, "V D"] | None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _weighted(
    losses: HeadLosses, given: _Given, student: Array, teacher: Array, weights: HeadWeights
) -> tuple[Array, HeadSums]:
    sums, _ = _on_devices(losses, given, student, teacher, weights, _Wanted(False, False))
    return _total(weights, sums), sums


def _forward(losses: HeadLosses, *arguments: Any) -> tuple[tuple[Array, HeadSums], _Gradients]:
    """The loss and its gradients in one pass; `arguments` are those of `_weighted`, each with whether it is varied."""
    given, student, teacher, weights = jax.tree.map(lambda leaf: leaf.value, arguments)
    wanted = _Wanted(arguments[0].student.perturbed, arguments[1].perturbed)
    sums, gradients = _on_devices(losses, given, student, teacher, weights, wanted)
    return (_total(weights, sums), sums), gradients


def _backward(losses: HeadLosses, gradients: _Gradients, cotangents: tuple[Any, Any]) -> tuple[Any, ...]:
    """Scale the gradients that the forward pass made."""
    by_loss = cotangents[0]
    if isinstance(by_loss, SymbolicZero):
        return None, None, None, None
    stream, head = (None if gradient is None else (gradient * by_loss).astype(gradient.dtype) for gradient in gradients)
    return _Given(stream, None, None, None), head, None, None  # type: ignore[arg-type]


_weighted.defvjp(_forward, _backward, symbolic_zeros=True)


def _total(weights: HeadWeights, sums: HeadSums) -> Array:
    return weights.divergence * sums.divergence + weights.cross_entropy * sums.cross_entropy


def _on_devices(
    losses: HeadLosses, given: _Given, student: Array, teacher: Array, weights: HeadWeights, wanted: _Wanted
) -> tuple[HeadSums, _Gradients]:
    """Each device's own rows against its own columns of the vocabulary; sums and the head's gradient over all rows."""
    sizes = splitting_axes((*ROW_AXES, TENSOR_AXIS))
    rows = tuple(axis for axis in ROW_AXES if axis in sizes)
    columns = student.shape[losses.student.vocabulary_axis]
    across = TENSOR_AXIS if TENSOR_AXIS in sizes and columns % sizes[TENSOR_AXIS] == 0 else None
    if not rows and across is None:
        return _scan_tiles(losses, given, student, teacher, weights, across=None, wanted=wanted)

    def on_device(given: _Given, *others: Any) -> tuple[HeadSums, _Gradients]:
        sums, (stream, head) = _scan_tiles(losses, given, *others, across=across, wanted=wanted)
        if across is not None and stream is not None:
            stream = _summed(stream, across)
        if rows and head is not None:
            head = _summed(head, rows)
        return jax.lax.psum(sums, rows) if rows else sums, _Gradients(stream, head)

    of_rows = PartitionSpec(rows)
    own, its = (
        PartitionSpec(across) if shape.tied else PartitionSpec(None, across)
        for shape in (losses.student, losses.teacher)
    )
    return jax.shard_map(
        on_device,
        in_specs=(of_rows, own, its, PartitionSpec()),
        out_specs=(PartitionSpec(), _Gradients(of_rows, own)),  # type: ignore[arg-type]
        axis_names={*rows, *([across] if across else [])},
        check_vma=False,  # scans begin with zeros that are the same everywhere
    )(given, student, teacher, weights)


def _summed(gradient: Array, axes: str | tuple[str, ...]) -> Array:
    """The sum over devices; XLA on CPU aborts the process where a shard_map sums bfloat16: float32 there."""
    wide = gradient.astype(jnp.float32) if jax.default_backend() == "cpu" else gradient
    return jax.lax.psum(wide, axes).astype(gradient.dtype)


def _scan_tiles(
    losses: HeadLosses,
    given: _Given,
    student: Array,
    teacher: Array,
    weights: HeadWeights,
    *,
    across: str | None,
    wanted: _Wanted,
) -> tuple[HeadSums, _Gradients]:
    """All tokens of a device, as many at a time as `tile_logits` allows. across: the axis that splits the columns."""
    width = student.shape[losses.student.vocabulary_axis]
    columns = _Columns.here(width, across)
    tokens = given.counts.size
    tiles = min(tokens, -(-tokens * width // losses.tile_logits))
    size = -(-tokens // tiles)

    def cut(x: Array) -> Array:
        flat = x.reshape(tokens, *x.shape[2:])
        flat = jnp.pad(flat, ((0, tiles * size - tokens), *[(0, 0)] * (flat.ndim - 1)))
        return flat.reshape(tiles, size, *flat.shape[1:])

    def one(carry: tuple[HeadSums, Array | None], tile: _Given) -> tuple[tuple[HeadSums, Array | None], Any]:
        sums, of_head = carry
        # What does not count is taken out first: a NaN there must reach no sum and no gradient.
        own, its = (
            jnp.where(tile.counts[:, None], stream, 0).astype(head.dtype)
            for stream, head in ((tile.student, student), (tile.teacher, teacher))
        )
        vocabulary, hidden = losses.student.vocabulary_axis, 1 - losses.student.vocabulary_axis
        logits, pull = jax.vjp(partial(_logits, losses.student), _product(own, 1, student, hidden))
        theirs = _logits(losses.teacher, _product(its, 1, teacher, 1 - losses.teacher.vocabulary_axis))
        found, slope = _compare(losses, _Pair(theirs, logits), tile, weights, columns)
        sums = jax.tree.map(jnp.add, sums, found)
        by_product = pull(slope)[0].astype(student.dtype)  # where no gradient is wanted XLA drops it
        if of_head is not None:
            of_head = _add_product(of_head, own, by_product, hidden, losses.tile_logits)
        of_stream = _product(by_product, 1, student, vocabulary) if wanted.stream else None
        return (sums, of_head), of_stream

    zero = jnp.zeros(student.shape, jnp.float32) if wanted.head else None
    start = HeadSums(*[jnp.zeros(())] * len(HeadSums._fields)), zero
    (sums, of_head), of_stream = jax.lax.scan(one, start, jax.tree.map(cut, given))
    if of_stream is not None:
        of_stream = of_stream.reshape(tiles * size, -1)[:tokens].reshape(given.student.shape)
        of_stream = of_stream.astype(given.student.dtype)
    return sums, _Gradients(of_stream, None if of_head is None else of_head.astype(student.dtype))


class _Columns(NamedTuple):
    """The columns of the vocabulary that lie on this device, and sums and maxima over all. ids: of the columns."""

    ids: Int[Array, " v"]
    across: str | None

    @classmethod
    def here(cls, size: int, across: str | None) -> "_Columns":
        first = 0 if across is None else jax.lax.axis_index(across) * size
        return cls(jnp.arange(size) + first, across)

    def total(self, values: Float[Array, "n v"]) -> Float[Array, "n 1"]:
        found = jnp.sum(values, axis=-1, keepdims=True)
        return found if self.across is None else jax.lax.psum(found, self.across)

    def largest(self, values: Float[Array, "n v"]) -> Float[Array, "n 1"]:
        found = jnp.max(values, axis=-1, keepdims=True)
        return found if self.across is None else jax.lax.pmax(found, self.across)

    def first_choice(self, values: Float[Array, "n v"]) -> Int[Array, "n 1"]:
        """The id of the largest value, the least of equals."""
        beyond = jnp.iinfo(jnp.int32).max
        found = jnp.min(jnp.where(values == self.largest(values), self.ids, beyond), axis=-1, keepdims=True)
        return found if self.across is None else jax.lax.pmin(found, self.across)


class _Pair(NamedTuple):
    teacher: Float[Array, "n v"]
    student: Float[Array, "n v"]


class _Ratio(NamedTuple):
    """Two distributions and log(student / teacher)."""

    log: Float[Array, "n v"]
    teacher: Float[Array, "n v"]
    student: Float[Array, "n v"]


def _product(a: Array, of_a: int, b: Array, of_b: int) -> Array:
    """The product over an axis of each, in float32 whatever comes in: a bfloat16 logit near 20 is right to 0.06."""
    return jax.lax.dot_general(a, b, (((of_a,), (of_b,)), ((), ())), preferred_element_type=jnp.float32)


def _add_product(
    total: Float[Array, "D v"], own: Float[Array, "n D"], by_product: Float[Array, "n v"], hidden: int, most: int
) -> Float[Array, "D v"]:
    """Add a tile's gradient of the head, some hidden numbers at a time: the product as a whole would be as large as
    the head. hidden: the head's axis of D; most: numbers of the product that exist at a time."""
    depth = own.shape[1]
    slices = next(n for n in range(1, depth + 1) if depth % n == 0 and (total.size // n <= most or n == depth))
    if slices == 1:
        pair = (by_product, own) if hidden else (own, by_product)
        return total + _product(pair[0], 0, pair[1], 0)
    width = depth // slices

    def add(number: Int[Array, ""], total: Array) -> Array:
        part = jax.lax.dynamic_slice_in_dim(own, number * width, width, 1)
        pair = (by_product, part) if hidden else (part, by_product)
        before = jax.lax.dynamic_slice_in_dim(total, number * width, width, hidden)
        after = before + _product(pair[0], 0, pair[1], 0)
        return jax.lax.dynamic_update_slice_in_dim(total, after, number * width, hidden)

    return jax.lax.fori_loop(0, slices, add, total)


def _logits(shape: LogitShape, product: Float[Array, "n v"]) -> Float[Array, "n v"]:
    scaled = product if shape.divisor == 1 else product / shape.divisor
    return scaled if shape.softcap is None else softcap(scaled, shape.softcap)


def _compare(
    losses: HeadLosses, logits: _Pair, tile: _Given, weights: HeadWeights, columns: _Columns
) -> tuple[HeadSums, Float[Array, "n v"]]:
    """The sums of a tile, and the loss's derivative by the student's logits."""
    if losses.real_vocab is not None:
        real = columns.ids < losses.real_vocab
        logits = _Pair(*(jnp.where(real, side, NO_MASS) for side in logits))
    is_target = columns.ids == tile.targets[:, None]
    (teacher_sum, _), (student_sum, probabilities) = (_softmax(side, columns) for side in logits)
    chosen = [columns.total(jnp.where(is_target, side, 0.0)) for side in logits]
    warm = _ratio(_Pair(*(side / weights.tau for side in logits)), columns)
    terms, slope = _divergence(losses.divergence, warm, columns)
    kl, _ = _divergence(Divergence(), _ratio(logits, columns), columns)
    choices = [columns.first_choice(side) for side in logits]
    found = HeadSums(
        divergence=terms,
        kl=kl,
        cross_entropy=student_sum - chosen[1],
        teacher_cross_entropy=teacher_sum - chosen[0],
        agreement=choices[0] == choices[1],
        targets=jnp.ones_like(terms),
    )
    counts = tile.counts[:, None]
    sums = jax.tree.map(lambda value: jnp.sum(jnp.where(counts, value, 0.0)), found)
    by_logits = weights.divergence / weights.tau * slope + weights.cross_entropy * (probabilities - is_target)
    return sums, jnp.where(counts, by_logits, 0.0)


def support_divergence(
    divergence: Divergence, support: SupportLogits, counts: Bool[Array, "B T"], tau: Float[Array, ""] | float
) -> MaskedSum:
    """The divergence at temperature tau over a support (losses.support_logits), of every prediction that counts."""
    if divergence.direction == "forward":
        return support_kl(support, counts, tau)
    pair = _Pair(support.teacher / tau, support.student / tau)
    columns = _Columns(jnp.arange(support.teacher.shape[-1]), None)
    values = _divergence(divergence, _ratio(pair, columns), columns)[0][..., 0]
    return MaskedSum(jnp.sum(jnp.where(counts, values, 0.0)), jnp.sum(counts, dtype=jnp.float32))


def _softmax(logits: Float[Array, "n v"], columns: _Columns) -> tuple[Float[Array, "n 1"], Float[Array, "n v"]]:
    """The logsumexp, and the probabilities."""
    largest = columns.largest(logits)
    powers = jnp.exp(logits - largest)
    total = columns.total(powers)
    return largest + jnp.log(total), powers / total


def _ratio(logits: _Pair, columns: _Columns) -> _Ratio:
    """Both distributions; their ratio's log comes from the difference of logits, so it is exact where they are near."""
    (normaliser, teacher), (of_student, student) = (_softmax(side, columns) for side in logits)
    difference = logits.student - logits.teacher
    mean = columns.total(teacher * difference)
    difference = difference - mean
    # log sum(teacher * e^difference): by Jensen the sum is 1 or more, and near 1 its excess is what has to be exact.
    excess = columns.total(teacher * jnp.expm1(jnp.minimum(difference, NEAR)))
    far = columns.largest(difference) > NEAR
    return _Ratio(difference - jnp.where(far, of_student - normaliser - mean, jnp.log1p(excess)), teacher, student)


def _divergence(
    divergence: Divergence, ratio: _Ratio, columns: _Columns
) -> tuple[Float[Array, "n 1"], Float[Array, "n v"]]:
    """The divergence of each token, and its derivative by the student's logits: `s (g - sum(s g))`, g by the student's
    probability."""
    x, t, s = ratio
    if divergence.direction == "forward":
        slope = jnp.where(jnp.abs(x) < SERIES_WITHIN, t * jnp.expm1(x), s - t)
        return columns.total(_excess(x, t, s)), slope
    if divergence.direction == "reverse":
        found = columns.total(_excess(-x, s, t))
        return found, s * (x - found)
    share = divergence.share
    mixture = share * t + (1.0 - share) * s
    less = jnp.expm1(-jnp.abs(x))
    y = jnp.where(x < 0, jnp.log1p((1.0 - share) * less), x + jnp.log1p(share * less))  # log(mixture / t)
    if divergence.direction == "skew":
        found, by_s = _excess(y, t, mixture), (share - 1.0) * jnp.expm1(-y)
    else:
        found = share * _excess(y, t, mixture) + (1.0 - share) * _excess(y - x, s, mixture)
        by_s = (1.0 - share) * (x - y)
    return columns.total(found), s * (by_s - columns.total(s * by_s))


def _excess(x: Float[Array, "n v"], p: Float[Array, "n v"], q: Float[Array, "n v"]) -> Float[Array, "n v"]:
    """`p (e^x - 1 - x)`, never below 0; q: `p e^x`."""
    series = jnp.ones_like(x)
    for divisor in range(SERIES_TERMS + 1, 2, -1):
        series = 1.0 + x / divisor * series
    return jnp.where(jnp.abs(x) < SERIES_WITHIN, p * (0.5 * x * x) * series, (q - p) - p * x)
