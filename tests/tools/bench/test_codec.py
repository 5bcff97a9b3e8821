"""The codec bench on a tiny decoder: its figures against numbers computed another way."""

import jax.numpy as jnp
import numpy as np
import pytest

from distillcache.models.config import BlockKind, LayerGroup, ModelConfig
from distillcache.models.decoder import Decoder
from distillcache.schemas.codecs import get_codec
from distillcache.tools.bench.codec import (
    CodecChoice,
    attend,
    bits_per_number,
    bound_distance,
    check_goals,
    collect_taps,
    cosine_distance,
    measure_codecs,
)

CONFIG = ModelConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    layers=(LayerGroup((BlockKind(), BlockKind(window=4)), 2), LayerGroup((BlockKind(),), 1)),
)
TOKENS = np.random.default_rng(0).integers(0, 50, (3, 8)).astype(np.int32)


def test_cosine_distance_sees_what_float32_one_minus_cos_cannot() -> None:
    x = np.random.default_rng(0).normal(size=(4, 5, 32))
    y = x + 1e-5 * np.random.default_rng(1).normal(size=x.shape)
    norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    wanted = np.mean(1 - np.sum(x * y, -1) / norms)
    got = cosine_distance(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))
    np.testing.assert_allclose(got, wanted, rtol=0.05)


@pytest.mark.slow
def test_attention_fed_with_the_recorded_stream_gives_the_recorded_output() -> None:
    decoder = Decoder(CONFIG)
    taps = collect_taps(decoder, TOKENS)
    assert taps["resid"].shape == (6, 3, 8, 32)
    _, out = attend(decoder, jnp.asarray(taps["resid"]), jnp.ones(TOKENS.shape, jnp.int32))
    np.testing.assert_allclose(out, taps["attn_out"], rtol=1e-4, atol=1e-5)


def test_bits_count_every_part_with_its_own_slots() -> None:
    codec = get_codec("int8", delta=True, keyframe_every=8)
    plain = 8 + 8 * 19 / 576
    assert bits_per_number(codec, 31, 576) == pytest.approx(plain * (1 + 4 / 31))
    assert bits_per_number(get_codec("int4"), 30, 576) == pytest.approx(plain - 4)


def test_bound_is_zero_for_the_best_code() -> None:
    assert bound_distance(2.0 ** (-2 * 4 - 1), 4) == pytest.approx(0)
    assert bound_distance(2.0 ** (-2 * 4 - 1), 5) == pytest.approx(1)


@pytest.mark.slow
def test_figures_and_goals() -> None:
    choices = (CodecChoice("f32", "f32"), CodecChoice("int8", "int8"), CodecChoice("int8_delta", "int8", 8))
    decoder = Decoder(CONFIG)
    figures = measure_codecs(decoder, collect_taps(decoder, TOKENS), choices)
    assert figures["f32.attention"] < 1e-10
    assert 1e-7 < figures["int8.attn_out"] < 5e-5
    assert figures["int8_delta.key_size"] > 0
    assert all(np.isfinite(value) for name, value in figures.items() if not name.startswith("f32."))
    goals = check_goals(figures)
    assert {goal["name"] for goal in goals} >= {"int8.attn_out", "int8_delta.resid"}
    assert all(goal["met"] == (goal["value"] <= goal["goal"]) for goal in goals)
