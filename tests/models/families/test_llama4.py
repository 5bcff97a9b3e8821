"""Llama 4: released configs, what transformers fills in, refusals, and the language model inside a multimodal one.

Its numbers are in test_parity.py.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from distillcache.models.checkpoint import load_pretrained, read_config, save_pretrained
from distillcache.models.config import BlockKind, LayerGroup, ModelConfig, MoeConfig, RopeConfig, TemperatureConfig
from distillcache.models.decoder import Decoder
from distillcache.models.families import config_from_hf, config_to_hf
from distillcache.schemas.errors import CheckpointError
from tests.models.conftest import GOLDEN

FILE = Path("model/config.json")
TEXT = {
    "model_type": "llama4_text",
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
}
# The text_config of Llama 4 Scout as Meta released it, sizes made small and the lists of 48 blocks cut to 4.
SCOUT = TEXT | {
    "_attn_implementation_autoset": True,
    "attention_bias": False,
    "attention_chunk_size": 8192,
    "attn_scale": 0.1,
    "attn_temperature_tuning": 4,
    "cache_implementation": "hybrid",
    "floor_scale": 8192,
    "for_llm_compressor": False,
    "head_dim": 128,
    "interleave_moe_layer_step": 1,
    "intermediate_size_mlp": 80,
    "max_position_embeddings": 10485760,
    "moe_layers": [0, 1, 2, 3],
    "no_rope_layers": [1, 1, 1, 0],
    "num_experts_per_tok": 1,
    "num_key_value_heads": 4,
    "num_local_experts": 16,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 16.0,
        "high_freq_factor": 1.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "use_qk_norm": True,
}
LOCAL, GLOBAL = BlockKind(chunk=8192), BlockKind(rotary=False)


def read(**changes: Any) -> ModelConfig:
    return config_from_hf(TEXT | changes, FILE)


def with_experts(kind: BlockKind) -> BlockKind:
    return replace(kind, moe=True)


def test_scout():
    assert config_from_hf({"model_type": "llama4", "text_config": SCOUT, "vision_config": {}}, FILE) == ModelConfig(
        vocab_size=61,
        hidden_size=48,
        intermediate_size=80,
        num_heads=8,
        num_kv_heads=4,
        head_dim=128,
        layers=(LayerGroup((with_experts(LOCAL),), 3), LayerGroup((with_experts(GLOBAL),), 1)),
        rope=RopeConfig(500000.0, "llama3", 16.0, 8192, 1.0, 1.0, interleaved=True),
        norm_eps=1e-5,
        qk_norm="l2",
        temperature=TemperatureConfig(0.1, 8192),
        moe=MoeConfig(16, 1, 40, 40, scores="sigmoid_input", renormalise=False),
        max_positions=10485760,
        family="llama4",
    )


def test_defaults_are_those_of_transformers():
    found = read()
    kinds = tuple(map(with_experts, (LOCAL, LOCAL, LOCAL, GLOBAL)))
    assert (found.kinds, found.qk_norm, found.temperature) == (kinds, "l2", TemperatureConfig(0.1, 8192))
    assert (found.num_kv_heads, found.head_dim, found.intermediate_size) == (8, 128, 16384)
    assert (found.max_positions, found.norm_eps, found.rope) == (131072, 1e-5, RopeConfig(5e5, interleaved=True))
    assert found.moe_config == MoeConfig(16, 1, 40, 40, scores="sigmoid_input", renormalise=False)


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({"interleave_moe_layer_step": 2}, (LOCAL, with_experts(LOCAL), LOCAL, with_experts(GLOBAL))),
        ({"interleave_moe_layer_step": 2, "moe_layers": [0]}, (with_experts(LOCAL), LOCAL, LOCAL, GLOBAL)),
        ({"moe_layers": [], "no_rope_layer_interval": 3}, (LOCAL, LOCAL, GLOBAL, LOCAL)),
        ({"moe_layers": [], "no_rope_layers": []}, (LOCAL, LOCAL, LOCAL, GLOBAL)),
        # As MobileLLM-R1: dense, and more entries than blocks.
        (
            {
                "moe_layers": [],
                "interleave_moe_layer_step": 0,
                "num_local_experts": 0,
                "num_experts_per_tok": 0,
                "no_rope_layers": [1] * 6,
            },
            (LOCAL,) * 4,
        ),
        (
            {"moe_layers": [], "layer_types": ["full_attention", "chunked_attention"] * 2, "attention_chunk_size": 7},
            (BlockKind(), BlockKind(chunk=7), BlockKind(), BlockKind(chunk=7, rotary=False)),
        ),
        (
            {"moe_layers": [], "layer_types": ["full_attention"] * 4, "attention_chunk_size": None},
            (BlockKind(), BlockKind(), BlockKind(), GLOBAL),
        ),
    ],
)
def test_kinds_of_blocks(changes: dict[str, Any], kinds: tuple[BlockKind, ...]):
    found = read(**changes)
    assert found.kinds == kinds
    assert (found.moe is None) == (not found.moe_blocks)


@pytest.mark.parametrize(
    "config",
    [
        read(),
        read(**SCOUT),
        read(interleave_moe_layer_step=2, num_experts_per_tok=3, attention_bias=True, use_qk_norm=False),
        read(moe_layers=[1, 2], no_rope_layers=[0, 0, 1, 1], attn_temperature_tuning=False, tie_word_embeddings=True),
        read(moe_layers=[], layer_types=["full_attention"] * 4, hidden_act="gelu"),
    ],
)
def test_round_trip_is_exact(config: ModelConfig):
    assert config_from_hf(config_to_hf(config, "float32"), FILE) == config


def test_steps_are_written_where_they_say_the_same_as_the_list():
    assert config_to_hf(read(interleave_moe_layer_step=2), "float32")["interleave_moe_layer_step"] == 2
    assert config_to_hf(read(moe_layers=[]), "float32")["interleave_moe_layer_step"] == 0


@pytest.mark.parametrize("kinds", [(BlockKind(chunk=3), BlockKind(chunk=4)), (BlockKind(window=3),)])
def test_what_a_config_cannot_say_is_not_exported(kinds: tuple[BlockKind, ...]):
    with pytest.raises(CheckpointError, match="no config for this decoder"):
        config_to_hf(replace(read(moe_layers=[]), layers=(LayerGroup(kinds, 2),)), "float32")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"new_trick": 3}, "new_trick"),
        ({"moe_layers": [4]}, "moe_layers"),
        ({"no_rope_layers": [1, 1, 0]}, "no_rope_layers"),
        ({"no_rope_layers": [1, 1, 1, 2]}, "no_rope_layers"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types"),
        ({"attention_chunk_size": None}, "attention_chunk_size"),
        ({"attn_temperature_tuning": "yes"}, "attn_temperature_tuning"),
        ({"num_local_experts": 0}, "num_local_experts"),
        ({"mlp_bias": True}, "mlp_bias"),
    ],
)
def test_refusals_name_the_key(changes: dict[str, Any], named: str):
    with pytest.raises(CheckpointError) as caught:
        read(**changes)
    assert named in str(caught.value)
    with pytest.raises(CheckpointError) as caught:
        config_from_hf({"model_type": "llama4", "text_config": TEXT | changes}, FILE)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"text_config": None}, "text_config"),
        ({"text_config": TEXT | {"model_type": "llama"}}, "text_config"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"hidden_size": 48}, "hidden_size"),
        ({"audio_config": {}}, "audio_config"),
    ],
)
def test_refusals_of_multimodal_configs(changes: dict[str, Any], named: str):
    with pytest.raises(CheckpointError) as caught:
        config_from_hf({"model_type": "llama4", "text_config": TEXT} | changes, FILE)
    assert named in str(caught.value)


def parameters(decoder: Decoder) -> dict[Any, np.ndarray]:
    return {path: np.asarray(value.get_value()) for path, value in nnx.to_flat_state(nnx.state(decoder))}


def assert_same(found: dict[Any, np.ndarray], expected: dict[Any, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)


def write_multimodal(directory: Path, **more: np.ndarray) -> None:
    """The text model of a golden directory, inside a multimodal one."""
    tensors = load_file(GOLDEN / "llama4" / "model.safetensors")
    inside = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    directory.mkdir(exist_ok=True)
    save_file(inside | more, directory / "model.safetensors")
    text = json.loads((GOLDEN / "llama4" / "config.json").read_text())
    config = {"model_type": "llama4", "text_config": text, "vision_config": {"hidden_size": 3}, "boi_token_index": 60}
    (directory / "config.json").write_text(json.dumps(config))


def test_the_language_model_inside_a_multimodal_one(tmp_path: Path):
    """Foreign tensors count nowhere, not even for the dtype."""
    foreign = {name: np.ones((3, 2)) for name in ("vision_model.a", "multi_modal_projector.linear_1.weight")}
    write_multimodal(tmp_path, **foreign)
    found, text = load_pretrained(tmp_path), load_pretrained(GOLDEN / "llama4")
    assert found.config == replace(text.config, family="llama4")
    assert_same(parameters(found), parameters(text))


@pytest.mark.parametrize("name", ["audio_model.a", "lm_head.weight", "language_model.model.layers.9.a"])
def test_an_unknown_tensor_in_a_multimodal_model_is_refused(name: str, tmp_path: Path):
    write_multimodal(tmp_path, **{name: np.ones((3, 2), np.float32)})
    with pytest.raises(CheckpointError, match=f"(?s)unknown.*{name}"):
        load_pretrained(tmp_path)


def test_a_multimodal_model_is_exported_as_its_language_model(tmp_path: Path):
    """From a directory that transformers wrote."""
    original = GOLDEN / "llama4_multimodal"
    save_pretrained(load_pretrained(original), tmp_path / "export")
    prefix = "language_model."
    theirs = {
        name.removeprefix(prefix): tensor
        for name, tensor in load_file(original / "model.safetensors").items()
        if name.startswith(prefix)
    }
    assert_same(load_file(tmp_path / "export" / "model.safetensors"), theirs)
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llama4_text", ["Llama4ForCausalLM"])
    assert read_config(tmp_path / "export") == replace(read_config(original), family="llama4_text")
