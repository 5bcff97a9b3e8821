"""Storage of a token's largest logits: values, vocabulary ids, and the logsumexp over the whole vocabulary.

What other codecs are given is one array of numbers a token; this one is given, and gives back, a `TopK`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from distillcache.schemas.codecs.cast import CastCodec
from distillcache.schemas.codecs.parts import CodePart, Memoryless


class TopK(NamedTuple):
    """A token's k largest logits, largest first. values and ids are `[*A, k]`, logsumexp `[*A]` (of all logits)."""

    values: Float[Array, "*A k"]
    ids: Int[Array, "*A k"]
    logsumexp: Float[Array, "*A"]


@dataclass(frozen=True)
class TopKCodec(Memoryless):
    """Parts: codes (the values, as `floats` keeps them), ids int32 `[*A, k]`, logsumexp float32 `[*A, 1]`."""

    k: int
    floats: CastCodec

    @property
    def name(self) -> str:
        return self.floats.name

    def parts(self, hidden: int) -> tuple[CodePart, ...]:
        """Whatever the hidden size is."""
        return *self.floats.parts(self.k), CodePart("ids", "int32", self.k), CodePart("logsumexp", "float32", 1)

    def encode(self, x: TopK) -> dict[str, Array]:
        logsumexp = x.logsumexp.astype(jnp.float32)[..., None]
        return {**self.floats.encode(x.values), "ids": x.ids.astype(jnp.int32), "logsumexp": logsumexp}

    def decode(self, parts: Mapping[str, Array]) -> TopK:
        values = self.floats.decode(parts).astype(jnp.float32)
        return TopK(values, jnp.asarray(parts["ids"]), jnp.asarray(parts["logsumexp"])[..., 0])
