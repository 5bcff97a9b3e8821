"""Values about the rows that all blocks of a decoder share."""

from typing import NamedTuple

import jax
from jaxtyping import Array, Float, Int

from distillcache.models.config import BlockKind, ModelConfig
from distillcache.models.layers.rope import rope_tables

Taken = tuple[tuple[Array, Array], tuple[Array, Array]]


class BlockContext(NamedTuple):
    """Inputs that every block needs about the rows: attention masks, positions and rotary angles.

    local_cos, local_sin: of the blocks that rotate by `ModelConfig.local_rope`; None where there is none.
    noise: in training with `MoeConfig.jitter`, a PRNG key for
    each row, `[B]`. bias_groups: `[B]`, which of several router biases a row's tokens are routed with. taken: keys and
    values [B, T, K, hd] that blocks may take over, those of plain and of wide heads. inputs: of all blocks
    (`BlockInputs`), [B, T, L, P]; of one block [B, T, P]. choice: [B, T, T], the keys that each query may attend to
    beside what masks say.
    """

    cos: Float[Array, "B T 1 hd"]
    sin: Float[Array, "B T 1 hd"]
    segment_ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    noise: Array | None = None
    bias_groups: Int[Array, " B"] | None = None
    local_cos: Float[Array, "B T 1 hd"] | None = None
    local_sin: Float[Array, "B T 1 hd"] | None = None
    taken: Taken | None = None
    inputs: Array | None = None
    choice: Array | None = None


def block_context(config: ModelConfig, positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"]) -> BlockContext:
    """Compute the inputs that the blocks of a decoder share; once, outside the scan."""
    cos, sin = rope_tables(config.rope, config.rope_dim, positions, config.max_positions, segment_ids)
    context = BlockContext(cos, sin, segment_ids, positions)
    if config.local_rope is None:
        return context
    width = config.rope_dim if config.wide is None else config.head_dim
    cos, sin = rope_tables(config.local_rope, width, positions, config.max_positions, segment_ids)
    return context._replace(local_cos=cos, local_sin=sin)


def angles_of(context: BlockContext, kind: BlockKind) -> tuple[Float[Array, "B T 1 hd"], Float[Array, "B T 1 hd"]]:
    """cos and sin by which blocks of this kind rotate."""
    if not kind.local_rope:
        return context.cos, context.sin
    if context.local_cos is None or context.local_sin is None:
        raise ValueError("blocks rotate by ModelConfig.local_rope, and there is none")
    return context.local_cos, context.local_sin


def taken_of(context: BlockContext, kind: BlockKind) -> tuple[Array, Array]:
    """Keys and values that a block of this kind takes over."""
    if context.taken is None:
        raise ValueError("a block takes keys and values over, and there are none")
    return context.taken[kind.wide]


def context_of_block(context: BlockContext, index: Array) -> BlockContext:
    """The context with noise and inputs of the block's own."""
    if context.noise is not None:
        context = context._replace(noise=jax.vmap(jax.random.fold_in, (0, None))(context.noise, index))
    if context.inputs is not None:
        context = context._replace(inputs=jax.lax.dynamic_index_in_dim(context.inputs, index, 2, keepdims=False))
    return context
