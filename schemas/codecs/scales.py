"""Storage of scales: as bfloat16 bits, or as one byte a group with one shared exponent a token.

Scales are float32, zero or normal. NaN marks what was not finite.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8, UInt16

SMALLEST_SCALE = float(np.finfo(np.float32).tiny)  # smaller ones are denormal, which some backends read as zero
MANTISSA_BITS = 3  # of a short scale; four would gain 3% in squared error and leave too few octaves
SHORT_SHIFT = 23 - MANTISSA_BITS
STEPS_PER_OCTAVE = 1 << MANTISSA_BITS
TOP_STEP = 127  # a byte holds a flag and seven bits of scale, so 16 octaves
NOT_FINITE = 255  # the exponent of float32's NaN and infinities


def to_bf16_bits(scale: Float[Array, "*A n"]) -> UInt16[Array, "*A n"]:
    """The nearest bfloat16; denormal scales become zero, all that is not finite becomes NaN."""
    kept = jnp.where(jnp.isfinite(scale), jnp.where(scale < SMALLEST_SCALE, 0, scale), jnp.nan)
    return jax.lax.bitcast_convert_type(kept.astype(jnp.bfloat16), jnp.uint16)


def from_bf16_bits(bits: UInt16[Array, "*A n"]) -> Float[Array, "*A n"]:
    """The scales that `to_bf16_bits` stored."""
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16).astype(jnp.float32)


def reciprocal(scale: Float[Array, "*A n"]) -> Float[Array, "*A n"]:
    """`1 / scale`, and 0 for a scale of zero."""
    return jnp.where(scale == 0, 0, 1 / jnp.where(scale == 0, 1, scale))


def short_above(scale: Float[Array, "*A n"]) -> Int[Array, "*A n"]:
    """The smallest short scale that is not below a finite scale: the first 11 bits after float32's sign, as an int.

    One more or less is one step of the scale, a 16th to an 8th of it.
    """
    bits = jax.lax.bitcast_convert_type(scale, jnp.int32)
    return (bits + ((1 << SHORT_SHIFT) - 1)) >> SHORT_SHIFT


def short_value(short: Int[Array, "*A n"]) -> Float[Array, "*A n"]:
    """A short scale's value; zero below the normal numbers. Four significant bits."""
    value = jax.lax.bitcast_convert_type(short << SHORT_SHIFT, jnp.float32)
    return jnp.where(short < STEPS_PER_OCTAVE, 0, value)


def to_shared(
    short: Int[Array, "*A n"], flag: Bool[Array, "*A n"], finite: Bool[Array, "*A 1"]
) -> UInt8[Array, "*A m"]:
    """Short scales as `m = 1 + n` bytes: the exponent of the token's largest, then a byte a group.

    A byte's lower seven bits count steps, with the token's largest octave at 120-127; zero is a scale of zero, and what
    lies more than 16 octaves below the largest is raised to step 1. The upper bit is a flag that the codec is free to
    use.

    Args:
        finite: whether the token's numbers are.
    """
    top = jnp.max(short, -1, keepdims=True) >> MANTISSA_BITS
    steps = jnp.clip(short - _first(top), 1, TOP_STEP)
    steps = jnp.where(short < STEPS_PER_OCTAVE, 0, steps) | (flag.astype(jnp.int32) << 7)
    return jnp.concatenate([jnp.where(finite, top, NOT_FINITE), steps], -1).astype(jnp.uint8)


def from_shared(stored: UInt8[Array, "*A m"]) -> tuple[Float[Array, "*A n"], Bool[Array, "*A n"]]:
    """The scales of a token's groups, all NaN if its numbers were not finite, and the flags."""
    top, steps = stored[..., :1].astype(jnp.int32), (stored[..., 1:] & 127).astype(jnp.int32)
    scale = jnp.where(steps == 0, 0, short_value(jnp.maximum(steps + _first(top), 0)))
    return jnp.where(top == NOT_FINITE, jnp.nan, scale), stored[..., 1:] > 127


def _first(top: Int[Array, "*A 1"]) -> Int[Array, "*A 1"]:
    """The short scale of step 0."""
    return (top + 1) * STEPS_PER_OCTAVE - (TOP_STEP + 1)
