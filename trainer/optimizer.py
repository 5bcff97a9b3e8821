"""AdamW whose state, count and clipping are per block.

The transformation is written for one block and mapped over the stacked block axis: every leaf of the state has that
axis, the counts too (`count[L]`). So one bad block is clipped alone, a block that is not trained stands still, and
the update could move into the scan over blocks without another checkpoint format.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from schemas.config import OptimizerConfig

Blocks = Any  # a pytree whose leaves have the block axis in front


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Step (from 0) to learning rate: linear warm-up, then a cosine to `final_fraction` at `steps`.

    The first step is not at zero: with `warmup_steps: 10` it is at 1/11 of the highest rate.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    decay = optax.cosine_decay_schedule(peak, max(steps - warmup, 1), alpha=config.final_fraction)
    if warmup == 0:
        return decay
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, decay], [warmup])


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The transformation of one block's parameters."""
    adam = optax.adamw(
        learning_rate_schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=_decayed,
    )
    return adam if config.clip_norm is None else optax.chain(optax.clip_by_global_norm(config.clip_norm), adam)


def init_blocks(optimizer: optax.GradientTransformation, parameters: Blocks) -> Blocks:
    """The optimizer state of stacked blocks."""
    return jax.vmap(optimizer.init)(parameters)


def update_blocks(
    optimizer: optax.GradientTransformation,
    gradients: Blocks,
    state: Blocks,
    parameters: Blocks,
    trained: Bool[Array, "L"],
) -> tuple[Blocks, Blocks]:
    """New parameters and state of stacked blocks; a block that is not `trained` keeps both, weight decay included."""

    def update(gradient: Blocks, state: Blocks, parameters: Blocks, trained: Array) -> tuple[Blocks, Blocks]:
        steps, new_state = optimizer.update(gradient, state, parameters)
        moved = (optax.apply_updates(parameters, steps), new_state)
        return jax.tree.map(lambda new, old: jnp.where(trained, new, old), moved, (parameters, state))

    return jax.vmap(update)(gradients, state, parameters, trained)


def _decayed(parameters: Blocks) -> Blocks:
    """Matrices decay; norm weights and biases do not, as is usual."""

    def decays(path: tuple[Any, ...], _: Array) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return not any(part == "norm" or part.endswith("_bias") for part in name.split("/"))

    return jax.tree_util.tree_map_with_path(decays, parameters)
