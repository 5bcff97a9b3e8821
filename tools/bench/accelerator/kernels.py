"""Attention kernels against XLA's attention, and `ragged_dot` against every expert on every token.

    attention_<kernel>_<pass>_ms       a forward pass, or one with its gradients, of packed rows in bfloat16
    attention_<kernel>_over_xla_<pass> their times
    attention_<kernel>_difference      of the outputs, over the largest of XLA's
    experts_<way>_<pass>_ms, experts_ragged_over_dense_<pass>, experts_ragged_difference

A pass: `forward`, or `both` for the forward pass and its gradients.
"""

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distillcache.models.config import BlockKind, Kernel, LayerGroup, ModelConfig
from distillcache.models.layers.context import block_context
from distillcache.models.layers.experts import Experts, apply_experts
from distillcache.models.layers.kernels import attend, chosen_kernel

DTYPE = "bfloat16"
REPEATS = 5
WAYS = ("dense", "ragged")
Passes = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class KernelSizes:
    """rows, tokens: of a batch. heads, kv_heads, head_dim: of attention. experts, top_k, hidden, expert_size: of the
    mixture. documents: in a row.
    """

    rows: int = 8
    tokens: int = 2048
    documents: int = 4
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    experts: int = 64
    top_k: int = 8
    hidden: int = 2048
    expert_size: int = 1024


def measure_attention(sizes: KernelSizes) -> dict[str, float]:
    """Figures of every kernel that this machine has; XLA's alone where there is no other."""
    config = ModelConfig(
        vocab_size=8,
        hidden_size=sizes.heads * sizes.head_dim,
        intermediate_size=8,
        num_heads=sizes.heads,
        num_kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        layers=(LayerGroup((BlockKind(),), 1),),
        max_positions=sizes.tokens,
    )
    kernels: list[Kernel] = list(dict.fromkeys(("xla", chosen_kernel("auto", config, DTYPE))))
    inputs = _attention_inputs(sizes)
    passes = {kernel: _attention_passes(replace(config, attention=kernel), sizes, inputs) for kernel in kernels}
    return _compared("attention", passes, "xla")


def _attention_inputs(sizes: KernelSizes) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    heads = (sizes.heads, sizes.kv_heads, sizes.kv_heads)
    shapes = [(sizes.rows, sizes.tokens, count, sizes.head_dim) for count in heads]
    return [jnp.asarray(rng.standard_normal(shape, np.float32), DTYPE) for shape in shapes]


def _attention_passes(config: ModelConfig, sizes: KernelSizes, inputs: list[jax.Array]) -> Passes:
    segments = jnp.broadcast_to(
        jnp.arange(sizes.tokens) * sizes.documents // sizes.tokens + 1, (sizes.rows, sizes.tokens)
    )
    context = block_context(config, jnp.zeros_like(segments), segments)
    return _passes(lambda q, k, v: attend(q, k, v, context, BlockKind(), config), inputs)


def measure_experts(sizes: KernelSizes) -> dict[str, float]:
    """Figures of `ragged_dot`, which accelerators run natively, and of every expert on every token."""
    rng = np.random.default_rng(0)
    hidden, size, count = sizes.hidden, sizes.expert_size, sizes.experts

    def random(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32) * shape[-2] ** -0.5, DTYPE)

    matrices = [random(count, hidden, size), random(count, hidden, size), random(count, size, hidden)]
    x = random(sizes.rows, sizes.tokens, hidden)
    chosen = rng.random((sizes.rows, sizes.tokens, count)).argsort(-1)[..., : sizes.top_k]
    ids, weights = jnp.asarray(chosen, jnp.int32), jnp.full(chosen.shape, 1 / sizes.top_k, jnp.float32)

    def gating(gate: jax.Array, up: jax.Array) -> jax.Array:
        return jax.nn.silu(gate) * up

    passes = {
        way: _passes(
            lambda x, *own, way=way: apply_experts(Experts(*own), x, ids, weights, gating, way=way), [x, *matrices]
        )
        for way in WAYS
    }
    return _compared("experts", passes, "dense")


def _passes(work: Callable[..., jax.Array], inputs: list[jax.Array]) -> Passes:
    forward = jax.jit(work)
    # A sum of squares: gradients of a plain sum would have the rows of a softmax cancel.
    gradients = jax.grad(
        lambda *given: jnp.sum(jnp.square(work(*given).astype(jnp.float32))), tuple(range(len(inputs)))
    )
    both = jax.jit(gradients)
    return {"forward": lambda: forward(*inputs), "both": lambda: both(*inputs)}


def _compared(name: str, passes: Mapping[str, Passes], base: str) -> dict[str, float]:
    """The figures of each way, and those over the base's."""
    figures: dict[str, float] = {}
    for way, runs in passes.items():
        for kind, run in runs.items():
            figures[f"{name}_{way}_{kind}_ms"] = 1e3 * median_seconds(run, REPEATS)
            print(f"bench: {name}, {way}, {kind} {figures[f'{name}_{way}_{kind}_ms']:.3g} ms", file=sys.stderr)
    true = np.asarray(passes[base]["forward"](), np.float32)
    for way, runs in passes.items():
        if way != base:
            for kind in runs:
                figures[f"{name}_{way}_over_{base}_{kind}"] = (
                    figures[f"{name}_{way}_{kind}_ms"] / figures[f"{name}_{base}_{kind}_ms"]
                )
            found = np.asarray(runs["forward"](), np.float32)
            figures[f"{name}_{way}_difference"] = float(np.abs(found - true).max() / np.abs(true).max())
    return figures


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """The median time of so many runs, after one that does not count: it may compile."""
    jax.block_until_ready(run())
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        found.append(time.perf_counter() - start)
    return statistics.median(found)
