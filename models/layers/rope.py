"""Rotary position embedding: angles by position, and the scalings that stretch a model's context.

Source: RoFormer (arXiv 2104.09864); the scalings as HF transformers computes them in `modeling_rope_utils`
(linear and dynamic NTK; Llama 3's by wavelength; YaRN, arXiv 2309.00071; LongRoPE, arXiv 2402.13753). Usually halves
are rotated (`x[:hd/2]` with `x[hd/2:]`), the layout of most HF checkpoints.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from distillcache.models.config import ModelConfig, RopeConfig

LENGTH_KINDS = ("dynamic", "longrope")


def rope_tables(
    rope: RopeConfig,
    head_dim: int,
    positions: Int[Array, "B T"],
    max_positions: int,
    segment_ids: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T 1 hd"], Float[Array, "B T 1 hd"]]:
    """cos and sin of every token's angles, float32, each for both numbers that it turns: `[B, T, 1, rotated width]`.

    `dynamic` and `longrope` depend on how long the token's document is. Transformers takes the longest of the whole
    call; here a row's numbers do not depend on its neighbours, and a document is given what it is given alone.

    Args:
        segment_ids: documents of the rows; None: each row is one.
    """
    width = rotated_width(rope, head_dim)
    if rope.kind in LENGTH_KINDS:
        lengths = _document_lengths(positions, segment_ids)[..., None, None]
        if rope.kind == "dynamic":
            frequencies, amplitude = _dynamic_frequencies(rope, width, lengths, max_positions), 1.0
        else:
            frequencies, amplitude = _long_frequencies(rope, width, lengths), _long_amplitude(rope)
    else:
        fixed, amplitude = _fixed_frequencies(rope, width)
        frequencies = jnp.asarray(fixed, jnp.float32)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    angles = jnp.repeat(angles, 2, axis=-1) if rope.interleaved else jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles) * amplitude, jnp.sin(angles) * amplitude


def context_length(config: ModelConfig) -> int:
    """The longest document, in tokens, that a decoder is made for, as its config states it.

    That is `max_position_embeddings`, which states the stretched length where the kind is `llama3` or `longrope`, and
    in Gemma 3 (blocks with a rotary table of their own). With `linear` and `dynamic` it is that times the factor, with
    `yarn` the original length times the factor, unless `max_position_embeddings` is more. Source: how transformers and
    vLLM read these configs.
    """
    rope, stated = config.rope, config.max_positions
    if rope.kind in ("linear", "dynamic") and config.local_rope is None:
        return max(stated, int(stated * rope.factor))
    if rope.kind == "yarn":
        return max(stated, int(rope.original_max_positions * rope.factor))
    return stated


def rotated_width(rope: RopeConfig, head_dim: int) -> int:
    """Return the count of rotated dimensions of a head, which come first; rounded as in transformers. Where frequencies
    are `proportional`, all are, of which those behind the fraction by nothing."""
    return head_dim if rope.kind == "proportional" else int(head_dim * rope.fraction)


def rotate(
    x: Float[Array, "B T H hd"], cos: Float[Array, "B T 1 rd"], sin: Float[Array, "B T 1 rd"], rope: RopeConfig
) -> Float[Array, "B T H hd"]:
    """`x` rotated by its token's angles, float32 inside, rounded once to the dtype of `x`; dimensions beyond the
    rotated width are copied.
    """
    width, dtype = cos.shape[-1], x.dtype
    x, passed = x[..., :width].astype(jnp.float32), x[..., width:]
    if rope.interleaved:
        turned = jnp.stack([-x[..., 1::2], x[..., ::2]], axis=-1).reshape(x.shape)
    else:
        turned = jnp.concatenate([-x[..., width // 2 :], x[..., : width // 2]], axis=-1)
    rotated = (x * cos + turned * sin).astype(dtype)
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
    if rope.kind == "proportional":  # those of the whole head, of which the last are 0
        turned = np.arange(head_dim // 2) < int(rope.fraction * head_dim // 2)
        return np.where(turned, frequencies / np.float32(rope.factor), np.float32(0)), 1.0
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


def _document_lengths(positions: Int[Array, "B T"], segment_ids: Int[Array, "B T"] | None) -> Int[Array, "B T"]:
    """Return the length in positions of every token's document: its last position plus 1. Rows are compared with
    themselves, as in a mask.
    """
    if segment_ids is None:
        return jnp.broadcast_to(jnp.max(positions, axis=1, keepdims=True) + 1, positions.shape)
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return jnp.max(jnp.where(same, positions[:, None, :], 0), axis=-1) + 1


def _dynamic_frequencies(
    rope: RopeConfig, head_dim: int, lengths: Int[Array, "B T 1 1"], max_positions: int
) -> Float[Array, "B T 1 half"]:
    stretch = rope.factor * jnp.maximum(lengths, max_positions).astype(jnp.float32) / max_positions - (rope.factor - 1)
    theta = rope.theta * stretch ** (head_dim / (head_dim - 2))
    stretched = 1.0 / theta ** (jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    # Within the trained length the frequencies are the plain ones, to the bit.
    return jnp.where(lengths <= max_positions, base_frequencies(rope.theta, head_dim), stretched)


def _long_frequencies(rope: RopeConfig, head_dim: int, lengths: Int[Array, "B T 1 1"]) -> Float[Array, "B T 1 half"]:
    """Each frequency over a factor of its own: by one list within the trained length, by another beyond."""
    powers = np.float32(rope.theta) ** (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim))
    short, long = (
        (np.float32(1) / (np.asarray(factors, np.float32) * powers)).astype(np.float32)
        for factors in (rope.short_factor, rope.long_factor)
    )
    return jnp.where(lengths > rope.original_max_positions, long, short)


def _long_amplitude(rope: RopeConfig) -> float:
    """For documents of all lengths, as in transformers."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    return 1.0 if rope.factor <= 1 else math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_positions))
