"""The mixer with the gated delta rule against NumPy in float64, token by token; dtypes; and gated attention."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distillcache.models.config import BlockKind, DeltaConfig, ModelConfig, RopeConfig, plan_layers
from distillcache.models.decoder import Decoder
from distillcache.models.layers.attention import Attention
from distillcache.models.layers.context import BlockContext, block_context
from distillcache.models.layers.recurrent.gated_delta import GatedDelta
from tests.models.conftest import on_mesh, randomized

DELTA = DeltaConfig(key_heads=2, value_heads=6, key_dim=5, value_dim=7, taps=3)
CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=36,
    intermediate_size=40,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    layers=plan_layers([BlockKind(mixer="gated_delta"), BlockKind(), BlockKind(mixer="gated_delta")]),
    rope=RopeConfig(theta=100.0, fraction=0.25),
    norm_product="offset",
    qk_norm="head",
    output_gate=True,
    delta=DELTA,
    norm_eps=1e-3,  # with a smaller one the norm behind heads whose output is near zero would show rounding
)
IDS = np.asarray([[1] * 30 + [2] * 1 + [3] * 39 + [0] * 7, [1] * 77])
POSITIONS = np.concatenate([np.arange(n) for n in (30, 1, 39, 7)] + [np.arange(77)]).reshape(2, 77)


def block_of(config: ModelConfig, mixer: str) -> tuple[Any, dict[str, np.ndarray]]:
    """A block's mixer without its axis of repeats, and its parameters in float64."""
    decoder = randomized(Decoder(config))
    sublayers = [block.attention for group in decoder.groups for block in group.blocks]
    sublayer = next(each for each in sublayers if each.kind.mixer == mixer)
    graph, state = nnx.split(sublayer)
    state = jax.tree.map(lambda value: value[0], state)
    flat = {str(path[-1]): np.asarray(v.get_value(), np.float64) for path, v in nnx.to_flat_state(state)}
    return nnx.merge(graph, state), flat


@partial(jax.jit, static_argnums=0)
def _run(graph: Any, state: Any, x: jax.Array, context: BlockContext) -> jax.Array:
    return nnx.merge(graph, state)(x, context)


def run(sublayer: Any, x: np.ndarray, positions: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """What it adds to these streams: one program for all tests of a kind."""
    context = block_context(CONFIG, jnp.asarray(positions), jnp.asarray(ids))
    return np.asarray(_run(*nnx.split(sublayer), jnp.float32(x), context))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def normed(x: np.ndarray, weight: np.ndarray | float, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + eps) * weight


def delta_of_document(x: np.ndarray, p: dict[str, np.ndarray], config: ModelConfig) -> np.ndarray:
    """What the mixer adds to a document's stream `[T, D]`."""
    delta = config.delta_config
    x = normed(x, 1 + p["norm"], config.norm_eps)
    heads = {}
    for name in "qkv":
        projected = np.einsum("td,dhk->thk", x, p[name])
        behind = np.pad(projected, ((delta.taps - 1, 0), (0, 0), (0, 0)))
        summed = sum(behind[tap : tap + len(x)] * p[f"conv_{name}"][..., tap] for tap in range(delta.taps))
        heads[name] = summed * sigmoid(summed)
    for name in "qk":
        heads[name] = heads[name] / np.sqrt(np.sum(np.square(heads[name]), axis=-1, keepdims=True) + 1e-6)
    strength = sigmoid(x @ p["beta"])
    decay = np.exp(-np.exp(p["a_log"]) * np.log1p(np.exp(x @ p["alpha"] + p["dt_bias"])))
    out = np.zeros((len(x), delta.value_heads, delta.value_dim))
    for head in range(delta.value_heads):
        state, key_head = np.zeros((delta.key_dim, delta.value_dim)), head // (delta.value_heads // delta.key_heads)
        for token in range(len(x)):
            key = heads["k"][token, key_head]
            state = state * decay[token, head]
            state = state + np.outer(key, strength[token, head] * (heads["v"][token, head] - key @ state))
            out[token, head] = heads["q"][token, key_head] @ state * delta.key_dim**-0.5
    gate = np.einsum("td,dnv->tnv", x, p["z"])
    out = normed(out, p["out_norm"], config.norm_eps) * gate * sigmoid(gate)
    return np.einsum("tnv,nvd->td", out, p["o"])


def attention_of_document(x: np.ndarray, p: dict[str, np.ndarray], config: ModelConfig) -> np.ndarray:
    """What gated attention adds to a document's stream `[T, D]`; of a head the first quarter is rotated."""
    x = normed(x, 1 + p["norm"], config.norm_eps)
    q, k = (normed(np.einsum("td,dhk->thk", x, p[n]), 1 + p[f"{n}_norm"], config.norm_eps) for n in "qk")
    width = int(config.head_dim * config.rope.fraction)
    angles = np.arange(len(x))[:, None, None] * config.rope.theta ** -(np.arange(0, width, 2) / width)
    for part in (q, k):
        first, second = part[..., : width // 2].copy(), part[..., width // 2 : width].copy()
        part[..., : width // 2] = first * np.cos(angles) - second * np.sin(angles)
        part[..., width // 2 : width] = second * np.cos(angles) + first * np.sin(angles)
    v, gate = (np.einsum("td,dhk->thk", x, p[name]) for name in ("v", "gate"))
    out = np.zeros_like(q)
    for head in range(config.num_heads):
        of = head // (config.num_heads // config.num_kv_heads)
        scores = q[:, head] @ k[:, of].T * config.head_dim**-0.5
        shares = np.exp(scores - scores.max(axis=1, keepdims=True)) * np.tri(len(x))
        out[:, head] = shares @ v[:, of] / shares.sum(axis=1, keepdims=True)
    return np.einsum("thk,hkd->td", out * sigmoid(gate), p["o"])


@pytest.mark.parametrize(
    ("mixer", "kind", "oracle"),
    [("gated_delta", GatedDelta, delta_of_document), ("attention", Attention, attention_of_document)],
)
def test_a_packed_row_has_what_its_documents_have_alone(mixer: str, kind: type, oracle: Any):
    """Against NumPy, document by document; of padding nothing is asked but that it is finite."""
    sublayer, parameters = block_of(CONFIG, mixer)
    assert type(sublayer) is kind
    x = np.random.default_rng(1).normal(size=(2, 77, 36))
    found = run(sublayer, x, POSITIONS, IDS).astype(np.float64)
    assert np.isfinite(found).all()
    for row, number in [(0, 1), (0, 2), (0, 3), (1, 1)]:
        own = np.flatnonzero(IDS[row] == number)
        expected = oracle(x[row, own], parameters, CONFIG)
        assert np.abs(found[row, own] - expected).max() < 5e-6 * np.abs(expected).max()


def test_padding_changes_nothing():
    sublayer, _ = block_of(CONFIG, "gated_delta")
    x = np.random.default_rng(1).normal(size=(2, 77, 36)).astype(np.float32)
    other = np.where(IDS[..., None] > 0, x, 3 * x + 1)
    found, changed = (run(sublayer, each, POSITIONS, IDS) for each in (x, other))
    np.testing.assert_array_equal(found[IDS > 0], changed[IDS > 0])


def test_rates_of_decay_are_float32_in_every_decoder():
    decoder = Decoder(CONFIG, dtype="bfloat16")
    dtypes = {str(path[-1]): value.get_value().dtype for path, value in nnx.to_flat_state(nnx.state(decoder))}
    assert {name for name, dtype in dtypes.items() if dtype == jnp.float32} == set(GatedDelta.float32)
    tokens = jnp.arange(2 * 77).reshape(2, 77) % 61
    logits = jax.eval_shape(lambda tokens: decoder(tokens).logits, tokens)
    assert logits is not None
    assert logits.dtype == jnp.bfloat16


def test_the_gate_has_biases_where_queries_have():
    sublayer, parameters = block_of(replace(CONFIG, qkv_bias=True, output_bias=True), "attention")
    assert parameters["gate_bias"].shape == (6, 16)
    x = np.random.default_rng(1).normal(size=(1, 9, 36)).astype(np.float32)
    row = (np.arange(9)[None], np.ones((1, 9), int))
    open_, shut = (float(np.abs(run(closed(sublayer, by), x, *row)).max()) for by in (0.0, -1e9))
    assert open_ > 0
    assert shut == pytest.approx(np.abs(parameters["o_bias"]).max(), rel=1e-5)


def closed(sublayer: Attention, by: float) -> Attention:
    """The sublayer with this much added to the biases of its gate."""
    graph, state = nnx.split(sublayer)
    flat = [
        (path, value.replace(value.get_value() + by) if path[-1] == "gate_bias" else value)
        for path, value in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(flat))


@pytest.mark.parametrize(
    "sizes", [pytest.param({"tensor": 2}, marks=pytest.mark.slow), {"fsdp": 2, "tensor": 2}], ids=str
)
def test_on_a_mesh(sizes: dict[str, int]):
    """Heads cut over devices, by the parameters' places alone. Sums in other orders differ in more digits behind norms
    of heads near zero."""
    decoder = randomized(Decoder(CONFIG))
    tokens = jnp.arange(4 * 70).reshape(4, 70) % 61
    expected = np.asarray(decoder(tokens).logits)
    graph, placed = nnx.graphdef(decoder), on_mesh(decoder, **sizes)
    found = jax.jit(lambda state: nnx.merge(graph, state)(tokens).logits)(placed)
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=3e-5 * np.abs(expected).max())
