"""Sparse attention against NumPy in float64, query by query: chosen keys, documents, padding; and its gradients."""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distillcache.models.config import BlockKind, IndexConfig, LatentConfig, ModelConfig, RopeConfig, plan_layers
from distillcache.models.decoder import Decoder
from distillcache.models.layers.context import block_context
from distillcache.models.layers.latent_attention import IndexedAttention
from distillcache.trainer.step.flops import step_flops
from distillcache.trainer.step.parameters import all_parameters
from tests.models.conftest import randomized

TOP, WIDTH, TURNED = 5, 12, 8
IDS = np.asarray([[1] * 4 + [2] * 12 + [3] * 3 + [0] * 4, [1] * 23])
POSITIONS = np.concatenate([np.arange(n) for n in (4, 12, 3, 4, 23)]).reshape(2, 23)


def config_of(*, interleaved: bool = False, top_k: int = TOP, kinds: tuple[BlockKind, ...] = (BlockKind(),)) -> Any:
    return ModelConfig(
        vocab_size=61,
        hidden_size=36,
        intermediate_size=40,
        num_heads=6,
        num_kv_heads=6,
        head_dim=13,
        layers=plan_layers(kinds),
        rope=RopeConfig(100.0, interleaved=True),
        latent=LatentConfig(11, 10, 5, TURNED, 7, IndexConfig(9, WIDTH, top_k, interleaved)),
    )


def mixer_of(config: ModelConfig) -> tuple[IndexedAttention, dict[str, np.ndarray]]:
    """A block's mixer without its axis of repeats, and its parameters in float64."""
    graph, state = nnx.split(randomized(Decoder(config)).groups[0].blocks[0].attention)
    state = jax.tree.map(lambda value: value[0], state)
    flat = {str(path[-1]): np.asarray(v.get_value(), np.float64) for path, v in nnx.to_flat_state(state)}
    return nnx.merge(graph, state), flat


def outcome(mixer: IndexedAttention, x: Any, positions: Any, ids: Any, method: str = "__call__") -> Any:
    """Result of a method of the mixer for this stream, compiled as one program."""
    graph, state = nnx.split(mixer)

    @jax.jit
    def run(state: nnx.State, x: jax.Array, positions: jax.Array, ids: jax.Array) -> Any:
        whole = nnx.merge(graph, state)
        return getattr(whole, method)(x, block_context(whole.config, positions, ids))

    return run(state, jnp.asarray(x), jnp.asarray(positions), jnp.asarray(ids))


def turned(x: np.ndarray, position: int, interleaved: bool) -> np.ndarray:
    """The first numbers of a vector, rotated in pairs."""
    half = TURNED // 2
    angles = position * 100.0 ** (-np.arange(half) / half)
    first, second = (
        (np.arange(0, TURNED, 2), np.arange(1, TURNED, 2)) if interleaved else np.split(np.arange(TURNED), 2)
    )
    found = x.copy()
    found[first] = x[first] * np.cos(angles) - x[second] * np.sin(angles)
    found[second] = x[second] * np.cos(angles) + x[first] * np.sin(angles)
    return found


def normed(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(np.square(x)) + 1e-6) * weight


def chosen_alone(x: np.ndarray, p: dict[str, np.ndarray], interleaved: bool) -> np.ndarray:
    """The keys of every query of a document's stream `[T, D]`, which has been normed."""
    found = np.zeros((len(x), len(x)), bool)
    keys = []
    for at, row in enumerate(x):
        k = row @ p["index_k"]
        k = (k - k.mean()) / np.sqrt(k.var() + 1e-6) * p["index_norm"] + p["index_norm_bias"]
        keys.append(turned(k, at, interleaved))
        q = np.einsum("r,rhk->hk", normed(row @ p["q_a"], p["q_a_norm"]), p["index_q"])
        q = np.stack([turned(head, at, interleaved) for head in q])
        weights = row @ p["index_weight"]
        scores = np.asarray([weights @ np.maximum(q @ key * WIDTH**-0.5, 0) for key in keys])
        found[at, np.argsort(-scores, kind="stable")[:TOP]] = True
    return found


@pytest.mark.parametrize("interleaved", [False, True])
def test_chosen_keys_are_those_of_every_document_alone(interleaved: bool):
    mixer, p = mixer_of(config_of(interleaved=interleaved))
    x = np.random.default_rng(1).normal(size=(*IDS.shape, 36)).astype(np.float32)
    choice = np.asarray(outcome(mixer, x, POSITIONS, IDS, "choice"))
    for row, start, stop in ((0, 0, 4), (0, 4, 16), (0, 16, 19), (1, 0, 23)):
        earlier = np.tril(np.ones((stop - start,) * 2, bool))
        found = choice[row, start:stop, start:stop] & earlier
        np.testing.assert_array_equal(found, chosen_alone(x[row, start:stop].astype(np.float64), p, interleaved))


def test_where_the_choice_takes_all_it_is_dense():
    """Documents of at most `top_k` tokens in a longer row, and rows of at most `top_k` tokens."""
    x = np.random.default_rng(2).normal(size=(1, 23, 36)).astype(np.float32)
    ids, positions = [[1] * 12 + [2] * 11], np.concatenate([np.arange(12), np.arange(11)])[None]
    found = []
    for top_k in (12, 23):
        mixer, _ = mixer_of(config_of(top_k=top_k))
        assert (outcome(mixer, x, positions, ids, "choice") is None) == (top_k == 23)
        found.append(np.asarray(outcome(mixer, x, positions, ids)))
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-6)


def test_splash_attention_knows_no_choice():
    """XLA computes it, whatever kernel was chosen."""
    mixer, _ = mixer_of(config_of())
    x, ids = jnp.ones((1, 23, 36)) * jnp.linspace(-1, 1, 23)[:, None], jnp.ones((1, 23), int)
    plain = np.asarray(outcome(mixer, x, jnp.arange(23)[None], ids))
    mixer.config = replace(mixer.config, attention="splash")
    np.testing.assert_array_equal(outcome(mixer, x, jnp.arange(23)[None], ids), plain)


def test_padding_changes_nothing():
    mixer, _ = mixer_of(config_of())
    x = np.random.default_rng(3).normal(size=(2, 23, 36)).astype(np.float32)
    x[1, :19] = x[0, :19]
    out = np.asarray(outcome(mixer, x, np.tile(POSITIONS[:1], (2, 1)), np.tile(IDS[:1], (2, 1))))
    np.testing.assert_array_equal(out[0, :19], out[1, :19])


def test_the_last_choice_is_taken_over():
    """Of blocks that choose, choose, take, choose, take: those that take have no indexer, and use the choice of the
    block before them."""
    own, taken = BlockKind(), BlockKind(taken_choice=True)
    config = config_of(kinds=(own, own, taken, own, taken))
    assert config.has_joined_blocks
    decoder = randomized(Decoder(config))
    tokens = jnp.asarray(np.random.default_rng(4).integers(0, 61, (1, 23)))
    whole, parameters = nnx.split(decoder)
    taps = jax.jit(lambda p: nnx.merge(whole, p)(tokens, taps=("resid", "attn_out"), logits=False).taps)(parameters)
    context = decoder.context(jnp.arange(23)[None], jnp.ones((1, 23), int))
    choice = None
    for block, (_, group, repeat, place) in enumerate(config.places()):
        graph, state = nnx.split(decoder.groups[group].blocks[place].attention)
        mixer = nnx.merge(graph, jax.tree.map(lambda value, repeat=repeat: value[repeat], state))
        assert hasattr(mixer, "index_q") != mixer.kind.taken_choice
        x = taps["resid"][block]
        if not mixer.kind.taken_choice:
            choice = mixer.choice(_normed(mixer, x), context)
        expected = mixer(x, context._replace(choice=choice))
        np.testing.assert_allclose(taps["attn_out"][block], expected, rtol=0, atol=1e-5)


def _normed(mixer: Any, x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6) * mixer.norm[...]


def test_no_gradient_reaches_the_indexer_and_no_backward_pass_is_counted():
    decoder = randomized(Decoder(config_of()))
    graph, state = nnx.split(decoder)
    tokens = jnp.asarray(np.random.default_rng(5).integers(0, 61, (1, 23)))
    slopes = jax.jit(jax.grad(lambda state: jnp.sum(nnx.merge(graph, state)(tokens).logits ** 2)))(state)
    largest = {str(path[-1]): float(jnp.abs(v.get_value()).max()) for path, v in nnx.to_flat_state(slopes)}
    assert {name for name, value in largest.items() if value == 0} == {n for n in largest if n.startswith("index_")}
    parameters = all_parameters(decoder)
    without = {name: value for name, value in parameters.items() if "index_" not in name}
    counted = [step_flops(decoder.config, each, 100, 23) for each in (parameters, without)]
    matrices = 11 * 9 * WIDTH + 36 * WIDTH + 36 * 9
    assert counted[0] - counted[1] == pytest.approx(2 * 100 * matrices)
