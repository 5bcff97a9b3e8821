"""Integer codecs: a group of numbers shares a scale and a *shape*, and every number is one of 255 or 16 levels.

The levels of a shape lie closer together near zero, as the numbers of a group do: with `u` in [-1, 1] the code over the
largest code, the level is `(2 u + u^3) / 3` in shape 0 and `(9 u + u^3) / 10`, nearly even, in shape 1. The encoder
tries a few scales in both shapes on every group and keeps what has the least squared error; int4 gains by cutting the
largest numbers of a group, since all the others come out finer.

Cosine distances on SmolLM2, rotated (`attn_out`; `resid` as differences without keyframes; `mlp_out` derived of both),
over two rows of 512 tokens; both shapes have as many bits a number as even levels have:

    int8    even levels, groups of 64, bfloat16 scales    1.55e-5    2.53e-6    1.61e-4
    int8    both shapes, groups of 32, shared scales      1.18e-5    1.98e-6    1.60e-4
    int4    even levels, groups of 64, 11 scales tried    4.06e-3
    int4    both shapes, groups of 32, shared scales      2.75e-3    4.62e-4    1.18e-2

Levels are whole numbers of at most 20 bits and scales have 4, so `level * scale` is exact in float32: decoding gives
the same bits in every program, with or without fused multiply-add. Delta coding rests on that.

    shape 0    level = c * (20 m^2 + 10 c^2)       c: int8 -127..127, m = 127, the bracket over 64, rounded
    shape 1    level = c * (27 m^2 +  3 c^2)          int4 2 * code - 15 (odd), m = 15; no zero among the levels

Every finite number has a finite code: those beyond 2^120 (1.3e36) are coded as that, and what is below about 1e-31 may
become zero. A NaN or infinity makes its whole token NaN, so that it cannot pass unseen.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from distillcache.schemas.codecs.parts import CodePart, Memoryless, within
from distillcache.schemas.codecs.rotate import Rotation
from distillcache.schemas.codecs.scales import from_shared, reciprocal, short_above, short_value, to_shared
from distillcache.schemas.errors import ConfigError

# (linear, cubic): the level is proportional to linear * u + cubic * u^3; both shapes end at the same level.
SHAPES = ((20, 10), (27, 3))
# The inverses, from level to u, as odd polynomials: minimax fits, wrong by less than 0.05 of an int8 code.
INVERSES = (
    (1.4949293, -1.4749636, 2.8249078, -3.8379066, 2.8471714, -0.85445943),
    (1.1109179, -0.14949741, 0.050247762, -0.011688441),
)
# The largest number: rotated it may be 2^3.5 times as large, a difference of two twice that, and the reciprocal of the
# scale must be a normal number still. Builds refuse numbers far below it, whose squares overflow.
LARGEST = 2.0**120


def default_group(hidden: int) -> int:
    """32, which costs 0.26 bits a number, where it divides the hidden size; otherwise 0, the whole token."""
    return 32 if hidden % 32 == 0 else 0


@dataclass(frozen=True)
class Quantiser(Memoryless):
    """The numbers are rotated, then coded in groups. Parts: codes, and scale uint8 `[*A, 1 + n]` (scales.to_shared).

    group: numbers that share a scale; 0: the whole token; None: `default_group`.
    """

    group: int | None = None
    rotation: Rotation = field(default_factory=Rotation)

    name: ClassVar[str]
    largest_code: ClassVar[int]  # m
    level_shift: ClassVar[int]  # keeps levels within 20 bits
    trials: ClassVar[tuple[tuple[int, int], ...]]  # (shape, steps below the scale that covers the largest number)

    def groups(self, hidden: int) -> int:
        """The number of scales of a token."""
        size = (default_group(hidden) if self.group is None else self.group) or hidden
        if hidden % size:
            raise ConfigError(
                "a codec's groups do not fit the hidden size",
                {"codec": self.name, "group": size, "hidden size": hidden},
                "choose a group that divides it, or 0 for one scale a token",
            )
        return hidden // size

    def encode(self, x: Float[Array, "*A D"]) -> dict[str, Array]:
        return self.quantise(self.rotated(x))

    def decode(self, parts: Mapping[str, Array]) -> Float[Array, "*A D"]:
        return self.rotation.backward(self.restore(parts))

    def rotated(self, x: Float[Array, "*A D"]) -> Float[Array, "*A D"]:
        """The numbers that are coded: float32, clamped to `LARGEST`, rotated."""
        return self.rotation.forward(within(x.astype(jnp.float32), LARGEST))

    def quantise(self, y: Float[Array, "*A D"]) -> dict[str, Array]:
        """Rotated numbers to parts."""
        grouped = self._grouped(y)
        largest = jnp.max(jnp.abs(grouped), -1)
        # A maximum may pass over NaN, a sum cannot; scaled down, since the sum of finite numbers could overflow.
        finite = jnp.isfinite(jnp.sum(jnp.abs(y) * 2.0**-64, -1, keepdims=True))
        stored = to_shared(*self._search(grouped, jnp.where(finite, largest, 0)), finite)
        scale, shape = from_shared(stored)
        signed = _spread(jnp.where(shape, -1, 1) * reciprocal(scale) / self._level_max, y.shape[-1])
        ends = y * jnp.abs(signed)
        codes = jnp.where(signed < 0, self._codes(ends, 1), self._codes(ends, 0))
        return {"codes": self.pack(codes), "scale": stored}

    def restore(self, parts: Mapping[str, Array]) -> Float[Array, "*A D"]:
        """Parts to rotated numbers; exact, so every program gets the same bits."""
        codes = self.unpack(parts["codes"])
        scale, shape = from_shared(parts["scale"])
        signed = _spread(jnp.where(shape, -scale, scale), codes.shape[-1])
        linear, cubic = (jnp.where(signed < 0, second, first) for first, second in zip(*SHAPES, strict=True))
        return self._levels(codes, linear, cubic) * jnp.abs(signed)

    @abstractmethod
    def parts(self, hidden: int) -> tuple[CodePart, ...]: ...

    @abstractmethod
    def hidden(self, width: int) -> int:
        """D, from the width of the codes."""
        ...

    @abstractmethod
    def pack(self, codes: Int[Array, "*A D"]) -> Int[Array, "*A W"]:
        """Codes as they are stored."""
        ...

    @abstractmethod
    def unpack(self, stored: Int[Array, "*A W"]) -> Int[Array, "*A D"]:
        """Undo `pack`; returns int32."""
        ...

    @abstractmethod
    def round_code(self, wanted: Float[Array, "*A"]) -> Int[Array, "*A"]:
        """The nearest code there is, int32."""
        ...

    @property
    def _level_max(self) -> float:
        return float(self.largest_code * self._bracket(self.largest_code, *SHAPES[0]))

    def _bracket(self, c: Int[Array, "*A"] | int, linear: Array | int, cubic: Array | int) -> Int[Array, "*A"] | int:
        half = (1 << self.level_shift) >> 1
        return (linear * self.largest_code**2 + cubic * c * c + half) >> self.level_shift

    def _levels(self, c: Int[Array, "*A"], linear: Array | int, cubic: Array | int) -> Float[Array, "*A"]:
        return (c * self._bracket(c, linear, cubic)).astype(jnp.float32)

    def _codes(self, ends: Float[Array, "*A"], shape: int) -> Int[Array, "*A"]:
        """The codes whose levels are nearest; ends: levels over the largest one."""
        ends = jnp.clip(ends, -1, 1)
        square, total = ends * ends, jnp.zeros_like(ends)
        for factor in reversed(INVERSES[shape]):
            total = total * square + factor
        return self.round_code(total * ends * self.largest_code)

    def _search(self, grouped: Float[Array, "*A n G"], largest: Float[Array, "*A n"]) -> tuple[Array, Array]:
        """The best of the trials: short scales int32 [*A, n] (scales.py), and whether they are of shape 1."""
        cover = short_above(largest / self._level_max)
        # Errors are compared relative to the covering scale: squares of the numbers themselves could overflow.
        ends = grouped * (reciprocal(short_value(cover)) / self._level_max)[..., None]
        best, shape, least = cover, jnp.zeros(cover.shape, bool), jnp.full(cover.shape, jnp.inf)
        for tried, steps in self.trials:
            ratio = (short_value(cover - steps) * reciprocal(short_value(cover)))[..., None]
            codes = self._codes(ends * reciprocal(ratio), tried)
            error = _group_sums(jnp.square(self._levels(codes, *SHAPES[tried]) * (ratio / self._level_max) - ends))
            better = error < least
            best, shape = jnp.where(better, cover - steps, best), jnp.where(better, tried == 1, shape)
            least = jnp.minimum(error, least)
        return jnp.maximum(best, 0), shape

    def _grouped(self, y: Array) -> Array:
        count = self.groups(y.shape[-1])
        return y.reshape(*y.shape[:-1], count, y.shape[-1] // count)


def _group_sums(squares: Float[Array, "*A n G"]) -> Float[Array, "*A n"]:
    """Sums over the last axis, as a product: XLA on CPU is ten times slower at two sums in one fusion."""
    return jnp.matmul(squares, jnp.ones(squares.shape[-1]), precision="highest")


def _spread(per_group: Float[Array, "*A n"], hidden: int) -> Float[Array, "*A D"]:
    """Each group's number for each of its members: exactly, though by a product.

    A broadcast would be fused into the write of the codes, where XLA on CPU then finds the group of every single number
    by division: 15 ms instead of 1 for 2.4 million numbers.
    """
    count = per_group.shape[-1]
    members = jnp.repeat(jnp.eye(count, dtype=jnp.float32), hidden // count, axis=1)
    return jnp.matmul(per_group, members, precision="highest")


@dataclass(frozen=True)
class Int8Codec(Quantiser):
    """codes int8 `[*A, D]`."""

    name: ClassVar[str] = "int8"
    largest_code: ClassVar[int] = 127
    level_shift: ClassVar[int] = 6
    trials: ClassVar[tuple[tuple[int, int], ...]] = ((0, 0), (1, 0))  # cutting gains 1% here

    def parts(self, hidden: int) -> tuple[CodePart, ...]:
        return CodePart("codes", "int8", hidden), CodePart("scale", "uint8", 1 + self.groups(hidden))

    def hidden(self, width: int) -> int:
        return width

    def pack(self, codes: Int[Array, "*A D"]) -> Int[Array, "*A D"]:
        return codes.astype(jnp.int8)

    def unpack(self, stored: Int[Array, "*A D"]) -> Int[Array, "*A D"]:
        return stored.astype(jnp.int32)

    def round_code(self, wanted: Float[Array, "*A"]) -> Int[Array, "*A"]:
        return jnp.round(jnp.clip(wanted, -127, 127)).astype(jnp.int32)


@dataclass(frozen=True)
class Int4Codec(Quantiser):
    """codes uint8 `[*A, D/2]`: number i in the lower half of a byte, number i + D/2 in the upper half.

    Halves are joined 15% faster than pairs are interleaved.
    """

    name: ClassVar[str] = "int4"
    largest_code: ClassVar[int] = 15
    level_shift: ClassVar[int] = 0
    trials: ClassVar[tuple[tuple[int, int], ...]] = (
        *((0, step) for step in range(4)),
        *((1, step) for step in range(4)),
    )

    def parts(self, hidden: int) -> tuple[CodePart, ...]:
        if hidden % 2:
            raise ConfigError("int4 stores numbers in pairs", {"hidden size": hidden}, "choose int8")
        return CodePart("codes", "uint8", hidden // 2), CodePart("scale", "uint8", 1 + self.groups(hidden))

    def hidden(self, width: int) -> int:
        return 2 * width

    def pack(self, codes: Int[Array, "*A D"]) -> Int[Array, "*A W"]:
        halves = ((codes + 15) >> 1).astype(jnp.float32).reshape(*codes.shape[:-1], 2, codes.shape[-1] // 2)
        # A product, exact: slices would be fused into the search for the codes, which XLA on CPU then does in 17 ms
        # instead of 3 for 2.4 million numbers.
        return jnp.matmul(jnp.array([[1.0, 16.0]]), halves, precision="highest")[..., 0, :].astype(jnp.uint8)

    def unpack(self, stored: Int[Array, "*A W"]) -> Int[Array, "*A D"]:
        return 2 * jnp.concatenate([stored & 15, stored >> 4], -1).astype(jnp.int32) - 15

    def round_code(self, wanted: Float[Array, "*A"]) -> Int[Array, "*A"]:
        return 2 * jnp.floor(jnp.clip(wanted, -15, 14) / 2).astype(jnp.int32) + 1
