"""Rotary position embedding: angles by position, and the scalings that stretch a model's context.

Source: RoFormer (arXiv 2104.09864); the scalings as HF transformers computes them in `modeling_rope_utils`
(linear and dynamic NTK; Llama 3's by wavelength; YaRN, arXiv 2309.00071). Usually halves are rotated (`x[:hd/2]` with
`x[hd/2:]`), the layout of most HF checkpoints.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from models.config import RopeConfig


def rope_tables(
    rope: RopeConfig, head_dim: int, positions: Int[Array, "B T"], max_positions: int
) -> tuple[Float[Array, "B T 1 hd"], Float[Array, "B T 1 hd"]]:
    """cos and sin of every token's angles, float32, each for both numbers that it turns: `[B, T, 1, rotated width]`.

    `dynamic` depends on the longest position of the whole call, as in transformers; the others do not.
    """
    width = rotated_width(rope, head_dim)
    if rope.kind == "dynamic":
        frequencies = _dynamic_frequencies(rope, width, positions, max_positions)
        amplitude = 1.0
    else:
        fixed, amplitude = _fixed_frequencies(rope, width)
        frequencies = jnp.asarray(fixed, jnp.float32)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    angles = jnp.repeat(angles, 2, axis=-1) if rope.interleaved else jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude


def rotated_width(rope: RopeConfig, head_dim: int) -> int:
    """How many of a head's numbers are rotated, the first ones; as transformers rounds it."""
    return int(head_dim * rope.fraction)


def rotate(
    x: Float[Array, "B T H hd"], cos: Float[Array, "B T 1 rd"], sin: Float[Array, "B T 1 rd"], rope: RopeConfig
) -> Float[Array, "B T H hd"]:
    """`x` turned by its token's angles, in the dtype of `x`; what lies beyond the rotated width passes."""
    width = cos.shape[-1]
    x, passed = x[..., :width], x[..., width:]
    if rope.interleaved:
        turned = jnp.stack([-x[..., 1::2], x[..., ::2]], axis=-1).reshape(x.shape)
    else:
        turned = jnp.concatenate([-x[..., width // 2 :], x[..., : width // 2]], axis=-1)
    rotated = x * cos.astype(x.dtype) + turned * sin.astype(x.dtype)
    return jnp.concatenate([rotated, passed], axis=-1) if passed.shape[-1] else rotated


def base_frequencies(theta: float, head_dim: int) -> np.ndarray:
    """`theta ** -(2i / head_dim)`, float32, `[head_dim / 2]`; as a quotient, so that it rounds as in transformers."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return (np.float32(1) / np.float32(theta) ** exponents).astype(np.float32)


def _fixed_frequencies(rope: RopeConfig, head_dim: int) -> tuple[np.ndarray, float]:
    frequencies = base_frequencies(rope.theta, head_dim)
    if rope.kind == "linear":
        return frequencies / np.float32(rope.factor), 1.0
    if rope.kind == "llama3":
        return llama3_frequencies(rope, frequencies), 1.0
    if rope.kind == "yarn":
        return _yarn_frequencies(rope, head_dim, frequencies), _yarn_amplitude(rope)
    return frequencies, 1.0


def llama3_frequencies(rope: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
    """Long wavelengths divided by `factor`, short ones kept, a linear blend between (Llama 3.1's model card).

    Llama 4 Scout has both factors 1: a step, with nothing between.
    """
    wavelength = 2 * math.pi / frequencies
    original = rope.original_max_positions
    width = rope.high_freq_factor - rope.low_freq_factor
    blend = (original / wavelength - rope.low_freq_factor) / (width or 1.0)
    blended = (1 - blend) * frequencies / rope.factor + blend * frequencies
    scaled = np.where(wavelength > original / rope.low_freq_factor, frequencies / rope.factor, frequencies)
    between = (wavelength <= original / rope.low_freq_factor) & (wavelength >= original / rope.high_freq_factor)
    return np.where(between, blended, scaled).astype(np.float32)


def _yarn_frequencies(rope: RopeConfig, head_dim: int, frequencies: np.ndarray) -> np.ndarray:
    def dimension_of(rotations: float) -> float:
        return (head_dim * math.log(rope.original_max_positions / (rotations * 2 * math.pi))) / (
            2 * math.log(rope.theta)
        )

    low, high = dimension_of(rope.beta_fast), dimension_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = 0.001 if low == high else high - low
    ramp = np.clip((np.arange(head_dim // 2, dtype=np.float32) - low) / width, 0, 1)
    return (frequencies / rope.factor * ramp + frequencies * (1 - ramp)).astype(np.float32)


def _yarn_amplitude(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


def _dynamic_frequencies(rope: RopeConfig, head_dim: int, positions: Int[Array, "B T"], max_positions: int) -> Array:
    longest = jnp.max(positions) + 1
    stretch = rope.factor * jnp.maximum(longest, max_positions).astype(jnp.float32) / max_positions - (rope.factor - 1)
    theta = rope.theta * stretch ** (head_dim / (head_dim - 2))
    stretched = 1.0 / theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    # Within the trained length the frequencies are the plain ones, to the bit.
    return jnp.where(longest <= max_positions, base_frequencies(rope.theta, head_dim), stretched)
