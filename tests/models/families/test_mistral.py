"""Ministral 3, Mistral 4 and the model with eyes around them: released configs, defaults, refusals, exports.

Their numbers are in test_parity.py.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from distillcache.models.checkpoint import load_pretrained, read_config, save_pretrained
from distillcache.models.config import BlockKind, LatentConfig, LayerGroup, ModelConfig, MoeConfig, TemperatureConfig
from distillcache.models.families import config_from_hf, config_to_hf
from distillcache.models.layers.attention import warmed
from distillcache.models.surgery import apply_surgery
from distillcache.schemas.config.student import SurgeryOp
from distillcache.schemas.errors import CheckpointError
from tests.models.conftest import GOLDEN

FILE = Path("model/config.json")
SIZES = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_attention_heads": 8,
    "num_hidden_layers": 5,
}
YARN = {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 16.0,
    "llama_4_scaling_beta": 0.1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 16384,
    "rope_theta": 1000000.0,
    "rope_type": "yarn",
    "type": "yarn",
}
# The text config of Ministral 3 8B as released, sizes made small.
MINISTRAL3: dict[str, Any] = SIZES | {
    "attention_dropout": 0.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 262144,
    "model_type": "ministral3",
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_parameters": YARN,
    "sliding_window": None,
    "use_cache": True,
}
# Of Mistral Small 4.
MISTRAL4: dict[str, Any] = SIZES | {
    "attention_bias": False,
    "first_k_dense_replace": 0,
    "head_dim": 128,
    "hidden_act": "silu",
    "kv_lora_rank": 256,
    "max_position_embeddings": 1048576,
    "model_type": "mistral4",
    "moe_intermediate_size": 14,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 4,
    "num_key_value_heads": 8,
    "q_lora_rank": 1024,
    "qk_head_dim": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_interleave": True,
    "rope_parameters": YARN
    | {"factor": 128.0, "original_max_position_embeddings": 8192, "rope_theta": 10000.0}
    | {"max_position_embeddings": 1048576, "partial_rotary_factor": 0.5},
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "v_head_dim": 128,
}
SEEING: dict[str, Any] = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "image_token_index": 10,
    "model_type": "mistral3",
    "multimodal_projector_bias": False,
    "projector_hidden_act": "gelu",
    "spatial_merge_size": 2,
    "vision_config": {"hidden_size": 1024, "model_type": "pixtral"},
    "vision_feature_layer": -1,
}
EVERYWHERE = TemperatureConfig(0.1, 16384.0, first=0, everywhere=True)


def read(raw: dict[str, Any], **changes: Any) -> ModelConfig:
    return config_from_hf({key: value for key, value in (raw | changes).items() if value != "absent"}, FILE)


def rope(raw: dict[str, Any], **changes: Any) -> dict[str, Any]:
    found = {key: value for key, value in (raw["rope_parameters"] | changes).items() if value != "absent"}
    return {"rope_parameters": found}


def test_ministral3():
    found = read(MINISTRAL3)
    kept = (*SIZES, "model_type")
    assert found == read(MINISTRAL3, **dict.fromkeys(set(MINISTRAL3) - set(kept), "absent"))
    assert found.layers == (LayerGroup((BlockKind(),), 5),)
    assert found.temperature == EVERYWHERE
    assert (found.rope.kind, found.rope.theta, found.rope.factor) == ("yarn", 1e6, 16.0)
    assert (found.head_dim, found.norm_eps, found.tie_embeddings) == (128, 1e-5, False)
    assert read(MINISTRAL3, sliding_window=7).kinds == (BlockKind(7),) * 5
    old = {key: value for key, value in YARN.items() if key != "rope_theta"}
    assert read(MINISTRAL3, rope_parameters="absent", rope_scaling=old, rope_theta=1e6) == found


@pytest.mark.parametrize("beta", [0, 0.0, None, "absent"])
def test_queries_that_do_not_grow(beta: object):
    assert read(MINISTRAL3, **rope(MINISTRAL3, llama_4_scaling_beta=beta)).temperature is None


def test_growth_beside_a_rotation_without_scaling():
    plain = {"rope_type": "default", "rope_theta": 1e6, "llama_4_scaling_beta": 0.2}
    found = read(MINISTRAL3, rope_parameters=plain | {"original_max_position_embeddings": 512})
    assert found.temperature == TemperatureConfig(0.2, 512.0, first=0, everywhere=True)
    assert (found.rope.kind, found.rope.original_max_positions) == ("default", 0)
    with pytest.raises(CheckpointError, match="original_max_position_embeddings"):
        read(MINISTRAL3, rope_parameters=plain)


def test_mistral4():
    found = read(MISTRAL4)
    assert found.latent == LatentConfig(1024, 256, 64, 64, 128)
    assert (found.head_dim, found.rope_dim, found.rope.fraction, found.rope.interleaved) == (128, 64, 1.0, True)
    assert found.moe == MoeConfig(128, 4, 14, 14)
    assert found.layers == (LayerGroup((BlockKind(moe=True),), 5),)
    assert found.temperature == replace(EVERYWHERE, floor=8192.0)
    assert found.attention_scale == pytest.approx(128**-0.5 * (0.1 * math.log(128) + 1) ** 2)
    kept = (*SIZES, "model_type", "moe_intermediate_size")
    assert found == read(MISTRAL4, **dict.fromkeys(set(MISTRAL4) - set(kept), "absent"))
    assert found == read(MISTRAL4, **rope(MISTRAL4, partial_rotary_factor="absent"))


@pytest.mark.parametrize(
    "config",
    [
        read(MINISTRAL3),
        read(MINISTRAL3, sliding_window=7, tie_word_embeddings=True, **rope(MINISTRAL3, llama_4_scaling_beta=0)),
        read(MINISTRAL3, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
        read(MINISTRAL3, **rope(MINISTRAL3, mscale=0.7, mscale_all_dim=0.9, beta_fast=4.0)),
        read(MISTRAL4),
        read(MISTRAL4, q_lora_rank=None, rope_interleave=False, attention_bias=True, tie_word_embeddings=True),
        read(MISTRAL4, n_group=8, topk_group=3, n_shared_experts=3, norm_topk_prob=False, first_k_dense_replace=2),
        *(
            read(
                MISTRAL4, qk_rope_head_dim=part, qk_nope_head_dim=rest, **rope(MISTRAL4, partial_rotary_factor="absent")
            )
            for part, rest in ((2, 47), (6, 43), (8, 5), (58, 45))
        ),
    ],
)
def test_round_trip_is_exact(config: ModelConfig):
    raw = config_to_hf(config, "bfloat16")
    assert config_from_hf(raw, FILE) == config
    assert raw["rope_parameters"]["llama_4_scaling_beta"] is not None  # transformers multiplies by it
    assert raw["rope_parameters"]["original_max_position_embeddings"]


@pytest.mark.parametrize(
    ("raw", "changes", "named"),
    [
        (MINISTRAL3, {"attention_bias": True}, "attention_bias"),
        (MINISTRAL3, {"new_trick": 3}, "new_trick"),
        (MINISTRAL3, {"layer_types": ["sliding_attention"] * 5}, "layer_types"),
        (MINISTRAL3, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (MINISTRAL3, rope(MINISTRAL3, llama_4_scaling_beta=-0.1), "llama_4_scaling_beta"),
        (MINISTRAL3, rope(MINISTRAL3, llama_4_scaling_beta="0.1"), "llama_4_scaling_beta"),
        (MINISTRAL3, rope(MINISTRAL3, new_trick=3), "new_trick"),
        (MINISTRAL3, {"rope_parameters": [1.0]}, "rope_parameters"),
        (MISTRAL4, {"num_key_value_heads": 2}, "num_key_value_heads"),
        (MISTRAL4, {"scoring_func": "sigmoid"}, "scoring_func"),
        (MISTRAL4, {"sliding_window": 9}, "sliding_window"),
        (MISTRAL4, {"n_shared_experts": 0}, "n_shared_experts"),
        (MISTRAL4, {"n_group": 5}, "groups"),
        (MISTRAL4, rope(MISTRAL4, partial_rotary_factor=0.25), "partial_rotary_factor"),
        (SEEING, {"text_config": {"model_type": "gemma2"}}, "mistral or ministral3 or mistral4"),
        (SEEING, {"text_config": 3}, "text_config"),
        (SEEING, {"text_config": MINISTRAL3 | {"new_trick": 3}}, "new_trick"),
    ],
)
def test_refusals_name_the_key(raw: dict[str, Any], changes: dict[str, Any], named: str):
    with pytest.raises(CheckpointError) as caught:
        read(raw, **changes)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("raw", "changes"),
    [
        (MINISTRAL3, {"qkv_bias": True}),
        (MINISTRAL3, {"temperature": TemperatureConfig(0.1, 16384.0)}),
        (MINISTRAL3, {"temperature": replace(EVERYWHERE, floor=512.0)}),
        (MINISTRAL3, {"layers": (LayerGroup((BlockKind(3), BlockKind()), 2),)}),
        (MISTRAL4, {"moe": replace(read(MISTRAL4).moe_config, scores="sigmoid")}),
        (MISTRAL4, {"moe": replace(read(MISTRAL4).moe_config, shared_size=0)}),
        (MISTRAL4, {"latent": None}),
        (MISTRAL4, {"attention_scale": None}),
    ],
)
def test_what_the_config_cannot_say_is_not_exported(raw: dict[str, Any], changes: dict[str, Any]):
    with pytest.raises(CheckpointError, match="no config for this decoder"):
        config_to_hf(replace(read(raw), **changes), "float32")


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (MINISTRAL3, "ministral3"),
        (MINISTRAL3 | rope(MINISTRAL3, llama_4_scaling_beta=0), "mistral"),
        ({key: value for key, value in MISTRAL4.items() if key != "tie_word_embeddings"}, "mistral4"),
        (SIZES | {"num_key_value_heads": 8, "head_dim": 6}, "mistral"),
    ],
)
def test_the_text_model_is_exported_as_itself(text: dict[str, Any], name: str):
    found = read(SEEING, text_config=text, tie_word_embeddings=True)
    assert (found.family, found.tie_embeddings) == ("mistral3", True)
    assert not read(SEEING, text_config=text | {"tie_word_embeddings": False}, tie_word_embeddings=True).tie_embeddings
    raw = config_to_hf(found, "float32")
    assert raw["model_type"] == name
    assert config_from_hf(raw, FILE) == replace(found, family=name)


@pytest.mark.parametrize("name", ["mistral3_ministral3", "mistral3_mistral4"])
def test_the_text_model_inside(name: str, tmp_path: Path):
    """Its tensors are those of the export, but for a prefix."""
    decoder = load_pretrained(GOLDEN / name)
    save_pretrained(decoder, tmp_path / "export")
    stored, alone = (load_file(folder / "model.safetensors") for folder in (GOLDEN / name, tmp_path / "export"))
    inside = {name.removeprefix("language_model."): value for name, value in stored.items()}
    assert {name for name in inside if "vision" not in name and "projector" not in name} == alone.keys()
    for tensor, value in alone.items():
        np.testing.assert_array_equal(inside[tensor], value)
    assert read_config(tmp_path / "export").family == name.removeprefix("mistral3_")


def test_queries_grow_in_steps():
    """By hand: 1 + 0.5 ln(1 + floor(p / 3)) from position 0 on; the same in blocks without rotation."""
    config = replace(read(MINISTRAL3), temperature=TemperatureConfig(0.5, 3.0, first=0, everywhere=True))
    ones, positions = jnp.ones((1, 7, 2, 3)), jnp.arange(7)[None]
    expected = [1.0] * 3 + [1 + 0.5 * np.log(2)] * 3 + [1 + 0.5 * np.log(3)]
    for kind in (BlockKind(), BlockKind(rotary=False)):
        found = warmed(ones, config, kind, positions)
        np.testing.assert_allclose(found[0, :, 1, 2], expected, rtol=1e-6)
    from_one = replace(config, temperature=TemperatureConfig(0.5, 3.0))
    np.testing.assert_array_equal(warmed(ones, from_one, BlockKind(), positions), ones)
    found = warmed(ones, from_one, BlockKind(rotary=False), positions)
    np.testing.assert_allclose(found[0, :, 0, 0], [1.0, 1.0, *expected[3:6], *expected[6:], expected[6]], rtol=1e-6)


def test_experts_stored_together_are_cut_and_put_back(tmp_path: Path):
    """Fewer experts and narrower ones: each tensor holds what is left of all of them."""
    decoder = load_pretrained(GOLDEN / "mistral4", jnp.float32)
    ops = [SurgeryOp(op="experts", to=8), SurgeryOp(op="expert_width", to=7)]
    save_pretrained(apply_surgery(decoder, ops), tmp_path / "export")
    found = load_file(tmp_path / "export" / "model.safetensors")
    assert found["model.layers.1.mlp.experts.gate_up_proj"].shape == (8, 14, 36)
    assert found["model.layers.1.mlp.experts.down_proj"].shape == (8, 36, 7)
    raw = json.loads((tmp_path / "export" / "config.json").read_text())
    assert (raw["n_routed_experts"], raw["moe_intermediate_size"]) == (8, 7)
