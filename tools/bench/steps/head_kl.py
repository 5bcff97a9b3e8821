"""KL over the whole vocabulary: streams and heads in tiles against logits of all tokens, memory and time."""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from distillcache.tools.bench.figures import Goal, Measured
from distillcache.trainer.head_losses import HeadLosses, HeadWeights, Side

TEMPORARIES_AT_MOST = 1 / 8
TIME_AT_MOST = 1.3
Step = Callable[..., tuple[Array, tuple[Array, Array]]]


@dataclass(frozen=True)
class HeadSizes:
    """The sizes of the heads. memory_tokens: for which both are compiled, never run; timed_tokens: for which they run.
    The plain way's arrays would not fit otherwise: 2.5 GB each at 4,096 tokens."""

    vocab: int = 151_936
    hidden: int = 1024
    memory_tokens: int = 4096
    timed_tokens: int = 220  # two of the tiles that it takes


def measure_head_kl(sizes: HeadSizes, rounds: int) -> Measured:
    """Loss and gradients by the student's stream and head, in both ways."""
    ways: dict[str, Step] = {"plain": jax.jit(_plain), "tiled": jax.jit(_tiled)}
    temporaries = {}
    for name, way in ways.items():
        compiled = way.lower(*_abstract(sizes)).compile()
        temporaries[name] = compiled.memory_analysis().temp_size_in_bytes
        print(f"bench: head KL, {name}: {temporaries[name] / 1e6:,.0f} MB of temporaries", file=sys.stderr)
    seconds = _times(ways, _inputs(sizes), rounds)
    figures = {f"head_kl_{name}_temporaries_mb": size / 1e6 for name, size in temporaries.items()}
    figures |= {f"head_kl_{name}_s": statistics.median(found) for name, found in seconds.items()}
    memory = temporaries["tiled"] / temporaries["plain"]
    ratio = statistics.median(a / b for a, b in zip(seconds["tiled"], seconds["plain"], strict=True))
    goals = [
        Goal("head_kl_temporaries_over_plain", memory, TEMPORARIES_AT_MOST, "at_most"),
        Goal("head_kl_time_over_plain", ratio, TIME_AT_MOST, "at_most"),
    ]
    return Measured(figures, goals)


def _tiled(
    own: Float[Array, "B T D"], own_head: Float[Array, "D V"], its: Float[Array, "B T D"], its_head: Float[Array, "D V"]
) -> tuple[Array, tuple[Array, Array]]:
    tokens, ones = jnp.zeros(own.shape[:2], jnp.int32), jnp.ones(own.shape[:2], jnp.int32)

    def loss(own: Array, own_head: Array) -> Array:
        weights = HeadWeights(1.0 / tokens.size, 0.0, 1.0)
        return HeadLosses()(Side(own, own_head), Side(its, its_head), weights, tokens, ones, ones > 0)[0]

    return jax.value_and_grad(loss, argnums=(0, 1))(own, own_head)


def _plain(
    own: Float[Array, "B T D"], own_head: Float[Array, "D V"], its: Float[Array, "B T D"], its_head: Float[Array, "D V"]
) -> tuple[Array, tuple[Array, Array]]:
    """The logits of all tokens, and what JAX makes of them."""

    def loss(own: Array, own_head: Array) -> Array:
        student, teacher = jax.nn.log_softmax(own @ own_head), jax.nn.log_softmax(its @ its_head)
        return jnp.sum(jnp.exp(teacher) * (teacher - student)) / own[..., 0].size

    return jax.value_and_grad(loss, argnums=(0, 1))(own, own_head)


def _abstract(sizes: HeadSizes) -> list[Any]:
    stream = jax.ShapeDtypeStruct((1, sizes.memory_tokens, sizes.hidden), jnp.float32)
    head = jax.ShapeDtypeStruct((sizes.hidden, sizes.vocab), jnp.float32)
    return [stream, head, stream, head]


def _inputs(sizes: HeadSizes) -> list[Array]:
    rng = np.random.default_rng(0)
    shapes = [(1, sizes.timed_tokens, sizes.hidden), (sizes.hidden, sizes.vocab)] * 2
    return [jnp.asarray(rng.normal(size=shape, scale=sizes.hidden**-0.5).astype(np.float32)) for shape in shapes]


def _times(ways: dict[str, Step], inputs: Sequence[Array], rounds: int) -> dict[str, list[float]]:
    """Seconds by way, in turns; the first call of each, which compiles, does not count."""
    for way in ways.values():
        jax.block_until_ready(way(*inputs))
    found: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            jax.block_until_ready(way(*inputs))
            found[name].append(time.perf_counter() - start)
            print(f"bench: round {number + 1} of {rounds}, head KL, {name} {found[name][-1]:.3g} s", file=sys.stderr)
    return found
