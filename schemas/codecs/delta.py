"""Delta coding: a slot is coded as its difference from the *decoded* slot before it.

The residual stream changes little from block to block, so differences are small and so are their errors. The loop is
closed: the encoder subtracts what the decoder will have, so a slot's error is that of its own difference, and errors do
not add up however many slots there are.

The decoded stream is carried in the rotated domain. There only exact products and sums of float32 occur, in the same
order in encoder and decoder, so both carry the same bits.

A *keyframe* needs no other slot: it is coded from zero, twice: its code, then in `key` the int8 code of what the first
left over. That costs less than bfloat16 and is far closer, since a keyframe is as large as the stream itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from distillcache.schemas.codecs.parts import CodePart, take_slot
from distillcache.schemas.codecs.quantise import Int8Codec, Quantiser

KEY_PARTS = {"codes": "key", "scale": "key_scale"}  # the int8 codec's names of parts, and a keyframe's


@dataclass(frozen=True)
class DeltaCodec:
    """Codes a tap's slots as differences. The carry is the decoded slot before, rotated: float32 `[*A, D]`.

    inner: codes the differences, and what it leaves of a keyframe is coded in groups of the same size.
    keyframe_every: slots from one keyframe to the next; 0: no keyframes, slot 0 is a difference from zero.
    """

    inner: Quantiser
    keyframe_every: int = 8

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def _rest(self) -> Int8Codec:
        return Int8Codec(self.inner.group)

    def parts(self, hidden: int) -> tuple[CodePart, ...]:
        inner = self.inner.parts(hidden)
        if not self.keyframe_every:
            return inner
        key = (replace(part, name=KEY_PARTS[part.name], every=self.keyframe_every) for part in self._rest.parts(hidden))
        return *inner, *key

    def first_slot(self, slot: int) -> int:
        return slot - slot % self.keyframe_every if self.keyframe_every else 0

    def start(self, shape: tuple[int, ...]) -> Float[Array, "*A D"]:
        return jnp.zeros(shape, jnp.float32)

    def encode_slot(
        self, carry: Float[Array, "*A D"], x: Float[Array, "*A D"], slot: Int[Array, ""] | int
    ) -> tuple[Float[Array, "*A D"], dict[str, Array]]:
        y = self.inner.rotated(x)
        before = self._before(carry, slot)
        parts = self.inner.quantise(y - before)
        coded = before + self.inner.restore(parts)
        if not self.keyframe_every:
            return coded, parts

        def with_rest() -> tuple[Array, dict[str, Array]]:
            rest = self._rest.quantise(y - coded)
            return coded + self._rest.restore(rest), {KEY_PARTS[name]: part for name, part in rest.items()}

        def without_rest() -> tuple[Array, dict[str, Array]]:
            rest = self._rest.parts(coded.shape[-1])
            zeros = {KEY_PARTS[part.name]: jnp.zeros((*coded.shape[:-1], part.width), part.dtype) for part in rest}
            return coded, zeros

        carry, key = jax.lax.cond(jnp.asarray(slot) % self.keyframe_every == 0, with_rest, without_rest)
        return carry, parts | key

    def decode_slot(
        self, carry: Float[Array, "*A D"], parts: Mapping[str, Array], slot: Int[Array, ""] | int
    ) -> tuple[Float[Array, "*A D"], Float[Array, "*A D"]]:
        carry = self._before(carry, slot) + self.inner.restore(parts)
        if self.keyframe_every:
            carry = jax.lax.cond(
                jnp.asarray(slot) % self.keyframe_every == 0,
                lambda: carry + self._rest.restore({name: parts[key] for name, key in KEY_PARTS.items()}),
                lambda: carry,
            )
        return carry, self.inner.rotation.backward(carry)

    def encode(self, x: Float[Array, "S *A D"]) -> dict[str, Array]:
        """All slots of a tap, on axis 0."""

        def body(carry: Array, step: tuple[Array, Array]) -> tuple[Array, dict[str, Array]]:
            return self.encode_slot(carry, step[1], step[0])

        _, stacks = jax.lax.scan(body, self.start(x.shape[1:]), (jnp.arange(x.shape[0]), x))
        return {part.name: stacks[part.name][:: part.every] for part in self.parts(x.shape[-1])}

    def decode(self, parts: Mapping[str, Array]) -> Float[Array, "S *A D"]:
        """All slots of a tap, on axis 0."""
        hidden = self.inner.hidden(parts["codes"].shape[-1])
        meta = self.parts(hidden)

        def body(carry: Array, slot: Array) -> tuple[Array, Array]:
            return self.decode_slot(carry, take_slot(parts, meta, slot), slot)

        shape = (*parts["codes"].shape[1:-1], hidden)
        return jax.lax.scan(body, self.start(shape), jnp.arange(parts["codes"].shape[0]))[1]

    def _before(self, carry: Float[Array, "*A D"], slot: Int[Array, ""] | int) -> Float[Array, "*A D"]:
        """The values that the slot's difference is taken from: zeros at a keyframe."""
        if not self.keyframe_every:
            return carry
        return jnp.where(jnp.asarray(slot) % self.keyframe_every == 0, 0, carry)
