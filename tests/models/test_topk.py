"""The largest logits by parts of a batch: the same as of the whole, and never the whole in memory."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from distillcache.models import topk
from distillcache.models.config import BlockKind, LayerGroup, ModelConfig
from distillcache.models.decoder import Decoder
from distillcache.models.recorder import make_recorder
from distillcache.schemas.config import TapConfig, TopKConfig
from distillcache.schemas.format.manifest import TapPlan
from distillcache.schemas.format.tap_plan import tap_plan, topk_plan

CONFIG = ModelConfig(
    vocab_size=131,
    hidden_size=16,
    intermediate_size=24,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    layers=(LayerGroup((BlockKind(),), 2),),
)


@pytest.fixture(scope="module")
def stream() -> jax.Array:
    return jax.random.normal(jax.random.key(0), (3, 7, 16))


@pytest.mark.parametrize("tokens", [1, 4, 20, 21, 1000])
def test_any_division_gives_the_same(stream: jax.Array, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk, "LOGITS_BYTES", tokens * 4 * CONFIG.vocab_size)
    decoder = Decoder(CONFIG)
    found = topk.topk_logits(decoder, stream, 6)
    logits = np.asarray(decoder.logits(stream), np.float64)
    assert [part.shape for part in found] == [(3, 7, 6), (3, 7, 6), (3, 7)]
    assert [part.dtype for part in found] == [jnp.float32, jnp.int32, jnp.float32]
    np.testing.assert_allclose(found.values, np.sort(logits, -1)[..., :-7:-1], rtol=1e-5, atol=1e-6)
    at_ids = np.take_along_axis(logits, np.asarray(found.ids), -1)
    np.testing.assert_allclose(at_ids, found.values, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.logsumexp, np.log(np.exp(logits).sum(-1)), rtol=1e-5)


def test_ties_go_to_the_first_ids(stream: jax.Array) -> None:
    decoder = Decoder(CONFIG)
    decoder.head[...] = jnp.zeros_like(decoder.head[...])
    found = topk.topk_logits(decoder, stream, 4)
    np.testing.assert_array_equal(found.ids, np.broadcast_to(np.arange(4), (3, 7, 4)))
    np.testing.assert_allclose(found.logsumexp, np.log(131), rtol=1e-6)


def test_all_logits(stream: jax.Array) -> None:
    found = topk.topk_logits(Decoder(CONFIG), stream, 131)
    np.testing.assert_array_equal(np.sort(found.ids, -1), np.broadcast_to(np.arange(131), (3, 7, 131)))
    np.testing.assert_allclose(jax.nn.logsumexp(found.values, -1), found.logsumexp, rtol=1e-6)


@pytest.mark.parametrize("ids", [120, 131])
def test_rows_of_padding_count_nowhere(stream: jax.Array, ids: int) -> None:
    decoder = Decoder(CONFIG)
    decoder.head[...] = decoder.head[...].at[:, 120:].multiply(100.0)  # the largest, wherever they count
    found = topk.topk_logits(decoder, stream, 6, vocab_size=ids)
    logits = np.asarray(decoder.logits(stream), np.float64)[..., :ids]
    np.testing.assert_allclose(found.values, np.sort(logits, -1)[..., :-7:-1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.logsumexp, np.log(np.exp(logits).sum(-1)), rtol=1e-5)
    assert np.any(np.asarray(found.ids) >= 120) == (ids == 131)


def compiled(decoder: Decoder, taps: list[TapPlan], batch: int, tokens: int):
    record, parameters = make_recorder(decoder, taps, {})
    shape = jnp.zeros((batch, tokens), jnp.int32)
    return record.lower(parameters, shape, shape, shape)  # type: ignore[attr-defined]


def test_the_logits_of_a_batch_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(replace(CONFIG, vocab_size=8192), rngs=nnx.Rngs(1))
    monkeypatch.setattr(topk, "LOGITS_BYTES", 1 << 20)
    lowered = compiled(decoder, [topk_plan(TopKConfig(k=8), 16, 8192)], 8, 128)
    whole = 8 * 128 * 8192 * 4
    assert lowered.compile().memory_analysis().temp_size_in_bytes < whole / 4


def test_the_head_runs_only_for_them() -> None:
    decoder = Decoder(CONFIG)
    attn_out = tap_plan("attn_out", TapConfig(), [0, 1], 16)
    without = compiled(decoder, [attn_out], 2, 4).as_text()
    with_logits = compiled(decoder, [attn_out, topk_plan(TopKConfig(k=8), 16, 131)], 2, 4).as_text()
    assert "x131xf32" not in without.replace("tensor<16x131xf32>", "")
    assert "x131xf32" in with_logits.replace("tensor<16x131xf32>", "")
