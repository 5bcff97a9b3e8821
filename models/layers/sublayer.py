"""Norms around a sublayer, and the factor of its output."""

from typing import Protocol

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from distillcache.models.config import ModelConfig
from distillcache.models.layers.norm import rms_norm


class Sublayer(Protocol):
    """norm and post_norm `[D]`: each exists if `config.norms` says so."""

    config: ModelConfig
    norm: nnx.Param
    post_norm: nnx.Param


def pre_norm(sublayer: Sublayer, resid: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """Compute the sublayer's input: the stream, normed unless the family norms outputs alone."""
    config = sublayer.config
    if config.norms == "post":
        return resid
    return rms_norm(resid, sublayer.norm[...], config.norm_eps, product=config.norm_product)


def post_norm(
    sublayer: Sublayer, out: Float[Array, "B T D"], bias: Float[Array, " D"] | None = None
) -> Float[Array, "B T D"]:
    """Compute the addition to the stream: the sublayer's output, normed and scaled if the family does so.

    Float32 inside, rounded once: bfloat16 would know a factor of 0.22 as 0.2197.

    Args:
        bias: added to the output first.
    """
    config, wide = sublayer.config, out.astype(jnp.float32)
    if bias is not None:
        wide = wide + bias
    if config.norms != "pre":
        wide = rms_norm(wide, sublayer.post_norm[...], config.norm_eps, product=config.norm_product)
    if config.residual_scale != 1:
        wide = wide * config.residual_scale
    return wide.astype(out.dtype)
