"""Qwen3-VL: released configs of its text model, and what is refused. Its numbers are in test_parity.py."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distillcache.models.config import BlockKind, LayerGroup, ModelConfig, MoeConfig, RopeConfig
from distillcache.models.families import config_from_hf, config_to_hf
from distillcache.schemas.errors import CheckpointError

FILE = Path("model/config.json")
# The text_config of Qwen3-VL-4B as released, sizes made small.
TEXT = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "dtype": "bfloat16",
    "eos_token_id": 151645,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 36,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "max_position_embeddings": 262144,
    "model_type": "qwen3_vl_text",
    "num_attention_heads": 6,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
    "rope_theta": 5000000,
    "use_cache": True,
    "vocab_size": 61,
}
# And of Qwen3-VL-30B-A3B.
SPARSE = TEXT | {
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "model_type": "qwen3_vl_moe_text",
    "moe_intermediate_size": 14,
    "norm_topk_prob": True,
    "num_experts": 7,
    "num_experts_per_tok": 3,
}


def around(text: dict[str, Any], **more: Any) -> dict[str, Any]:
    name = text["model_type"].removesuffix("_text")
    return {
        "image_token_id": 151655,
        "model_type": name,
        "text_config": text,
        "tie_word_embeddings": False,
        "transformers_version": "4.57.0.dev0",
        "video_token_id": 151656,
        "vision_config": {"deepstack_visual_indexes": [5, 11, 17], "depth": 24, "hidden_size": 1024},
        "vision_end_token_id": 151653,
        "vision_start_token_id": 151652,
    } | more


def read(text: dict[str, Any], **more: Any) -> ModelConfig:
    return config_from_hf(around(text, **more), FILE)


EXPECTED = ModelConfig(
    vocab_size=61,
    hidden_size=36,
    intermediate_size=40,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    layers=(LayerGroup((BlockKind(),), 4),),
    rope=RopeConfig(5e6),
    qk_norm="head",
    max_positions=262144,
    family="qwen3_vl",
)


def test_released_configs():
    assert read(TEXT) == EXPECTED
    layers, moe = (LayerGroup((BlockKind(moe=True),), 4),), MoeConfig(7, 3, 14)
    assert read(SPARSE) == replace(EXPECTED, layers=layers, moe=moe, family="qwen3_vl_moe")
    assert read(SPARSE | {"norm_topk_prob": False}) == read(SPARSE)  # no code of transformers asks
    assert read(SPARSE | {"mlp_only_layers": [1]}).moe_blocks == (0, 2, 3)
    assert read(TEXT, tie_word_embeddings=True).tie_embeddings


def test_defaults_are_those_of_transformers():
    left = ("rope_theta", "rope_scaling", "max_position_embeddings", "head_dim", "num_key_value_heads")
    silent = {key: value for key, value in TEXT.items() if key not in left}
    found = read(silent | {"num_attention_heads": 32})
    assert (found.rope, found.max_positions) == (RopeConfig(5e5), 128000)
    assert (found.head_dim, found.num_kv_heads) == (128, 32)
    found = read({key: value for key, value in SPARSE.items() if key not in left} | {"num_attention_heads": 16})
    assert (found.head_dim, found.num_kv_heads, found.rope) == (2, 16, RopeConfig(5e5))


def test_the_text_model_is_exported_as_a_qwen3():
    dense, sparse = (config_to_hf(read(text), "bfloat16") for text in (TEXT, SPARSE))
    assert (dense["model_type"], sparse["model_type"]) == ("qwen3", "qwen3_moe")
    assert config_from_hf(dense, FILE) == replace(read(TEXT), family="qwen3")
    assert config_from_hf(sparse, FILE) == replace(read(SPARSE), family="qwen3_moe")


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (around(TEXT | {"model_type": "qwen3"}) | {"model_type": "qwen3_vl"}, "text_config"),
        (around(TEXT | {"rope_scaling": TEXT["rope_scaling"] | {"mrope_angle": 3}}), "mrope_angle"),
        (around(TEXT | {"use_bidirectional_attention": True}), "use_bidirectional_attention"),
        (around(TEXT, vocab_size=61), "vocab_size"),
        (around(TEXT) | {"text_config": None}, "text_config"),
    ],
    ids=str,
)
def test_refusals_name_the_key(raw: dict[str, Any], named: str):
    with pytest.raises(CheckpointError) as caught:
        config_from_hf(raw, FILE)
    assert named in str(caught.value)
