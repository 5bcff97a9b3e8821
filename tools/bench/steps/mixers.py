"""Mixers of tokens: the gated delta rule and Mamba-2 against attention of as wide a stream; compiling against the
depth."""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from distillcache.models.config import BlockKind, DeltaConfig, LayerGroup, MambaConfig, ModelConfig, RopeConfig
from distillcache.models.decoder import Decoder
from distillcache.models.layers.context import block_context
from distillcache.models.layers.mixers import mixer_of
from distillcache.tools.bench.figures import Goal, Measured

OVER_ATTENTION_AT_MOST = 2.0
COMPILE_GROWTH_AT_MOST = 1.25
RECURRENT, FULL, MAMBA = BlockKind(mixer="gated_delta"), BlockKind(), BlockKind(mixer="mamba2")
# Half of Qwen3.5-35B-A3B's widths: heads of attention as wide, half as many of each kind. Mamba-2 as Granite 4 and
# Nemotron-H have it at this width: heads of 64, twice the stream together, states of 128.
HYBRID = ModelConfig(
    vocab_size=512,
    hidden_size=1024,
    intermediate_size=512,
    num_heads=8,
    num_kv_heads=2,
    head_dim=256,
    layers=(LayerGroup((RECURRENT, RECURRENT, RECURRENT, FULL), 1),),
    rope=RopeConfig(1e7, fraction=0.25),
    qk_norm="head",
    norm_product="offset",
    output_gate=True,
    delta=DeltaConfig(key_heads=8, value_heads=16, key_dim=128, value_dim=128, taps=4),
    mamba=MambaConfig(heads=32, head_dim=64, groups=8, state=128, taps=4),
)


@dataclass(frozen=True)
class MixerSizes:
    """config: whose mixers run. tokens: of a row. repeats: of its pattern, few and many, when compiling is timed."""

    config: ModelConfig = HYBRID
    tokens: int = 1024
    repeats: tuple[int, int] = (2, 12)


TINY_MIXERS = MixerSizes(
    replace(
        HYBRID,
        hidden_size=16,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        delta=DeltaConfig(1, 2, 4, 4, 2),
        mamba=MambaConfig(4, 4, 2, 4, 2),
    ),
    tokens=20,
    repeats=(1, 2),
)


def measure_mixers(sizes: MixerSizes, rounds: int) -> Measured:
    """Seconds of output and gradients of each mixer, and of compiling a whole decoder."""
    seconds = _times(sizes, rounds)
    figures = {f"mixer_{name}_s": statistics.median(found) for name, found in seconds.items()}
    ratios = {
        name: statistics.median(a / b for a, b in zip(found, seconds["attention"], strict=True))
        for name, found in seconds.items()
    }
    few, many = (_compile_seconds(sizes, repeats) for repeats in sizes.repeats)
    figures |= {"hybrid_compile_few_s": few, "hybrid_compile_many_s": many}
    goals = [
        *(
            Goal(f"{kind.mixer}_over_attention", ratios[kind.mixer], OVER_ATTENTION_AT_MOST, "at_most")
            for kind in (RECURRENT, MAMBA)
        ),
        Goal("hybrid_compile_many_over_few", many / few, COMPILE_GROWTH_AT_MOST, "at_most"),
    ]
    return Measured(figures, goals)


def _times(sizes: MixerSizes, rounds: int) -> dict[str, list[float]]:
    """Seconds by mixer, in turns; the first call of each, which compiles, does not count."""
    steps = {kind.mixer: _step(sizes, kind) for kind in (FULL, RECURRENT, MAMBA)}
    for step in steps.values():
        jax.block_until_ready(step())
    found: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(step())
            found[name].append(time.perf_counter() - start)
            print(f"bench: round {number + 1} of {rounds}, mixer {name} {found[name][-1]:.3g} s", file=sys.stderr)
    return found


def _step(sizes: MixerSizes, kind: BlockKind) -> Callable[[], Any]:
    """Output and gradients of a mixer, by its parameters and the stream of one row."""
    graph, state = nnx.split(mixer_of(sizes.config, kind, 1, jnp.dtype("float32"), nnx.Rngs(0)))
    state = jax.tree.map(lambda value: value[0], state)
    stream = jax.random.normal(jax.random.key(0), (1, sizes.tokens, sizes.config.hidden_size))
    row = jnp.arange(sizes.tokens)[None]
    context = block_context(sizes.config, row, jnp.ones_like(row))

    def loss(state: Any, stream: Array) -> Array:
        return jnp.sum(jnp.square(nnx.merge(graph, state)(stream, context)))

    run = jax.jit(jax.value_and_grad(loss, (0, 1)))
    return lambda: run(state, stream)


def _compile_seconds(sizes: MixerSizes, repeats: int) -> float:
    """Seconds of tracing and compiling a forward pass, of a decoder whose parameters are never made."""
    layers = tuple(replace(group, repeats=repeats) for group in sizes.config.layers)
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(replace(sizes.config, layers=layers))))
    tokens = jax.ShapeDtypeStruct((1, sizes.tokens), jnp.int32)
    start = time.perf_counter()
    jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens).logits).lower(state, tokens).compile()
    return time.perf_counter() - start
