"""Parameters drawn at random, and what every part of a decoder uses: the norm and the soft cap."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from models.config import ModelConfig, NormProduct


def norm_weight(shape: tuple[int, ...], config: ModelConfig, dtype: jnp.dtype) -> nnx.Param:
    """The weight of a norm that changes nothing: ones, or zeros where the family adds one."""
    return nnx.Param(jnp.full(shape, 0.0 if config.norm_product == "offset" else 1.0, dtype))


def rms_norm(
    x: Float[Array, "*B D"], weight: Float[Array, "D"], eps: float, *, product: NormProduct = "rounded"
) -> Float[Array, "*B D"]:
    """`x` over its root mean square, times `weight`; float32 inside, the dtype of `x` outside.

    product: with the weight. `rounded`: of the rounded numbers, as in Llama. `wide`: in float32, rounded once (OLMo 2,
        gpt-oss). `offset`: with `1 + weight`, in float32 (Gemma): near one bfloat16 has steps of 2^-8, and weights are
        near zero.
    """
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    if product == "rounded":
        return weight * wide.astype(x.dtype)
    factor = weight.astype(jnp.float32) + (1.0 if product == "offset" else 0.0)
    return (wide * factor).astype(x.dtype)


def softcap(x: Float[Array, "*B"], cap: float) -> Float[Array, "*B"]:
    """`cap * tanh(x / cap)`: nearly `x` where it is small, never above `cap`. Source: Gemma 2 (arXiv 2408.00118)."""
    return cap * jnp.tanh(x / cap)


def parameter(rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, dtype: jnp.dtype) -> nnx.Param:
    return nnx.Param((jax.random.normal(rngs.params(), shape, jnp.float32) * fan_in**-0.5).astype(dtype))
