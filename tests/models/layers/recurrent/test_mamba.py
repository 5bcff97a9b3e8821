"""Mamba-2, alone and beside attention, against NumPy in float64, token by token; dtypes; meshes."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distillcache.models.config import BlockKind, MambaConfig, ModelConfig, Multipliers, RopeConfig, plan_layers
from distillcache.models.decoder import Decoder
from distillcache.models.layers.context import BlockContext, block_context
from distillcache.models.layers.recurrent.mamba import BESIDE, AttentionBesideMamba, Mamba2
from tests.models.conftest import on_mesh, randomized
from tests.models.layers.recurrent.test_gated_delta import IDS, POSITIONS, normed, sigmoid

MAMBA = MambaConfig(heads=6, head_dim=7, groups=2, state=5, taps=3, bias=True, output_bias=True, most_step=1.5)
CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=36,
    intermediate_size=40,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    layers=plan_layers([BlockKind(mixer="mamba2"), BlockKind(), BlockKind(mixer="mamba2")]),
    rope=RopeConfig(theta=100.0),
    mamba=MAMBA,
    norm_eps=1e-3,  # with a smaller one the norm of heads whose output is near zero would show rounding
)
FACTORS = Multipliers(
    mamba_input=0.8, mamba=(0.7, 1.2, 0.9, 1.1, 0.6), attention_input=1.3, attention_output=0.8, key=0.7
)


def block_of(config: ModelConfig) -> tuple[Any, dict[str, np.ndarray]]:
    """The first block's mixer without its axis of repeats, and its parameters in float64."""
    graph, state = nnx.split(randomized(Decoder(config)).groups[0].blocks[0].attention)
    state = jax.tree.map(lambda value: value[0], state)
    flat = {str(path[-1]): np.asarray(v.get_value(), np.float64) for path, v in nnx.to_flat_state(state)}
    return nnx.merge(graph, state), flat


@partial(jax.jit, static_argnums=0)
def _run(graph: Any, state: Any, x: jax.Array, context: BlockContext) -> jax.Array:
    return nnx.merge(graph, state)(x, context)


def run(sublayer: Any, x: np.ndarray) -> np.ndarray:
    context = block_context(CONFIG, jnp.asarray(POSITIONS), jnp.asarray(IDS))
    return np.asarray(_run(*nnx.split(sublayer), jnp.float32(x), context))


def mamba_of_document(x: np.ndarray, p: dict[str, np.ndarray], config: ModelConfig) -> np.ndarray:
    """What Mamba-2 makes of a document's normed stream `[T, D]`."""
    mamba, factors = config.mamba_config, config.multipliers or Multipliers()
    by_name = dict(zip(("z", "v", "k", "q", "alpha"), factors.mamba, strict=True))
    made = {
        name: (np.tensordot(x * factors.mamba_input, p[name], 1) + p[f"{name}_bias"]) * factor
        for name, factor in by_name.items()
    }
    for name in "qkv":
        behind = np.pad(made[name], ((mamba.taps - 1, 0), (0, 0), (0, 0)))
        summed = sum(behind[tap : tap + len(x)] * p[f"conv_{name}"][..., tap] for tap in range(mamba.taps))
        summed = summed + p[f"conv_{name}_bias"]
        made[name] = summed * sigmoid(summed)
    steps = np.clip(np.log1p(np.exp(made["alpha"] + p["dt_bias"])), mamba.least_step, mamba.most_step)
    out = np.zeros((len(x), mamba.heads, mamba.head_dim))
    for head in range(mamba.heads):
        state, group = np.zeros((mamba.state, mamba.head_dim)), head // (mamba.heads // mamba.groups)
        for token in range(len(x)):
            step, value = steps[token, head], made["v"][token, head]
            state = state * np.exp(-np.exp(p["a_log"][head]) * step) + np.outer(made["k"][token, group], step * value)
            out[token, head] = made["q"][token, group] @ state + p["skip"][head] * value
    gate, split = made["z"] * sigmoid(made["z"]), (len(x), mamba.groups, -1)
    if mamba.norm == "gated":
        out = normed((out * gate).reshape(split), p["out_norm"].reshape(mamba.groups, -1), config.norm_eps)
    else:
        out = normed(out.reshape(split), p["out_norm"].reshape(mamba.groups, -1), config.norm_eps)
        out = out * gate.reshape(split)
    return np.einsum("tnv,nvd->td", out.reshape(len(x), mamba.heads, -1), p["o"]) + p["o_bias"]


@pytest.mark.parametrize("norm", ["gated", "first"])
def test_a_packed_row_has_what_its_documents_have_alone(norm: Any):
    """Against NumPy, document by document; of padding nothing is asked but that it is finite and changes nothing."""
    config = replace(CONFIG, mamba=replace(MAMBA, norm=norm), multipliers=FACTORS if norm == "first" else None)
    sublayer, parameters = block_of(config)
    assert type(sublayer) is Mamba2
    x = np.random.default_rng(1).normal(size=(2, 77, 36)).astype(np.float32)
    found = run(sublayer, x).astype(np.float64)
    assert np.isfinite(found).all()
    for row, number in [(0, 1), (0, 2), (0, 3), (1, 1)]:
        own = np.flatnonzero(IDS[row] == number)
        normal = normed(x[row, own].astype(np.float64), parameters["norm"], config.norm_eps)
        expected = mamba_of_document(normal, parameters, config)
        assert np.abs(found[row, own] - expected).max() < 5e-6 * np.abs(expected).max()
    other = np.where(IDS[..., None] > 0, x, 3 * x + 1)
    np.testing.assert_array_equal(found[IDS > 0], run(sublayer, other)[IDS > 0])


def test_attention_beside_it_is_added():
    """The sum of what both do alone, with the same parameters."""
    kinds = plan_layers([BlockKind(mixer="attention_mamba2")])
    config = replace(CONFIG, layers=kinds, multipliers=replace(FACTORS, mamba_output=0.0))
    x = np.random.default_rng(1).normal(size=(2, 77, 36)).astype(np.float32)
    sublayer, parameters = block_of(config)
    assert type(sublayer) is AttentionBesideMamba
    attention = run(sublayer, x)
    both = run(block_of(replace(config, multipliers=replace(FACTORS, mamba_output=0.5)))[0], x)
    own = {name.removeprefix(BESIDE): value for name, value in parameters.items() if name.startswith(BESIDE)}
    document = np.flatnonzero(IDS[0] == 3)
    normal = normed(x[0, document].astype(np.float64), parameters["norm"], config.norm_eps)
    expected = 0.5 * mamba_of_document(normal, own, config)
    assert np.abs((both - attention)[0, document] - expected).max() < 1e-5 * np.abs(expected).max()


def test_rates_are_float32_in_every_decoder():
    dtypes = {
        str(path[-1]): value.get_value().dtype
        for path, value in nnx.to_flat_state(nnx.state(Decoder(CONFIG, dtype="bfloat16")))
    }
    assert {name for name, dtype in dtypes.items() if dtype == jnp.float32} == set(Mamba2.float32)


def test_on_a_mesh():
    """Heads cut over devices, by the parameters' places alone."""
    decoder = randomized(Decoder(CONFIG))
    tokens = jnp.arange(4 * 70).reshape(4, 70) % 61
    expected = np.asarray(decoder(tokens).logits)
    graph, placed = nnx.graphdef(decoder), on_mesh(decoder, fsdp=2, tensor=2)
    found = jax.jit(lambda state: nnx.merge(graph, state)(tokens).logits)(placed)
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=3e-5 * np.abs(expected).max())
