"""A random rotation that spreads a token's outliers over many numbers, so that one scale serves them all.

Each number's sign is flipped or not, once and for all (`signs`), then every block of `2^k` numbers goes through an
orthonormal Hadamard transform. It is its own inverse up to the signs.

Source: QuaRot (arXiv 2404.00456), QuIP# (arXiv 2402.04396).
"""

import hashlib
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

MAX_BLOCK = 128


def make_signs(seed: str, hidden: int) -> Int8[np.ndarray, " D"]:
    """The sign vector that a seed stands for: +1 and -1, from SHAKE-256's bits.

    A cache stores the vector itself and never needs the seed again; a plan uses this so that the same plan gives the
    same bytes.
    """
    stream = np.frombuffer(hashlib.shake_256(seed.encode()).digest(-(-hidden // 8)), np.uint8)
    return (1 - 2 * np.unpackbits(stream)[:hidden].astype(np.int8)).astype(np.int8)


def block_size(hidden: int) -> int:
    """The largest power of two that divides `hidden`, up to 128."""
    return min(hidden & -hidden, MAX_BLOCK)


def hadamard(size: int) -> Float[np.ndarray, "n n"]:
    """The orthonormal Hadamard matrix of a power of two, Sylvester's: symmetric, so its own inverse."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (matrix / np.sqrt(size)).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Rotation:
    """signs: +1 and -1, `[D]`; None: no rotation at all. Two of equal signs are equal, and so are their codecs."""

    signs: np.ndarray | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rotation) and self._bytes() == other._bytes()

    def __hash__(self) -> int:
        return hash(self._bytes())

    def _bytes(self) -> bytes | None:
        return None if self.signs is None else np.asarray(self.signs, np.int8).tobytes()

    def forward(self, x: Float[Array, "*A D"]) -> Float[Array, "*A D"]:
        return x if self.signs is None else _transform(x * self._flips())

    def backward(self, y: Float[Array, "*A D"]) -> Float[Array, "*A D"]:
        return y if self.signs is None else _transform(y) * self._flips()

    def _flips(self) -> Float[Array, " D"]:
        return jnp.asarray(self.signs, jnp.float32)


def _transform(y: Float[Array, "*A D"]) -> Float[Array, "*A D"]:
    """By a matrix product, which is what accelerators are made for, and on CPUs the fastest too.

    In full float32: at an accelerator's default precision the product would be less exact than the codes are.

    XLA sums in an order of its own for every shape and processor, so two programs agree to rounding (docs/design.md,
    "Which bits are equal"). Butterflies, whose order is fixed, take 17.7 ms where this takes 8.1 for 4,096 tokens of
    576 numbers, and 14.7 ms for 10.2 for 1,024 of 2048 (two cores with AVX2, in a scan).
    """
    size = block_size(y.shape[-1])
    blocks = y.reshape(*y.shape[:-1], y.shape[-1] // size, size)
    return jnp.matmul(blocks, hadamard(size), precision="highest").reshape(y.shape)
