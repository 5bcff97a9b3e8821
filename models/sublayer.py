"""What a sublayer does to the stream before and behind its own work: norms, and the factor of its output."""

from typing import Protocol

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.config import ModelConfig
from models.parameter import rms_norm


class Sublayer(Protocol):
    """norm and post_norm `[D]`: each is there where `config.norms` says so."""

    config: ModelConfig
    norm: nnx.Param
    post_norm: nnx.Param


def pre_norm(sublayer: Sublayer, resid: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """What the sublayer works on: the stream, normed unless the family norms outputs alone."""
    config = sublayer.config
    if config.norms == "post":
        return resid
    return rms_norm(resid, sublayer.norm[...], config.norm_eps, product=config.norm_product)


def post_norm(sublayer: Sublayer, out: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    """What is added to the stream: the sublayer's output, normed and multiplied where the family does."""
    config = sublayer.config
    if config.norms != "pre":
        out = rms_norm(out, sublayer.post_norm[...], config.norm_eps, product=config.norm_product)
    if config.residual_scale == 1:
        return out
    # In float32: bfloat16 knows 0.22 as 0.2197.
    return (out.astype(jnp.float32) * config.residual_scale).astype(out.dtype)
