"""Random initialisation of parameters, and functions that every part of a decoder uses: the norm and the soft cap."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from distillcache.models.config import ModelConfig, NormProduct


def norm_weight(shape: tuple[int, ...], config: ModelConfig, dtype: jnp.dtype) -> nnx.Param:
    """The weight of a norm that changes nothing: ones, or zeros where the family adds one."""
    return nnx.Param(jnp.full(shape, 0.0 if config.norm_product == "offset" else 1.0, dtype))


def rms_norm(
    x: Float[Array, "*B D"], weight: Float[Array, " D"], eps: float, *, product: NormProduct = "wide"
) -> Float[Array, "*B D"]:
    """`x` over its root mean square, times `weight`; float32 inside, rounded once to the dtype of `x`.

    product: `wide`: with the weight. `offset`: with `1 + weight` (Gemma): near one bfloat16 has steps of 2^-8, and
        weights are near zero. `centred`: with the weight, of numbers less their mean (LayerNorm without a bias).
    """
    wide = x.astype(jnp.float32)
    if product == "centred":
        wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    factor = weight.astype(jnp.float32) + (1.0 if product == "offset" else 0.0)
    return (wide * factor).astype(x.dtype)


def softcap(x: Float[Array, "*B"], cap: float) -> Float[Array, "*B"]:
    """`cap * tanh(x / cap)`: nearly `x` where it is small, never above `cap`; float32 inside, rounded once.

    Source: Gemma 2 (arXiv 2408.00118).
    """
    return (cap * jnp.tanh(x.astype(jnp.float32) / cap)).astype(x.dtype)


def parameter(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, dtype: jnp.dtype) -> nnx.Param:
    return nnx.Param((jax.random.normal(rngs.params(), shape, jnp.float32) * fan_in**-0.5).astype(dtype))
