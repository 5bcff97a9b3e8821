"""The gated short convolution against NumPy in float64, token by token: packed rows, padding, gradients, a mesh."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distillcache.models.config import BlockKind, ModelConfig, RopeConfig, ShortConvConfig, plan_layers
from distillcache.models.decoder import Decoder
from distillcache.models.layers.context import BlockContext, block_context
from distillcache.models.layers.recurrent.short_conv import ShortConv
from tests.models.conftest import on_mesh, randomized

CONV = BlockKind(mixer="short_conv")
CONFIG = ModelConfig(
    vocab_size=61,
    hidden_size=36,
    intermediate_size=40,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    layers=plan_layers([CONV, BlockKind(), CONV]),
    rope=RopeConfig(theta=100.0),
    qk_norm="head",
    short_conv=ShortConvConfig(channels=36, taps=4, bias=True),
    norm_eps=1e-5,
    tie_embeddings=True,
    family="lfm2",
)
IDS = np.asarray([[1] * 10 + [2] * 1 + [3] * 8 + [0] * 4, [1] * 23])


@pytest.fixture(scope="module")
def sublayer() -> tuple[Any, dict[str, Any]]:
    """A block's mixer without its axis of repeats: its structure and its parameters by name."""
    mixer = randomized(Decoder(CONFIG)).groups[0].blocks[0].attention
    assert isinstance(mixer, ShortConv)
    graph, state = nnx.split(mixer)
    return graph, {str(path[-1]): value.get_value()[0] for path, value in nnx.to_flat_state(state)}


@partial(jax.jit, static_argnums=0)
def run(graph: Any, parameters: dict[str, Any], x: jax.Array, context: BlockContext) -> jax.Array:
    state = nnx.from_flat_state([((name,), nnx.Param(value)) for name, value in parameters.items()])
    return nnx.merge(graph, state)(x, context)


def packed() -> BlockContext:
    return block_context(CONFIG, jnp.zeros(IDS.shape, int), jnp.asarray(IDS))


def of_document(x: np.ndarray, p: dict[str, np.ndarray]) -> np.ndarray:
    """What the mixer adds to a document's stream `[T, D]`."""
    x = x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + CONFIG.norm_eps) * p["norm"]
    in_gate, out_gate, value = (x @ p[name] + p[f"{name}_bias"] for name in ("in_gate", "out_gate", "value"))
    last, out = np.zeros(p["conv"].shape), []
    for token in range(len(x)):
        last = np.concatenate([last[:, 1:], (in_gate[token] * value[token])[:, None]], axis=1)
        out.append(out_gate[token] * (np.sum(last * p["conv"], axis=1) + p["conv_bias"]))
    return np.stack(out) @ p["o"][:, 0] + p["o_bias"]


def of_rows(x: np.ndarray, p: dict[str, np.ndarray]) -> np.ndarray:
    """The same of packed rows; zeros for padding."""
    found = np.zeros_like(x)
    for row, number in [(0, 1), (0, 2), (0, 3), (1, 1)]:
        own = np.flatnonzero(IDS[row] == number)
        found[row, own] = of_document(x[row, own], p)
    return found


def test_a_packed_row_has_what_its_documents_have_alone(sublayer: tuple[Any, dict[str, Any]]):
    """Whatever lies behind them as padding."""
    graph, parameters = sublayer
    x = np.random.default_rng(1).normal(size=(2, 23, 36))
    expected = of_rows(x, {name: np.asarray(value, np.float64) for name, value in parameters.items()})
    for padding in (0.0, 3.0):
        found = np.asarray(run(graph, parameters, jnp.float32(np.where(IDS[..., None] > 0, x, padding)), packed()))
        assert np.isfinite(found).all()
        assert np.abs(found - expected)[IDS > 0].max() < 5e-6 * np.abs(expected).max()


def test_gradients_are_the_slopes_of_the_oracle(sublayer: tuple[Any, dict[str, Any]]):
    """Of every parameter and of the stream along a direction of its own, by central differences in float64."""
    graph, parameters = sublayer
    rng = np.random.default_rng(2)
    x, above = rng.normal(size=(2, 2, 23, 36)) * (IDS[..., None] > 0)
    wide = {name: np.asarray(value, np.float64) for name, value in parameters.items()} | {"x": x}

    def total(given: dict[str, Any]) -> jax.Array:
        return jnp.sum(run(graph, {n: v for n, v in given.items() if n != "x"}, given["x"], packed()) * above)

    slopes = jax.grad(total)({name: jnp.float32(value) for name, value in wide.items()})
    for name, value in wide.items():
        way = rng.normal(size=value.shape)
        ends = [np.sum(of_rows(**_moved(wide, name, sign * 1e-4 * way)) * above) for sign in (1, -1)]
        expected = (ends[0] - ends[1]) / 2e-4
        size = np.linalg.norm(np.asarray(slopes[name], np.float64)) * np.linalg.norm(way)
        assert abs(np.sum(np.asarray(slopes[name], np.float64) * way) - expected) < 2e-5 * size, name


def _moved(values: dict[str, np.ndarray], name: str, step: np.ndarray) -> dict[str, Any]:
    moved = values | {name: values[name] + step}
    return {"x": moved.pop("x"), "p": moved}


def test_channels_are_cut_over_a_mesh():
    decoder = randomized(Decoder(CONFIG))
    tokens = jnp.arange(4 * 23).reshape(4, 23) % 61
    expected = np.asarray(decoder(tokens).logits)
    graph, placed = nnx.graphdef(decoder), on_mesh(decoder, fsdp=2, tensor=2)
    cut = {
        str(path[-1]): value.get_value().sharding.spec for path, value in nnx.to_flat_state(placed) if path[3:4] == (0,)
    }
    assert all("tensor" in cut[name] for name in ("in_gate", "out_gate", "value", "conv"))
    found = jax.jit(lambda state: nnx.merge(graph, state)(tokens).logits)(placed)
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=5e-6 * np.abs(expected).max())
