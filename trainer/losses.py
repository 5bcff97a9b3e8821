"""Pure losses, each a sum and its weight; the same in the scan's body (`[B, T, D]`) and stacked (`[L, B, T, D]`).

All are computed in float32 whatever comes in: bfloat16 cannot tell distances below about 4e-3 apart. Masked tokens are
taken out with `where`, not multiplied by zero, and before anything is computed, so that a NaN or a row of zeros in
the padding reaches neither the sum nor the gradient. Scale-free losses hold up to float32's largest numbers: what is so
large that its squares might overflow is first multiplied by 2^-80. All else keeps its bits.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

COSINE_EPSILON = 1e-6  # floor of a squared norm, as in MaxText (optax.cosine_distance(..., epsilon=1e-6))
RELATIVE_EPSILON = 1e-6  # the same floor for the teacher's squared norm
LARGE, SHRINK = 2.0**50, 2.0**-80  # a million squares of numbers below LARGE, or of shrunk ones, fit into float32
NO_MASS = -1e30  # the logit of an empty rest: no mass, and unlike -inf no NaN in any gradient
FLOAT32_EPSILON = 2.0**-23
MAX_EXPONENT = 700.0  # exp of more is no float


class MaskedSum(NamedTuple):
    """A metric while it travels: divide only to report. total `[*L]`, weight `[]` (the tokens that count)."""

    total: Float[Array, "*L"]
    weight: Float[Array, ""]

    @property
    def mean(self) -> Float[Array, "*L"]:
        """total / weight, and NaN where nothing counted: such a mean is undefined."""
        return jnp.where(self.weight > 0, self.total / jnp.maximum(self.weight, 1.0), jnp.nan)


def blockwise_cosine_loss(
    student: Float[Array, "*L B T D"], teacher: Float[Array, "*L B T D"], mask: Bool[Array, "B T"]
) -> MaskedSum:
    """`1 - cos(s, t)` of every token.

    A squared norm below 1e-6 counts as 1e-6, so rows of zeros have distance 1 and finite gradients; from each other
    they have distance 0, as of blocks that have no mixer.
    Source: MaxText distillation_utils (masked cosine), Optax cosine_distance.
    """
    s, t = _real(student, mask), _real(teacher, mask)
    distance = 1.0 - jnp.sum(_unit(s) * _unit(t), axis=-1)
    return _masked_sum(jnp.where(jnp.any((s != 0) | (t != 0), axis=-1), distance, 0.0), mask)


def blockwise_l2_loss(
    student: Float[Array, "*L B T D"], teacher: Float[Array, "*L B T D"], mask: Bool[Array, "B T"]
) -> MaskedSum:
    """The mean over D of `(s - t)^2`, of every token. Source: MaxText distillation_utils (masked mean square)."""
    difference = _real(student, mask) - _real(teacher, mask)
    return _masked_sum(jnp.mean(jnp.square(difference), axis=-1), mask)


def blockwise_relative_l2_loss(
    student: Float[Array, "*L B T D"], teacher: Float[Array, "*L B T D"], mask: Bool[Array, "B T"]
) -> MaskedSum:
    """`||s - t||^2 / ||t||^2` of every token: scale-free as the cosine is, and it sees the norm as well.

    A teacher's squared norm below 1e-6 counts as 1e-6, so rows of zeros have finite losses and gradients.
    """
    s, t = _real(student, mask), _real(teacher, mask)
    scale = _fitting_scale(t)
    size = jnp.maximum(jnp.sum(jnp.square(t * scale), axis=-1), RELATIVE_EPSILON * scale[..., 0])
    return _masked_sum(jnp.sum(jnp.square(s * scale - t * scale), axis=-1) / size, mask)


def feature_loss(
    student: Float[Array, "*L B T D"],
    teacher: Float[Array, "*L B T D"],
    mask: Bool[Array, "B T"],
    *,
    relative_l2: float = 0.0,
    cosine: float = 0.0,
    l2: float = 0.0,
) -> MaskedSum:
    """The weighted mix of the three; a share of zero is not computed."""
    shares = (
        (relative_l2, blockwise_relative_l2_loss),
        (cosine, blockwise_cosine_loss),
        (l2, blockwise_l2_loss),
    )
    total, weight = jnp.zeros(student.shape[:-3], jnp.float32), _count(mask)
    for share, loss in shares:
        if share:
            total = total + share * loss(student, teacher, mask).total
    return MaskedSum(total, weight)


def next_token_loss(
    logits: Float[Array, "B T V"],
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
) -> MaskedSum:
    """Cross-entropy of every next token that counts, in nats.

    Token t + 1 counts as the target of position t where both lie in one document (segment 0, padding, is none) and
    `loss_mask[t + 1]` holds. `exp(mean)` is the perplexity.
    """
    targets = tokens[:, 1:]
    counts = counted_predictions(segment_ids, loss_mask)[:, :-1]
    wide = _real(logits[:, :-1], counts)
    chosen = jnp.take_along_axis(wide, targets[..., None], axis=-1)[..., 0]
    return _masked_sum(jax.nn.logsumexp(wide, axis=-1) - chosen, counts)


def perplexity_of(loss: float) -> float:
    """exp of a mean cross-entropy, in nats; of one that no float could hold the exp of, the largest that is written."""
    return math.exp(min(loss, MAX_EXPONENT))


def without_padding(logits: Float[Array, "B T V"], real_vocab: int | None) -> Float[Array, "B T V"]:
    """The logits with no mass beyond the tokenizer's ids, float32; as they are where `real_vocab` is None."""
    if real_vocab is None or real_vocab >= logits.shape[-1]:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1]) < real_vocab, logits.astype(jnp.float32), NO_MASS)


def counted_predictions(segment_ids: Int[Array, "B T"], loss_mask: Bool[Array, "B T"]) -> Bool[Array, "B T"]:
    """Return whether position t's prediction of token t + 1 counts, as in `next_token_loss`; the last position's never
    does.

    The mask is the target's, so it is shifted with it (SpecForge issue 885 was a mask that was not).
    """
    nexts = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0) & loss_mask[:, 1:]
    return jnp.pad(nexts, ((0, 0), (0, 1)))


class SupportLogits(NamedTuple):
    """Teacher's and student's logits over one support, float32 `[B, T, k]`, or `[B, T, k + 1]` with the rest last."""

    teacher: Float[Array, "B T s"]
    student: Float[Array, "B T s"]


def topk_kl_loss(
    student_logits: Float[Array, "B T V"],
    values: Float[Array, "B T k"],
    ids: Int[Array, "B T k"],
    logsumexp: Float[Array, "B T"],
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
    *,
    tau: Float[Array, ""] | float,
    rest_bucket: bool,
    real_vocab: int | None = None,
) -> MaskedSum:
    """KL(teacher || student) at temperature tau > 0 of every prediction that counts, in nats, without a factor tau².

    Both sides are normalised over the same support: the teacher's top k, and with `rest_bucket` one more class for all
    that lies outside (`support_logits`). To spare memory call it row by row, as `next_token_loss` is called; for
    several temperatures call its two halves, `support_logits` and `support_kl`.

    Args:
        values, ids, logsumexp: as recorded; logsumexp is of the teacher's whole vocabulary, at temperature 1.
        tokens: not used, since a divergence has no target; here so that all token losses are called alike.

    Source: Hinton et al. 2015. MaxText issue 4056: teacher and student normalised over different supports.
    """
    counts = counted_predictions(segment_ids, loss_mask)
    support = support_logits(
        student_logits, values, ids, logsumexp, counts, rest_bucket=rest_bucket, real_vocab=real_vocab
    )
    return support_kl(support, counts, tau)


def support_logits(
    student_logits: Float[Array, "B T V"],
    values: Float[Array, "B T k"],
    ids: Int[Array, "B T k"],
    logsumexp: Float[Array, "B T"],
    counts: Bool[Array, "B T"],
    *,
    rest_bucket: bool,
    real_vocab: int | None = None,
) -> SupportLogits:
    """Both sides' logits over the teacher's top k, zeros where nothing counts: all that a KL at any tau needs.

    The rest, if requested, is one pseudo-logit: log(exp(logsumexp) - sum exp(values)) for the teacher, the logsumexp of
    all other logits for the student. At tau = 1 that is each one's exact mass outside the top k. At another tau the
    teacher's logits there are unknown, so the pseudo-logits are divided by tau like any logit, on both sides: the rest
    counts as one class with its mass at tau = 1.

    The teacher's rest is a small difference: its mass is known to about 1e-6, and where a float32 teacher's values were
    rounded to bfloat16, to about 2e-2 (record them as f32 then). A rest that cannot be told from none, or that the
    rounding made negative, is none: `NO_MASS`. With k = V there is none on either side. An id that the student's
    vocabulary lacks gives NaN.

    real_vocab: ids from here on are padding, of no mass on either side, whatever the teacher recorded; of it the
    student may have fewer or more rows. `logsumexp` leaves padding out as well, but in records of earlier versions,
    where the mass that the teacher's padding has outside its top k cannot be told from that of tokens: it stays in
    its rest. Where the top k holds every id that counts, there is no rest on either side.
    """
    wide, values = _real(without_padding(student_logits, real_vocab), counts), _real(values, counts)
    teacher_rest = _rest_logit(values, jnp.where(counts, logsumexp.astype(jnp.float32), 0.0))
    chosen = jnp.take_along_axis(wide, ids, axis=-1)
    if real_vocab is not None:
        values, chosen = (jnp.where(ids < real_vocab, part, NO_MASS) for part in (values, chosen))
    if not rest_bucket or values.shape[-1] == wide.shape[-1]:
        return SupportLogits(values, chosen)
    others = jnp.put_along_axis(wide, ids, NO_MASS, axis=-1, inplace=False)
    student_rest = jax.nn.logsumexp(others, axis=-1)
    # A mass that the student cannot have, however small, would have a divergence without bound.
    teacher_rest = jnp.where(student_rest > NO_MASS / 2, teacher_rest, NO_MASS)
    return SupportLogits(
        jnp.concatenate([values, teacher_rest[..., None]], axis=-1),
        jnp.concatenate([chosen, student_rest[..., None]], axis=-1),
    )


def support_kl(support: SupportLogits, counts: Bool[Array, "B T"], tau: Float[Array, ""] | float) -> MaskedSum:
    """KL(teacher || student) at temperature tau over one support, of every prediction that counts."""
    teacher, student = (jax.nn.log_softmax(logits / tau, axis=-1) for logits in support)
    share = jnp.exp(teacher)
    terms = jnp.where(share > 0, share * (teacher - student), 0.0)  # what has no mass adds nothing, whatever its log
    return _masked_sum(jnp.sum(terms, axis=-1), counts)


class TopKCrossEntropy(NamedTuple):
    """Facts that the recorded logits give about the teacher's own cross-entropy on next tokens, in nats.

    covered: over the targets among the teacher's top k; exact. These are the easy ones: its mean is no perplexity.
    share: how many of all targets that are (`share.mean` lies in [0, 1]).
    at_least: over all targets. One outside the top k counts as if it had the k-th logit, the most that it can have, so
        the teacher's cross-entropy is this or more.
    """

    covered: MaskedSum
    share: MaskedSum
    at_least: MaskedSum


def topk_cross_entropy(
    values: Float[Array, "B T k"],
    ids: Int[Array, "B T k"],
    logsumexp: Float[Array, "B T"],
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    loss_mask: Bool[Array, "B T"],
) -> TopKCrossEntropy:
    """The teacher's cross-entropy on the targets that `next_token_loss` counts, from the recorded logits."""
    counts = counted_predictions(segment_ids, loss_mask)
    values, logsumexp = _real(values, counts), jnp.where(counts, logsumexp.astype(jnp.float32), 0.0)
    is_target = ids == jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))[..., None]
    covered = counts & jnp.any(is_target, axis=-1)
    loss = logsumexp - jnp.sum(jnp.where(is_target, values, 0.0), axis=-1)
    least = jnp.where(covered, loss, logsumexp - values[..., -1])
    return TopKCrossEntropy(
        _masked_sum(loss, covered), MaskedSum(_count(covered), _count(counts)), _masked_sum(least, counts)
    )


def _rest_logit(values: Float[Array, "B T k"], logsumexp: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """log(exp(logsumexp) - sum exp(values)), or `NO_MASS`."""
    inside = jax.nn.logsumexp(values, axis=-1) - logsumexp  # the log of the top k's mass
    some = inside < -FLOAT32_EPSILON * jnp.maximum(jnp.abs(logsumexp), 1.0)
    return jnp.where(some, logsumexp + jnp.log(-jnp.expm1(jnp.where(some, inside, -1.0))), NO_MASS)


def _real(x: Float[Array, "*A D"], mask: Bool[Array, "B T"]) -> Float[Array, "*A D"]:
    return jnp.where(mask[..., None], x.astype(jnp.float32), 0.0)


def _unit(x: Float[Array, "*A D"]) -> Float[Array, "*A D"]:
    scale = _fitting_scale(x)
    scaled = x * scale
    squares = jnp.sum(jnp.square(scaled), axis=-1, keepdims=True)
    return scaled / jnp.sqrt(jnp.maximum(squares, COSINE_EPSILON * scale))


def _fitting_scale(x: Float[Array, "*A D"]) -> Float[Array, "*A 1"]:
    """1, or the power of two by which a vector of very large numbers is multiplied so that its squares can be added.

    Shrunk squares sum to 2^-60 or more, so a floor times the scale is below them.
    """
    largest = jnp.max(jnp.abs(jax.lax.stop_gradient(x)), axis=-1, keepdims=True)
    return jnp.where(largest < LARGE, 1.0, SHRINK)


def _count(mask: Bool[Array, "B T"]) -> Float[Array, ""]:
    return jnp.sum(mask, dtype=jnp.float32)


def _masked_sum(values: Float[Array, "*L B T"], mask: Bool[Array, "B T"]) -> MaskedSum:
    return MaskedSum(jnp.sum(jnp.where(mask, values, 0.0), axis=(-2, -1)), _count(mask))
