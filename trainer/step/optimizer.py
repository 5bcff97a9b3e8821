"""AdamW whose state and count are per block, and in blockwise mode clipping too.

The transformation is written for one block, and every leaf of the state has the block axis, the counts too
(`count[L]`). So one bad block is clipped alone, a block that is not trained stands still, and the update may happen
inside the scan over blocks or after it, with the same checkpoints.
"""

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from distillcache.schemas.config.train import OptimizerConfig
from distillcache.trainer.losses import SHRINK

# Steps whose programs a process keeps: a run with the step of one before (a sweep's next seed, a run that goes on) is
# neither traced nor compiled anew. A step is looked up by its value, so all that it is made of can be compared.
PROGRAMS = 16
Blocks = Any  # a pytree whose leaves have the block axis in front


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Step (from 0) to learning rate: linear warm-up, then a cosine to `final_fraction` at `steps`.

    The first step is not at zero: with `warmup_steps: 10` it is at 1/11 of the highest rate.

    Args:
        config: of a stage, which names its learning rate.
    """
    peak, warmup = config.learning_rate, config.warmup_steps
    assert peak is not None
    decay = optax.cosine_decay_schedule(peak, max(steps - warmup, 1), alpha=config.final_fraction)
    if warmup == 0:
        return decay
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, decay], [warmup])


@lru_cache(maxsize=PROGRAMS)
def make_optimizer(config: OptimizerConfig, steps: int, *, clips: bool = True) -> optax.GradientTransformation:
    """The transformation of one block's parameters; clips: whether each block's gradient is clipped to
    `clip_norm` on its own.

    The same object for the same values, so that steps can be compared.
    """
    adam = optax.adamw(
        learning_rate_schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=_decayed,
    )
    return adam if config.clip_norm is None or not clips else optax.chain(_clipping(config.clip_norm), adam)


def init_blocks(optimizer: optax.GradientTransformation, parameters: Blocks) -> Blocks:
    """The optimizer state of stacked blocks; empty where nothing of them is trained."""
    return jax.vmap(optimizer.init)(parameters) if parameters else {}


def update_one(
    optimizer: optax.GradientTransformation, gradients: Blocks, state: Blocks, parameters: Blocks
) -> tuple[Blocks, Blocks]:
    """New parameters and state of one block (or of what belongs to none)."""
    if not parameters:  # only the embedding or the head is trained, or only blocks with experts
        return parameters, state
    steps, state = optimizer.update(gradients, state, parameters)
    return optax.apply_updates(parameters, steps), state


def update_blocks(
    optimizer: optax.GradientTransformation,
    gradients: Blocks,
    state: Blocks,
    parameters: Blocks,
    trained: Bool[Array, " L"],
    runs: Bool[Array, " L"] | None = None,
) -> tuple[Blocks, Blocks]:
    """New parameters and state of stacked blocks; a block that is not `trained` keeps both, weight decay included.

    One block after the other, in place: over whole stacks XLA would copy both moments first.

    Args:
        runs: blocks whose update is computed, where others than `trained` have to (targets.padded_targets).
    """

    if not parameters:
        return parameters, state

    def body(stacks: tuple[Blocks, Blocks], block: Array) -> tuple[tuple[Blocks, Blocks], None]:
        old = take_block(stacks, block)

        def update(gradient: Blocks, mine: Blocks) -> Blocks:
            new = update_one(optimizer, gradient, mine[1], mine[0])
            return new if runs is None else jax.tree.map(lambda n, o: jnp.where(trained[block], n, o), new, mine)

        # A branch, so that what it takes and gives are arrays of their own: XLA would otherwise read the stacks again
        # after it has written to them, and copy them whole for that, in every iteration.
        taken = trained if runs is None else runs
        mine = jax.lax.cond(taken[block], update, lambda gradient, mine: mine, take_block(gradients, block), old)
        return put_block(stacks, mine, block), None

    (parameters, state), _ = jax.lax.scan(body, (parameters, state), jnp.arange(trained.shape[0]))
    return parameters, state


def take_block(stacks: Blocks, block: Array) -> Blocks:
    """A block's own of stacked leaves."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, block, keepdims=False), stacks)


def put_block(stacks: Blocks, mine: Blocks, block: Array) -> Blocks:
    """The stacks with a block's own in its place."""
    return jax.tree.map(lambda leaf, new: jax.lax.dynamic_update_index_in_dim(leaf, new, block, 0), stacks, mine)


def clip_all(gradients: Blocks, norm: float | None) -> Blocks:
    """Gradients scaled so that the norm of all of them together is at most `norm`."""
    if norm is None:
        return gradients
    return _clipping(norm).update(gradients, optax.EmptyState())[0]


def _clipping(most: float) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm`, to the bit, but for gradients whose squares overflow float32: these would become 0.

    (Of gradients that are not finite themselves nothing finite comes out, as in Optax.)
    """

    def update(updates: Blocks, state: Any, params: Blocks | None = None) -> tuple[Blocks, Any]:
        norm = optax.tree.norm(updates)
        small = optax.tree.norm(jax.tree.map(lambda leaf: leaf * SHRINK, updates))
        fits = jnp.isfinite(norm)

        def clip(leaf: Array) -> Array:
            whole, shrunk = (leaf / norm.astype(leaf.dtype)) * most, (leaf * SHRINK / small.astype(leaf.dtype)) * most
            return jnp.where(norm < most, leaf, jnp.where(fits, whole, shrunk))

        return jax.tree.map(clip, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _decayed(parameters: Blocks) -> Blocks:
    """Matrices decay; norm weights, biases, logarithms of rates and factors do not, as is usual."""

    def decays(path: tuple[Any, ...], _: Array) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return not any(part.endswith(("norm", "_bias", "_log", "_scale")) for part in name.split("/"))

    return jax.tree_util.tree_map_with_path(decays, parameters)
