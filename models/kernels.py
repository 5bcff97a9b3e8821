"""Attention proper: queries, keys and values to mixed values, by one of several kernels."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from models.config import BlockKind, ModelConfig
from models.context import BlockContext
from models.parameter import softcap


def attend(
    q: Float[Array, "B T H hd"],
    k: Float[Array, "B T K hd"],
    v: Float[Array, "B T K vd"],
    context: BlockContext,
    kind: BlockKind,
    config: ModelConfig,
    sinks: Float[Array, "H"] | None = None,
) -> Float[Array, "B T H vd"]:
    """Values mixed by the softmax of what queries and keys have in common, in the dtype of `q`.

    Args:
        sinks: a logit of every query head that takes part in the softmax and has no value.
    """
    mask = attention_mask(context, kind)
    if config.attention_softcap is None and sinks is None and q.shape[-1] == v.shape[-1]:
        return jax.nn.dot_product_attention(q, k, v, mask=mask, scale=config.attention_scale)
    return _written_out(q, k, v, mask, config, sinks)


def _written_out(
    q: Float[Array, "B T H hd"],
    k: Float[Array, "B T K hd"],
    v: Float[Array, "B T K vd"],
    mask: Bool[Array, "B 1 T T"],
    config: ModelConfig,
    sinks: Float[Array, "H"] | None,
) -> Float[Array, "B T H vd"]:
    """With what `jax.nn.dot_product_attention` does not know: soft caps, sinks, values of another width than keys."""
    batch, length, heads, width = q.shape
    kv_heads = k.shape[2]
    scale = width**-0.5 if config.attention_scale is None else config.attention_scale
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, width)
    logits = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32) * scale
    if config.attention_softcap is not None:
        logits = softcap(logits, config.attention_softcap)
    logits = jnp.where(mask[:, :, None], logits, -0.7 * jnp.finfo(jnp.float32).max)
    if sinks is not None:
        sink = sinks.astype(jnp.float32).reshape(kv_heads, heads // kv_heads, 1, 1)
        logits = jnp.concatenate([logits, jnp.broadcast_to(sink, (*logits.shape[:-1], 1))], axis=-1)
    shares = jax.nn.softmax(logits, axis=-1)[..., :length].astype(v.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", shares, v).reshape(batch, length, heads, v.shape[-1])


def attention_mask(context: BlockContext, kind: BlockKind) -> Bool[Array, "B 1 T T"]:
    """Causal, within a document, within the window and the chunk of the block.

    Padding (segment 0) sees padding: finite, and seen by no one.
    """
    segments, index = context.segment_ids, jnp.arange(context.segment_ids.shape[1])
    distance = index[:, None] - index[None, :]
    seen = (distance >= 0) if kind.window is None else (distance >= 0) & (distance < kind.window)
    seen = (segments[:, :, None] == segments[:, None, :]) & seen
    if kind.chunk is not None:
        run = context.positions // kind.chunk
        seen &= run[:, :, None] == run[:, None, :]
    return seen[:, None]
