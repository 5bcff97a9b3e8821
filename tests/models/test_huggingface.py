"""config.json in and out: both spellings of transformers, defaults, round trips, and refusals that name the key."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models.config import BlockKind, LayerGroup, ModelConfig, RopeConfig
from models.huggingface import config_from_hf, config_to_hf
from schemas.errors import CheckpointError

FILE = Path("model/config.json")
LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
}


def read(**changes: Any) -> ModelConfig:
    return config_from_hf(LLAMA | changes, FILE)


def test_defaults_are_those_of_transformers():
    llama = read()
    assert (llama.num_kv_heads, llama.head_dim, llama.max_positions, llama.norm_eps) == (6, 8, 2048, 1e-6)
    assert llama.rope == RopeConfig()
    assert (llama.tie_embeddings, llama.attention_bias, llama.mlp_bias) == (False, False, False)
    mistral = read(model_type="mistral", num_attention_heads=8)
    assert mistral.layers == (LayerGroup((BlockKind(window=4096),), 3),)
    assert (mistral.num_kv_heads, mistral.max_positions) == (8, 131072)
    assert read(model_type="mistral", num_attention_heads=8, sliding_window=None).layers[0].pattern == (BlockKind(),)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"rope_theta": 5e5}, RopeConfig(5e5)),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, RopeConfig(5e5)),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}}, RopeConfig(kind="linear", factor=2.0)),
        (
            {"rope_scaling": {"rope_type": "dynamic", "type": "dynamic", "factor": 2}},
            RopeConfig(kind="dynamic", factor=2),
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                }
            },
            RopeConfig(kind="llama3", factor=8.0, original_max_positions=8192),
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6, "truncate": False}},
            RopeConfig(1e6, "yarn", 4.0, original_max_positions=2048, truncate=False),
        ),
    ],
)
def test_rope_in_both_spellings(found: dict[str, Any], expected: RopeConfig):
    assert read(**found).rope == expected


@pytest.mark.parametrize(
    ("name", "ours"),
    [("silu", "silu"), ("swish", "silu"), ("gelu", "gelu"), ("gelu_new", "gelu_tanh"), ("relu", "relu")],
)
def test_activations(name: str, ours: str):
    assert read(hidden_act=name).activation == ours


@pytest.mark.parametrize(
    "config",
    [
        read(),
        read(num_key_value_heads=2, head_dim=10, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
        read(hidden_act="gelu_new", rms_norm_eps=1e-5, max_position_embeddings=100),
        read(model_type="mistral", num_key_value_heads=2, num_attention_heads=10, sliding_window=7),
        *(
            replace(read(), rope=rope)
            for rope in (
                RopeConfig(5e5),
                RopeConfig(kind="linear", factor=2.0),
                RopeConfig(kind="dynamic", factor=2.0),
                RopeConfig(5e5, "llama3", 32.0, 8192),
                RopeConfig(1e6, "yarn", 4.0, 512, attention_factor=1.5, truncate=False, beta_fast=16.0),
                RopeConfig(1e6, "yarn", 4.0, 512, mscale=0.7, mscale_all_dim=0.5),
            )
        ),
    ],
)
def test_round_trip_is_exact(config: ModelConfig):
    assert config_from_hf(config_to_hf(config, "float32"), FILE) == config


def test_a_llama_that_llama_configs_cannot_say_is_written_as_a_mistral():
    odd = replace(read(), num_heads=5, num_kv_heads=1, head_dim=8)
    raw = config_to_hf(odd, "float32")
    assert (raw["model_type"], raw["sliding_window"]) == ("mistral", None)
    assert config_from_hf(raw, FILE) == replace(odd, family="mistral")
    with pytest.raises(CheckpointError, match="no config for this decoder"):
        config_to_hf(replace(odd, attention_bias=True), "float32")


def test_mixed_blocks_cannot_be_exported():
    mixed = replace(read(), layers=(LayerGroup((BlockKind(), BlockKind(4)), 2),))
    with pytest.raises(CheckpointError, match="plan of layers"):
        config_to_hf(mixed, "float32")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"new_trick": 3}, "new_trick"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"sliding_window": 9}, "sliding_window"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}}, "beta_fast"),
        ({"rope_scaling": [2.0]}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"factor": 4.0}}, "disagree"),
        ({"hidden_act": "relu2"}, "hidden_act"),
        ({"vocab_size": None}, "vocab_size"),
        ({"hidden_size": "48"}, "hidden_size"),
        ({"num_key_value_heads": 4}, "do not divide"),
        ({"head_dim": 7}, "even head width"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias"),
    ],
)
def test_refusals_name_the_key(changes: dict[str, Any], named: str):
    with pytest.raises(CheckpointError) as caught:
        read(**changes)
    message = str(caught.value)
    assert named in message
    assert str(FILE) in message
    assert "next" in message
