"""Weights that change with the step: pure functions of the step, so a resumed run has the same ones."""

import jax.numpy as jnp
from jaxtyping import Array

from distillcache.schemas.config.train import Ramp, Share, Weight
from distillcache.schemas.config.train import may_count as may_count


def weight_at(weight: Weight, step: Array | int, steps: int) -> Array:
    """The weight at a step of a stage, float32 `[]`.

    Args:
        step: from 0. The last one, `steps - 1`, and any after it have `end`.
        steps: of the stage.
    """
    if not isinstance(weight, Ramp):
        return jnp.asarray(weight, jnp.float32)
    if weight.schedule == "constant" or steps == 1:
        return jnp.asarray(weight.start, jnp.float32)
    part = jnp.clip(jnp.asarray(step, jnp.float32) / (steps - 1), 0.0, 1.0)
    if weight.schedule == "cosine":
        part = (1.0 - jnp.cos(jnp.pi * part)) / 2.0
    return jnp.float32(weight.start) + part * jnp.float32(weight.end - weight.start)


def all_positive(weight: Weight) -> bool:
    """Return whether a weight is always above zero."""
    return min(weight.start, weight.end) > 0 if isinstance(weight, Ramp) else weight > 0


def always_one(share: Share) -> bool:
    """Return whether a share is always the whole."""
    return min(share.start, share.end) == 1 if isinstance(share, Ramp) else share == 1
