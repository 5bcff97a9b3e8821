"""Interface of a codec, and the slot interface of one that codes every slot by itself."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Carry = Any  # what a codec hands on from slot to slot: a pytree of arrays, or None


def within(x: Float[Array, "*A"], largest: float) -> Float[Array, "*A"]:
    """Finite numbers clamped to +-`largest`; NaN and infinities as they are, so that they stay seen."""
    return jnp.where(jnp.isfinite(x), jnp.clip(x, -largest, largest), x)


@dataclass(frozen=True)
class CodePart:
    """One stored array of a codec.

    name: `codes` is stored under the tap's own name, any other part under `<tap>.<name>`.
    dtype: of the stored array. bits_of: the dtype whose bits a uint array holds, if any. width: its last axis.
    every: the part exists only for the stored slots divisible by this number; of S slots, ceil(S / every).
    """

    name: str
    dtype: str
    width: int
    bits_of: str | None = None
    every: int = 1

    def slots(self, slots: int) -> int:
        """Return the number of slots of this part if the tap stores `slots`."""
        return -(-slots // self.every)


class Codec(Protocol):
    """All methods are pure and traceable.

    Slots are numbered as they are stored: 0 for the first of a tap, whichever block it belongs to. A scan over slots
    uses `start`, then `encode_slot` or `decode_slot` on slot 0, 1, 2, ...; it may also begin at any slot that
    `first_slot` returns. Codecs without memory have the carry None and accept the slots in any order.
    """

    @property
    def name(self) -> str:
        """As `get_codec` knows it."""
        ...

    def parts(self, hidden: int) -> tuple[CodePart, ...]:
        """The arrays that a tap of `hidden` numbers a token is stored in.

        Raises:
            ConfigError: the codec's groups do not fit this size.
        """
        ...

    def encode(self, x: Float[Array, "*A D"]) -> dict[str, Array]:
        """Numbers to parts; for a codec with memory the first axis is the slots."""
        ...

    def decode(self, parts: Mapping[str, Array]) -> Float[Array, "*A D"]:
        """Decode parts to numbers: the input of `encode` within the codec's precision."""
        ...

    def first_slot(self, slot: int) -> int:
        """The slot at which a scan must begin that wants to decode `slot`."""
        ...

    def start(self, shape: tuple[int, ...]) -> Carry:
        """The carry before the first slot, for slots of `shape` `[*A, D]`."""
        ...

    def encode_slot(
        self, carry: Carry, x: Float[Array, "*A D"], slot: Int[Array, ""] | int
    ) -> tuple[Carry, dict[str, Array]]:
        """The parts of one slot. A part that does not exist for this slot (`CodePart.every`) holds zeros."""
        ...

    def decode_slot(
        self, carry: Carry, parts: Mapping[str, Array], slot: Int[Array, ""] | int
    ) -> tuple[Carry, Float[Array, "*A D"]]:
        """The numbers of one slot. A part that does not exist for this slot may hold anything."""
        ...


class Memoryless(ABC):
    """The slot interface of a codec that codes every slot by itself."""

    @abstractmethod
    def encode(self, x: Float[Array, "*A D"]) -> dict[str, Array]: ...

    @abstractmethod
    def decode(self, parts: Mapping[str, Array]) -> Float[Array, "*A D"]: ...

    def first_slot(self, slot: int) -> int:
        return slot

    def start(self, shape: tuple[int, ...]) -> None:
        return None

    def encode_slot(
        self, carry: None, x: Float[Array, "*A D"], slot: Int[Array, ""] | int
    ) -> tuple[None, dict[str, Array]]:
        return None, self.encode(x)

    def decode_slot(
        self, carry: None, parts: Mapping[str, Array], slot: Int[Array, ""] | int
    ) -> tuple[None, Float[Array, "*A D"]]:
        return None, self.decode(parts)


def take_slot(
    stacks: Mapping[str, Array], parts: tuple[CodePart, ...], slot: Int[Array, ""] | int, axis: int = 0
) -> dict[str, Array]:
    """One slot of the stacks of a tap, each with its slots on `axis`, as `decode_slot` needs it.

    Made for the body of a scan: slices passed as scan inputs would be copied whole.
    """
    return {
        part.name: jax.lax.dynamic_index_in_dim(stacks[part.name], slot // part.every, axis, keepdims=False)
        for part in parts
    }
