"""Values about the rows that all blocks of a decoder share."""

from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int

from distillcache.models.config import BlockKind, ModelConfig
from distillcache.models.layers.rope import rope_tables


class BlockContext(NamedTuple):
    """Inputs that every block needs about the rows: attention masks, positions and rotary angles.

    local_cos, local_sin: of the blocks that rotate by `ModelConfig.local_rope`; None where there is none.
    noise: in training with `MoeConfig.jitter`, a PRNG key for
    each row, `[B]`. bias_groups: `[B]`, which of several router biases a row's tokens are routed with.
    """

    cos: Float[Array, "B T 1 hd"]
    sin: Float[Array, "B T 1 hd"]
    segment_ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    noise: Array | None = None
    bias_groups: Int[Array, " B"] | None = None
    local_cos: Float[Array, "B T 1 hd"] | None = None
    local_sin: Float[Array, "B T 1 hd"] | None = None


def block_context(config: ModelConfig, positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]) -> BlockContext:
    """Compute the inputs that the blocks of a decoder share; once, outside the scan."""
    cos, sin = rope_tables(config.rope, config.rope_dim, positions, config.max_positions, segment_ids)
    context = BlockContext(cos, sin, segment_ids, positions)
    if config.local_rope is None:
        return context
    cos, sin = rope_tables(config.local_rope, config.rope_dim, positions, config.max_positions, segment_ids)
    return context._replace(local_cos=cos, local_sin=sin)


def angles_of(context: BlockContext, kind: BlockKind) -> tuple[Float[Array, "B T 1 hd"], Float[Array, "B T 1 hd"]]:
    """cos and sin by which blocks of this kind rotate."""
    if not kind.local_rope:
        return context.cos, context.sin
    if context.local_cos is None or context.local_sin is None:
        raise ValueError("blocks rotate by ModelConfig.local_rope, and there is none")
    return context.local_cos, context.local_sin


def context_of_block(context: BlockContext, index: Array) -> BlockContext:
    """The context with noise of the block's own."""
    if context.noise is None:
        return context
    return context._replace(noise=jax.vmap(jax.random.fold_in, (0, None))(context.noise, index))
