"""GLM-4.5: released configs in both spellings, layers of multi-token prediction, dtypes, refusals.

Its numbers are in test_parity.py.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from distillcache.models.checkpoint import load_pretrained, save_pretrained
from distillcache.models.config import BlockKind, LayerGroup, ModelConfig, MoeConfig, RopeConfig
from distillcache.models.families import config_from_hf, config_to_hf
from distillcache.schemas.errors import CheckpointError
from tests.models.conftest import GOLDEN

FILE = Path("model/config.json")
# The config.json of GLM-4.5-Air as released, sizes made small.
AIR = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": [151329, 151336, 151338],
    "first_k_dense_replace": 1,
    "head_dim": 12,
    "hidden_act": "silu",
    "hidden_size": 36,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "max_position_embeddings": 131072,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 14,
    "n_group": 1,
    "n_routed_experts": 12,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 6,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 151329,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.54.1",
    "use_cache": True,
    "use_qk_norm": False,
    "vocab_size": 61,
}
BIAS = "mlp.gate.e_score_correction_bias"


def read(**changes: Any) -> ModelConfig:
    raw = AIR | changes
    return config_from_hf({key: value for key, value in raw.items() if value != "absent"}, FILE)


def test_released_config():
    air = read()
    routing: dict[str, Any] = {"scores": "sigmoid", "bias": True, "native_bias": True, "float32_router": True}
    assert air.moe == MoeConfig(12, 3, 14, 14, **routing)
    assert air.rope == RopeConfig(1e6, fraction=0.5)
    assert (air.qkv_bias, air.output_bias, air.qk_norm, air.mtp_layers) == (True, False, "none", 1)
    assert air.layers == (LayerGroup((BlockKind(),), 1), LayerGroup((BlockKind(moe=True),), 2))


def test_the_rotated_part_in_both_spellings():
    """Half of a head where nothing is said, as in transformers."""
    assert read(partial_rotary_factor="absent") == read()
    new = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}
    assert read(partial_rotary_factor="absent", rope_theta="absent", rope_parameters=new) == read()
    assert read(partial_rotary_factor=1.0).rope.fraction == 1


@pytest.mark.parametrize(
    "config",
    [
        read(num_mtp_layers="absent"),
        read(n_group=4, topk_group=2, use_qk_norm=True, n_shared_experts=3, routed_scaling_factor=2.5),
        read(first_k_dense_replace=0, norm_topk_prob=False, n_shared_experts=0, partial_rotary_factor=1.0),
        read(first_k_dense_replace=3, rope_scaling={"type": "yarn", "factor": 4.0}, tie_word_embeddings=True),
    ],
)
def test_round_trip_is_exact(config: ModelConfig):
    assert config_from_hf(config_to_hf(config, "bfloat16"), FILE) == replace(config, mtp_layers=0)


def checkpoint(directory: Path, layers: list[int], **changes: Any) -> Path:
    """The golden model of 3 blocks, with more tensors under the numbers of these layers."""
    raw = json.loads((GOLDEN / "glm4_moe/config.json").read_text()) | changes
    tensors = load_file(GOLDEN / "glm4_moe/model.safetensors")
    for layer in layers:
        more = {f"model.layers.{layer}.{name}": np.ones((3, 5), np.float32) for name in ("eh_proj.weight", BIAS)}
        tensors |= more | {f"model.layers.{layer}.shared_head.norm.weight": np.ones(3, np.float32)}
    (directory / "config.json").write_text(json.dumps(raw))
    save_file(tensors, directory / "model.safetensors")
    return directory


def test_layers_of_multi_token_prediction_are_left_out(tmp_path: Path):
    """bfloat16 weights beside float32 biases stay so, whatever the left-out layer's dtype, and are exported so."""
    decoder = load_pretrained(checkpoint(tmp_path, [3]))
    assert decoder.embed[...].dtype == jnp.bfloat16
    assert nnx.state(decoder)["groups"][1]["blocks"][0]["mlp"]["router_bias"][...].dtype == jnp.float32
    save_pretrained(decoder, tmp_path / "out")
    before, after = load_file(GOLDEN / "glm4_moe/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert {name: (value.dtype, value.tobytes()) for name, value in after.items()} == {
        name: (value.dtype, value.tobytes()) for name, value in before.items()
    }
    assert {str(value.dtype) for name, value in after.items() if name.endswith(BIAS)} == {"float32"}


@pytest.mark.parametrize(
    ("layers", "changes", "named"),
    [
        ([3], {"num_nextn_predict_layers": 0}, "layers.3."),
        ([3, 4], {}, "layers.4."),
        ([3], {"num_hidden_layers": 2}, "layers.3."),
    ],
)
def test_only_the_stated_layers_are_left_out(layers: list[int], changes: dict[str, Any], named: str, tmp_path: Path):
    with pytest.raises(CheckpointError, match="not those of its config") as caught:
        load_pretrained(checkpoint(tmp_path, layers, **changes))
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"new_trick": 3}, "new_trick"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"moe_layer_freq": 2}, "moe_layer_freq"),
        ({"n_routed_experts": 0}, "n_routed_experts"),
        ({"num_local_experts": 11}, "num_local_experts"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.25}, "even head width"),
        ({"n_group": 5}, "groups"),
        ({"n_group": 4, "topk_group": "2"}, "topk_group"),
        ({"n_group": 4, "num_experts_per_tok": 4}, "can choose from"),
        ({"use_qk_norm": 1}, "use_qk_norm"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace"),
    ],
)
def test_refusals_name_the_key(changes: dict[str, Any], named: str):
    with pytest.raises(CheckpointError) as caught:
        read(**changes)
    assert named in str(caught.value)
    assert str(FILE) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"layers": (LayerGroup((BlockKind(), BlockKind(4, moe=True)), 2),)}, "2 kinds of blocks"),
        ({"layers": (LayerGroup((BlockKind(4, moe=True),), 2),)}, "window=4"),
        ({"output_bias": True}, "bias of the output projection"),
        ({"moe": replace(read().moe_config, shared_size=15)}, "shared expert of 15"),
    ],
)
def test_what_the_config_cannot_say_is_not_exported(changes: dict[str, Any], found: str):
    with pytest.raises(CheckpointError, match="no config for this decoder") as caught:
        config_to_hf(replace(read(), **changes), "float32")
    assert found in str(caught.value)
