"""What all blocks of a decoder share of the rows that they run on."""

from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int

from models.config import ModelConfig
from models.rope import rope_tables


class BlockContext(NamedTuple):
    """What every block needs to know of the rows: who sees whom, where, and the rotary angles.

    cos, sin: None in a decoder without rotary embedding. noise: in training with `MoeConfig.jitter`, a PRNG key for
    each row, `[B]`. bias_groups: `[B]`, which of several router biases a row's tokens are routed with.
    """

    cos: Float[Array, "B T 1 hd"]
    sin: Float[Array, "B T 1 hd"]
    segment_ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    noise: Array | None = None
    bias_groups: Int[Array, "B"] | None = None


def block_context(config: ModelConfig, positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]) -> BlockContext:
    """What the blocks of a decoder share; computed once, outside the scan."""
    cos, sin = rope_tables(config.rope, config.head_dim, positions, config.max_positions)
    return BlockContext(cos, sin, segment_ids, positions)


def context_of_block(context: BlockContext, index: Array) -> BlockContext:
    """The context with noise of the block's own."""
    if context.noise is None:
        return context
    return context._replace(noise=jax.vmap(jax.random.fold_in, (0, None))(context.noise, index))
