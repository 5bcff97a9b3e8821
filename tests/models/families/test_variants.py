"""Seed-OSS, ERNIE 4.5, Hunyuan, EXAONE 4, Apertus, Command, dots.llm1, Solar Open: what their configs say."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distillcache.models.checkpoint import read_config
from distillcache.models.config import BlockKind, ModelConfig, RopeConfig, plan_layers
from distillcache.models.families import config_from_hf, config_to_hf
from distillcache.models.layers.mlp import xielu
from distillcache.models.routing import select_experts
from distillcache.schemas.errors import CheckpointError
from tests.models.conftest import GOLDEN

FILE = Path("config.json")
SIZES = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 40,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 8,
}
MOE = {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 16}
GROUPS = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1}


def read(family: str, **changes: Any) -> ModelConfig:
    return config_from_hf(SIZES | {"model_type": family} | changes, FILE)


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_alpha_stretches_the_base_of_hunyuans_rotation(key: str):
    scaling = {"type": "dynamic", "factor": 1.0, "alpha": 1000.0, "beta_fast": 32, "mscale": 1.0}
    config = read("hunyuan_v1_dense", rope_theta=10_000.0, **{key: scaling})
    assert config.rope == RopeConfig(theta=10_000.0 * 1000.0 ** (8 / 6))
    assert config_from_hf(config_to_hf(config, "float32"), FILE) == config
    plain = {"type": "dynamic", "factor": 2.0}
    assert read("hunyuan_v1_dense", rope_scaling=plain).rope == RopeConfig(kind="dynamic", factor=2.0)


@pytest.mark.parametrize(
    ("first", "last", "step", "blocks"),
    [(0, -1, 1, (0, 1, 2, 3, 4, 5)), (1, 4, 1, (1, 2, 3, 4)), (2, None, 2, (3, 5)), (1, 3, 3, (2,)), (2, 1, 1, ())],
)
def test_blocks_of_ernie_with_experts(first: int, last: int | None, step: int, blocks: tuple[int, ...]):
    keys = {"moe_layer_start_index": first, "moe_layer_end_index": last, "moe_layer_interval": step}
    config = read("ernie4_5_moe", **MOE, **keys)
    assert config.moe_blocks == blocks
    assert config_from_hf(config_to_hf(config, "float32"), FILE) == config


def test_ernies_bias_is_added_to_probabilities():
    """In logits it would change nothing here."""
    logits, bias = jnp.log(jnp.array([[0.5, 0.3, 0.2]])), jnp.array([0.0, 0.0, 0.2])
    chosen = [
        int(select_experts(logits, bias, top_k=2, renormalise=False, bias_on_scores=on)[0][0, 1])
        for on in (False, True)
    ]
    assert chosen == [1, 2]


@pytest.mark.parametrize(
    ("keys", "slides"),
    [
        ({"sliding_window_pattern": 2}, "101010"),
        ({"sliding_window_pattern": "LLG"}, "110110"),
        ({"sliding_window_pattern": "LG", "layer_types": ["full_attention"] * 5 + ["sliding_attention"]}, "000001"),
        ({"layer_types": ["full_attention"] * 6}, "000000"),
    ],
    ids=str,
)
def test_exaones_blocks_rotate_where_they_slide(keys: dict[str, Any], slides: str):
    config = read("exaone4", sliding_window=5, **keys)
    assert config.kinds == tuple(BlockKind(5) if each == "1" else BlockKind(rotary=False) for each in slides)
    found = config_from_hf(config_to_hf(config, "float32"), FILE)
    assert [kind.rotary for kind in found.kinds] == [kind.rotary for kind in config.kinds]
    plain = read("exaone4", sliding_window=None, layer_types=["full_attention"] * 6)
    assert set(plain.kinds) == {BlockKind()}
    assert config_from_hf(config_to_hf(plain, "float32"), FILE) == plain


def test_xielu_is_smooth_at_zero_and_its_slope_finite_far_away():
    numbers = (jnp.array([0.3]), jnp.array([-0.2]), jnp.array(0.5), jnp.array(-1e-6))
    slopes = jax.vmap(jax.grad(lambda x: xielu(x, *numbers)[0]))(jnp.array([-1e4, -1e-5, 1e-5, 1e4]))
    assert jnp.isfinite(slopes).all()
    np.testing.assert_allclose(slopes[1:3], 0.5, atol=1e-4)


def test_the_rotation_of_an_apertus_that_says_nothing():
    assert read("apertus").rope == RopeConfig(12e6, "llama3", 8.0, 8192)


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("ernie4_5_moe", MOE | {"use_bias": True}, "use_bias"),
        ("ernie4_5_moe", MOE | {"moe_norm_min": 0.1}, "moe_norm_min"),
        ("hunyuan_v1_dense", {"use_cla": True}, "use_cla"),
        ("hunyuan_v1_dense", {"head_dim": 8, "attention_head_dim": 16}, "attention_head_dim"),
        ("hunyuan_v1_dense", {"rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": "2"}}, "alpha"),
        ("hunyuan_v1_dense", {"rope_scaling": {"type": "linear", "factor": 2.0, "alpha": 2.0}}, "alpha"),
        ("hunyuan_v1_moe", {"num_experts": 8, "moe_topk": [2, 2, 2, 2, 2, 1]}, "moe_topk"),
        ("hunyuan_v1_moe", {"num_experts": 8, "moe_topk": 2, "num_shared_expert": [2] * 6}, "num_shared_expert"),
        ("hunyuan_v1_moe", {"num_experts": 8, "moe_topk": 2, "moe_intermediate_size": 30}, "moe_intermediate_size"),
        ("exaone4", {"sliding_window_pattern": "LXG"}, "sliding_window_pattern"),
        ("exaone4", {"attention_bias": True}, "attention_bias"),
        ("apertus", {"hidden_act": "silu"}, "hidden_act"),
        ("apertus", {"rope_theta": 500_000.0}, "rope_theta"),
        ("apertus", {"post_norm": True}, "post_norm"),
        ("cohere2", {"sliding_window": None}, "sliding_window"),
        ("cohere2", {"use_parallel_block": False}, "use_parallel_block"),
        ("dots1", GROUPS | {"n_shared_experts": None}, "n_shared_experts"),
        ("solar_open", GROUPS | {"first_k_dense_replace": 1}, "first_k_dense_replace"),
        ("solar_open", GROUPS | {"use_qk_norm": True}, "use_qk_norm"),
    ],
    ids=str,
)
def test_refusals(family: str, changes: dict[str, Any], named: str):
    with pytest.raises(CheckpointError, match=named):
        read(family, **changes)


@pytest.mark.parametrize(
    ("name", "changes", "named"),
    [
        ("seed_oss", {"layers": plan_layers([BlockKind(4)] * 2)}, "without windows"),
        ("ernie4_5", {"mlp_bias": False}, "some biases"),
        (
            "ernie4_5_moe",
            {"layers": plan_layers([BlockKind(moe=at in (0, 2, 3)) for at in range(4)])},
            "blocks 0, 2, 3",
        ),
        ("hunyuan_v1_dense", {"output_bias": False}, "some biases"),
        ("apertus", {"output_bias": False}, "some biases"),
        ("cohere2", {"layers": plan_layers([BlockKind()])}, "rotate and see all"),
        ("exaone4", {"layers": plan_layers([BlockKind(), BlockKind(rotary=False)])}, "rotate and see all"),
        ("solar_open", {"layers": plan_layers([BlockKind(), BlockKind(moe=True)])}, "dense blocks"),
    ],
)
def test_decoders_that_no_config_can_say(name: str, changes: dict[str, Any], named: str):
    with pytest.raises(CheckpointError, match=named):
        config_to_hf(replace(read_config(GOLDEN / name), **changes), "float32")
