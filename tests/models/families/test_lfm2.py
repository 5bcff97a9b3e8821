"""LFM2 and LFM2-MoE: widths as transformers rounds them, both spellings of keys, defaults, round trips, refusals.

Their numbers are in test_parity.py and layers/recurrent/test_short_conv.py.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distillcache.models.config import BlockKind, LayerGroup, ModelConfig, MoeConfig, RopeConfig, ShortConvConfig
from distillcache.models.families import config_from_hf, config_to_hf
from distillcache.schemas.errors import CheckpointError

FILE = Path("model/config.json")
DENSE = {
    "model_type": "lfm2",
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "full_attn_idxs": [1, 3],
}
SPARSE = {key: value for key, value in DENSE.items() if key != "full_attn_idxs"} | {
    "model_type": "lfm2_moe",
    "layer_types": ["conv", "full_attention"] * 2,
}
CONV, FULL = BlockKind(mixer="short_conv"), BlockKind()


def read(raw: dict[str, Any], **changes: Any) -> ModelConfig:
    return config_from_hf({key: value for key, value in (raw | changes).items() if value != "absent"}, FILE)


def test_what_a_short_config_means():
    dense = ModelConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=256,  # 64, up to a multiple of 256
        num_heads=8,
        num_kv_heads=8,
        head_dim=6,
        layers=(LayerGroup((CONV, FULL), 2),),
        rope=RopeConfig(1e6),
        norm_eps=1e-5,
        tie_embeddings=True,
        qk_norm="head",
        short_conv=ShortConvConfig(channels=48, taps=3),
        max_positions=128_000,
        family="lfm2",
    )
    assert read(DENSE) == dense
    kinds = (CONV, FULL, replace(CONV, moe=True), replace(FULL, moe=True))
    moe = MoeConfig(32, 4, 1792, scores="sigmoid", bias=True, native_bias=True, sum_eps=1e-6)
    expected = replace(dense, intermediate_size=96, layers=(LayerGroup(kinds, 1),), moe=moe, family="lfm2_moe")
    assert read(SPARSE) == expected


@pytest.mark.parametrize(
    "raw",
    [DENSE, DENSE | {"layer_types": ["conv"] * 4, "block_ff_dim": 1000, "tie_embedding": False}, SPARSE],
    ids=["dense", "convolutions alone", "sparse"],
)
def test_defaults_are_those_of_the_installed_transformers(raw: dict[str, Any]):
    """The shortest config.json means what transformers writes out when it has read it."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra `parity`)")
    assert config_from_hf(transformers.AutoConfig.for_model(**raw).to_dict(), FILE) == read(raw)


@pytest.mark.parametrize(
    ("changes", "width"),
    [
        ({"block_auto_adjust_ff_dim": False}, 96),
        ({"block_ffn_dim_multiplier": 1.1, "block_multiple_of": 8}, 72),
        ({"block_multiple_of": 1, "intermediate_size": 100}, 66),
        ({"block_ff_dim": 12288}, 8192),
        ({"block_ff_dim": 6656, "intermediate_size": "absent"}, 4608),
    ],
    ids=str,
)
def test_width_of_an_mlp(changes: dict[str, Any], width: int):
    assert read(DENSE, **changes).intermediate_size == width


@pytest.mark.parametrize(
    "config",
    [
        read(DENSE, conv_bias=True, conv_L_cache=4, tie_embedding=False, rope_theta=5e6, head_dim=10),
        read(SPARSE, use_expert_bias=False, norm_topk_prob=False, routed_scaling_factor=2.5, num_dense_layers=0),
        read(SPARSE, num_dense_layers=4, norm_eps=1e-6),
    ],
    ids=["dense", "sparse", "without experts"],
)
def test_round_trip_is_exact(config: ModelConfig):
    assert config_from_hf(config_to_hf(config, "float32"), FILE) == config


def test_keys_of_other_code_change_nothing():
    more = {"block_dim": 48, "conv_dim": 48, "conv_dim_out": 48, "num_heads": 8, "theta": 1e6, "block_norm_eps": 1e-6}
    more |= {"block_use_swiglu": True, "use_pos_enc": True, "block_mlp_init_scale": 1.0, "conv_use_xavier_init": True}
    assert read(DENSE, **more) == read(DENSE)
    assert read(SPARSE, **more, full_attn_idxs=[1, 3]) == read(SPARSE)


@pytest.mark.parametrize(
    ("raw", "changes", "named"),
    [
        (DENSE, {"conv_dim": 96}, "conv_dim"),
        (DENSE, {"hidden_act": "gelu"}, "hidden_act"),
        (DENSE, {"layer_types": ["conv", "linear_attention"] * 2}, "layer_types"),
        (DENSE, {"full_attn_idxs": [4]}, "full_attn_idxs"),
        (DENSE, {"block_use_swiglu": False}, "block_use_swiglu"),
        (DENSE, {"num_experts": 8}, "num_experts"),
        (DENSE, {"theta": 5e5, "rope_theta": 1e6}, "theta"),
        (SPARSE, {"layer_types": None}, "layer_types"),
        (SPARSE, {"sliding_window": 9}, "sliding_window"),
    ],
)
def test_refusals_name_the_key(raw: dict[str, Any], changes: dict[str, Any], named: str):
    with pytest.raises(CheckpointError) as caught:
        read(raw, **changes)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (replace(read(DENSE), hidden_size=40), "48 channels"),
        (replace(read(DENSE), layers=(LayerGroup((CONV, BlockKind(4)), 2),)), "window=4"),
        (replace(read(SPARSE), layers=(LayerGroup((replace(CONV, moe=True), FULL), 2),)), "dense blocks behind"),
    ],
    ids=["channels", "a window", "dense last"],
)
def test_decoders_that_no_config_can_say(config: ModelConfig, named: str):
    with pytest.raises(CheckpointError, match="no config for this decoder") as caught:
        config_to_hf(config, "float32")
    assert named in str(caught.value)
