"""Pure losses, each a sum and its weight; the same in the scan's body (`[B, T, D]`) and stacked (`[L, B, T, D]`).

All are computed in float32 whatever comes in: bfloat16 cannot tell distances below about 4e-3 apart. Masked tokens are
taken out with `where`, not multiplied by zero, and before anything is computed, so that a NaN or a row of zeros in
the padding reaches neither the sum nor the gradient.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

COSINE_EPSILON = 1e-6  # floor of a squared norm, as in MaxText (optax.cosine_distance(..., epsilon=1e-6))
RELATIVE_EPSILON = 1e-6  # the same floor for the teacher's squared norm


class MaskedSum(NamedTuple):
    """A metric while it travels: divide only to report. total `[*L]`, weight `[]` (the tokens that count)."""

    total: Float[Array, "*L"]
    weight: Float[Array, ""]

    @property
    def mean(self) -> Float[Array, "*L"]:
        """total / weight, and 0 where nothing counted."""
        return self.total / jnp.maximum(self.weight, 1.0)


def blockwise_cosine_loss(
    student: Float[Array, "*L B T D"], teacher: Float[Array, "*L B T D"], mask: Bool[Array, "B T"]
) -> MaskedSum:
    """`1 - cos(s, t)` of every token.

    A squared norm below 1e-6 counts as 1e-6, so rows of zeros have distance 1 and finite gradients.
    Source: MaxText distillation_utils (masked cosine), Optax cosine_distance.
    """
    s, t = _real(student, mask), _real(teacher, mask)
    distance = 1.0 - jnp.sum(_unit(s) * _unit(t), axis=-1)
    return _masked_sum(distance, mask)


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
    size = jnp.maximum(jnp.sum(jnp.square(t), axis=-1), RELATIVE_EPSILON)
    return _masked_sum(jnp.sum(jnp.square(s - t), axis=-1) / size, mask)


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
    counts = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0) & loss_mask[:, 1:]
    wide = _real(logits[:, :-1], counts)
    chosen = jnp.take_along_axis(wide, targets[..., None], axis=-1)[..., 0]
    return _masked_sum(jax.nn.logsumexp(wide, axis=-1) - chosen, counts)


def _real(x: Float[Array, "*A D"], mask: Bool[Array, "B T"]) -> Float[Array, "*A D"]:
    return jnp.where(mask[..., None], x.astype(jnp.float32), 0.0)


def _unit(x: Float[Array, "*A D"]) -> Float[Array, "*A D"]:
    return x / jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), COSINE_EPSILON))


def _count(mask: Bool[Array, "B T"]) -> Float[Array, ""]:
    return jnp.sum(mask, dtype=jnp.float32)


def _masked_sum(values: Float[Array, "*L B T"], mask: Bool[Array, "B T"]) -> MaskedSum:
    return MaskedSum(jnp.sum(jnp.where(mask, values, 0.0), axis=(-2, -1)), _count(mask))
