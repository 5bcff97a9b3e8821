"""MiniMax M2: the rotated part of a head in both spellings, refusals, exports. Its numbers are in test_parity.py."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from distillcache.models.checkpoint import load_pretrained
from distillcache.models.config import BlockKind, LayerGroup, ModelConfig, MoeConfig, RopeConfig
from distillcache.models.families import config_from_hf, config_to_hf
from distillcache.schemas.errors import CheckpointError
from tests.models.conftest import GOLDEN

FILE = Path("model/config.json")
SIZES: dict[str, Any] = {
    "model_type": "minimax_m2",
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 14,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
}
EXPERTS = MoeConfig(256, 8, 14, scores="sigmoid", bias=True, native_bias=True)


def read(**changes: Any) -> ModelConfig:
    return config_from_hf(SIZES | changes, FILE)


def test_defaults_are_those_of_transformers():
    found = read()
    assert (found.num_kv_heads, found.head_dim, found.max_positions, found.norm_eps) == (8, 128, 196608, 1e-6)
    assert (found.rope, found.qk_norm, found.moe) == (RopeConfig(5e6), "full", EXPERTS)
    assert (found.qkv_bias, found.layers) == (False, (LayerGroup((BlockKind(moe=True),), 2),))


def test_the_rotated_part_in_both_spellings():
    half = read(rotary_dim=64)
    assert half.rope == RopeConfig(5e6, fraction=0.5)
    inner = {"rope_theta": 5e6, "rope_type": "default", "partial_rotary_factor": 0.5}
    assert read(rope_parameters=inner) == read(partial_rotary_factor=0.5) == half
    assert read(rope_parameters=inner, rotary_dim=64) == half
    with pytest.raises(CheckpointError, match="rotary_dim"):
        read(rope_parameters=inner, rotary_dim=32)


@pytest.mark.parametrize(
    "config", [read(), read(rotary_dim=64, num_mtp_modules=3), read(router_jitter_noise=0.1, tie_word_embeddings=True)]
)
def test_round_trip_is_exact(config: ModelConfig):
    assert config_from_hf(config_to_hf(config, "bfloat16"), FILE) == replace(config, mtp_layers=0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"attn_type_list": [1, 0]}, "attn_type_list"),
        ({"use_qk_norm": False}, "use_qk_norm"),
        ({"qk_norm_type": "per_head"}, "qk_norm_type"),
        ({"use_routing_bias": False}, "use_routing_bias"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"shared_intermediate_size": 8}, "shared_intermediate_size"),
        ({"sliding_window": 9}, "sliding_window"),
        ({"layernorm_mlp_beta": 3.5}, "layernorm_mlp_beta"),
    ],
)
def test_refusals_name_the_key(changes: dict[str, Any], named: str):
    with pytest.raises(CheckpointError, match=named):
        read(**changes)


@pytest.mark.parametrize(
    "changes", [{"qkv_bias": True}, {"moe": replace(EXPERTS, scaling=2.0)}, {"moe": replace(EXPERTS, bias=False)}]
)
def test_what_the_config_cannot_say_is_not_exported(changes: dict[str, Any]):
    with pytest.raises(CheckpointError, match="no config for this decoder"):
        config_to_hf(replace(read(), **changes), "float32")


def test_modules_of_multi_token_prediction_are_left_out(tmp_path: Path):
    raw = json.loads((GOLDEN / "minimax_m2/config.json").read_text()) | {"num_mtp_modules": 2}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    more = {f"model.layers.{block}.enorm.weight": np.ones(3, np.float32) for block in (2, 3)}
    save_file(load_file(GOLDEN / "minimax_m2/model.safetensors") | more, tmp_path / "model.safetensors")
    assert load_pretrained(tmp_path).config.mtp_layers == 2
