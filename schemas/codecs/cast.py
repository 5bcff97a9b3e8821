"""Codecs that store floats: as they are (bf16, f32), or narrowed to eight bits with a scale for each token (fp8)."""

from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from distillcache.schemas.codecs.parts import CodePart, Memoryless, within
from distillcache.schemas.codecs.scales import from_bf16_bits, reciprocal, to_bf16_bits

E4M3_MAX = 448.0  # the largest finite float8_e4m3fn (OCP 8-bit floating point, 2023)
# The largest bfloat16 that a token's largest code can be multiplied with: float32's largest over 448, rounded down.
LARGEST_SCALE = 2.0**119 * (1 + 18 / 128)


@dataclass(frozen=True)
class CastCodec(Memoryless):
    """Numbers stored as they are, in a float type. bf16 as its bits: zarr-python knows no bfloat16."""

    name: str
    dtype: str
    stored: str

    def parts(self, hidden: int) -> tuple[CodePart, ...]:
        return (CodePart("codes", self.stored, hidden, self.dtype if self.stored != self.dtype else None),)

    def encode(self, x: Float[Array, "*A D"]) -> dict[str, Array]:
        largest = float(jnp.finfo(self.dtype).max)  # a float32 above bfloat16's largest would be rounded to infinity
        kept = x if x.dtype == self.dtype else within(x, largest)
        return {"codes": jax.lax.bitcast_convert_type(kept.astype(self.dtype), jnp.dtype(self.stored))}

    def decode(self, parts: Mapping[str, Array]) -> Float[Array, "*A D"]:
        return jax.lax.bitcast_convert_type(parts["codes"], jnp.dtype(self.dtype))


@dataclass(frozen=True)
class Fp8Codec(Memoryless):
    """float8_e4m3fn bits, scaled so that each token's largest magnitude is the type's largest."""

    name: str = "fp8"

    def parts(self, hidden: int) -> tuple[CodePart, ...]:
        return CodePart("codes", "uint8", hidden, "float8_e4m3fn"), CodePart("scale", "uint16", 1, "bfloat16")

    def encode(self, x: Float[Array, "*A D"]) -> dict[str, Array]:
        wide = x.astype(jnp.float32)
        largest = jnp.max(jnp.abs(wide), -1, keepdims=True)
        stored = to_bf16_bits(within(largest / E4M3_MAX, LARGEST_SCALE))
        # Clamped: the scale is rounded, and e4m3fn turns what is above its largest number into NaN.
        scaled = jnp.clip(wide * reciprocal(from_bf16_bits(stored)), -E4M3_MAX, E4M3_MAX)
        return {
            "codes": jax.lax.bitcast_convert_type(scaled.astype(jnp.float8_e4m3fn), jnp.uint8),
            "scale": stored,
        }

    def decode(self, parts: Mapping[str, Array]) -> Float[Array, "*A D"]:
        numbers = jax.lax.bitcast_convert_type(parts["codes"], jnp.float8_e4m3fn).astype(jnp.float32)
        return numbers * from_bf16_bits(parts["scale"])
