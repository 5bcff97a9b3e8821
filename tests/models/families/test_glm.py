"""GLM-4, GLM-4.7-Flash and GLM-5: defaults, kinds of blocks, refusals, exports. Their numbers are in test_parity.py."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distillcache.models.config import BlockKind, IndexConfig, LatentConfig, ModelConfig, RopeConfig, plan_layers
from distillcache.models.families import config_from_hf, config_to_hf
from distillcache.models.surgery.sizes import changed_config
from distillcache.schemas.config.student import SurgeryOp
from distillcache.schemas.errors import CheckpointError, ConfigError

FILE = Path("model/config.json")
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
}
LITE, DSA = "glm4_moe_lite", "glm_moe_dsa"
DENSE, SPARSE, SHARING = BlockKind(), BlockKind(moe=True), BlockKind(moe=True, taken_choice=True)


def read(family: str, **changes: Any) -> ModelConfig:
    return config_from_hf(SIZES | {"model_type": family} | changes, FILE)


def test_defaults_are_those_of_transformers():
    dense = read("glm4")
    assert (dense.num_kv_heads, dense.head_dim, dense.max_positions, dense.norm_eps) == (2, 128, 131072, 1.5625e-7)
    assert (dense.qkv_bias, dense.output_bias, dense.norms) == (True, False, "both")
    assert dense.rope == RopeConfig(fraction=0.5, interleaved=True)
    lite, sparse = read(LITE), read(DSA)
    assert lite.latent == LatentConfig(768, 512, 192, 64, 256)
    assert sparse.latent == LatentConfig(2048, 512, 192, 64, 256, IndexConfig(32, 128, 2048, interleaved=True))
    assert lite.kinds == (DENSE, *[SPARSE] * 4)
    assert sparse.kinds == (DENSE, DENSE, DENSE, SPARSE, SPARSE)
    for config, experts in ((lite, (64, 4, 1536, 1536, 1.8)), (sparse, (256, 8, 2048, 2048, 2.5))):
        moe = config.moe_config
        assert (moe.num_experts, moe.top_k, moe.expert_size, moe.shared_size, moe.scaling) == experts
        assert (moe.groups, config.norm_eps, config.max_positions, config.mtp_layers) == (1, 1e-5, 202752, 1)


@pytest.mark.parametrize(
    ("changes", "takes"),
    [
        ({}, [False] * 5),
        ({"indexer_types": ["full", "shared", "full", "full", "shared"]}, [False, True, False, False, True]),
        ({"index_topk_pattern": "FSSFS"}, [False, True, True, False, True]),
        ({"index_topk_freq": 3}, [False, False, True, True, False]),
        ({"index_topk_freq": 2, "index_skip_topk_offset": 1}, [False, True, False, True, False]),
    ],
)
def test_blocks_that_take_choices_over(changes: dict[str, Any], takes: list[bool]):
    assert [kind.taken_choice for kind in read(DSA, **changes).kinds] == takes


@pytest.mark.parametrize(
    "config",
    [
        read("glm4"),
        read("glm4", attention_bias=False, partial_rotary_factor=1.0, tie_word_embeddings=True),
        read("glm4", rope_scaling={"type": "yarn", "factor": 4.0}),
        read(LITE, q_lora_rank=None, rope_interleave=False, attention_bias=True),
        read(LITE, mlp_layer_types=["sparse", "dense", "sparse", "sparse", "dense"], n_group=8, topk_group=3),
        read(DSA, index_topk=7, indexer_types=["full", "full", "shared", "shared", "full"]),
    ],
)
def test_round_trip_is_exact(config: ModelConfig):
    assert config_from_hf(config_to_hf(config, "bfloat16"), FILE) == replace(config, mtp_layers=0)


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("glm4", {"mlp_bias": True}, "mlp_bias"),
        ("glm4", {"sliding_window": 9}, "sliding_window"),
        ("glm4", {"partial_rotary_factor": 0.01}, "even head width"),
        (LITE, {"head_dim": 256}, "head_dim"),
        (LITE, {"first_k_dense_replace": 2}, "mlp_layer_types"),
        (LITE, {"mlp_layer_types": ["dense"] * 4}, "mlp_layer_types"),
        (LITE, {"index_topk": 4}, "index_topk"),
        (DSA, {"indexer_types": ["shared", "full", "full", "full", "full"]}, "indexer_types"),
        (DSA, {"index_topk_pattern": "FSSX"}, "index_topk_pattern"),
        (DSA, {"index_topk_pattern": 3}, "index_topk_pattern"),
        (DSA, {"indexer_rope_interleave": False}, "indexer_rope_interleave"),
        (DSA, {"rope_interleave": False}, "rope_interleave"),
        (DSA, {"index_head_dim": 32}, "index_head_dim"),
        (DSA, {"q_lora_rank": None}, "q_lora_rank"),
        (DSA, {"layer_types": ["full_attention"] * 5}, "layer_types"),
        (DSA, {"index_kpool": 4}, "index_kpool"),
    ],
)
def test_refusals_name_the_key(family: str, changes: dict[str, Any], named: str):
    with pytest.raises(CheckpointError, match=named):
        read(family, **changes)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("glm4", {"output_bias": True}),
        ("glm4", {"layers": plan_layers([BlockKind(4)])}),
        (LITE, {"layers": plan_layers([BlockKind(4, moe=True)])}),
        (DSA, {"latent": LatentConfig(2048, 512, 192, 64, 256)}),
    ],
)
def test_what_the_config_cannot_say_is_not_exported(family: str, changes: dict[str, Any]):
    with pytest.raises(CheckpointError, match="no config for this decoder"):
        config_to_hf(replace(read(family), **changes), "float32")


def test_surgery_keeps_a_model_whole_that_shares_choices():
    ops = [SurgeryOp(op="drop_blocks", blocks=[3])]
    assert changed_config(read(DSA), ops).kinds == (DENSE, DENSE, DENSE, SPARSE)
    with pytest.raises(ConfigError, match="more than the stream"):
        changed_config(read(DSA, index_topk_freq=3), ops)
