"""gpt-oss: the released config, defaults, refusals, and its packed weights.

Its numbers are in test_parity.py; those of MXFP4 in test_packed.py.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from distillcache.models.checkpoint import load_pretrained, save_pretrained
from distillcache.models.config import BlockKind, ClampedGlu, LayerGroup, ModelConfig, MoeConfig, RopeConfig
from distillcache.models.decoder import Decoder
from distillcache.models.families import config_from_hf, config_to_hf, layout_of
from distillcache.models.files.tensors import tensor_slots
from distillcache.schemas.errors import CheckpointError

FILE = Path("model/config.json")
SLIDING, FULL = "sliding_attention", "full_attention"
PACKING = {
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"],
    "quant_method": "mxfp4",
}
# The config of gpt-oss-20b as released, sizes made small.
RELEASED: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "layer_types": [SLIDING, FULL] * 2,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 16,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": PACKING,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 61,
}
YARN = RopeConfig(150000.0, "yarn", 32.0, 4096, truncate=False)


def read(**changes: Any) -> ModelConfig:
    return config_from_hf({key: value for key, value in (RELEASED | changes).items() if value != "absent"}, FILE)


def test_released_config():
    found = read()
    assert found.layers == (LayerGroup((BlockKind(128, moe=True), BlockKind(moe=True)), 2),)
    assert found.moe == MoeConfig(32, 4, 64, logit_bias=True, expert_bias=True, clamped=ClampedGlu(7.0, 1.702))
    assert (found.sinks, found.qkv_bias, found.output_bias, found.rope) == (True, True, True, YARN)
    assumed = ("attention_bias", "head_dim", "layer_types", "swiglu_limit", "experts_per_token", "quantization_config")
    assert read(**dict.fromkeys(assumed, "absent")) == found


def test_the_scaling_that_is_assumed():
    assert read(rope_scaling="absent").rope == YARN
    assert read(rope_scaling="absent", rope_theta="absent").rope == YARN
    assert read(rope_scaling="absent", rope_theta=1e4).rope == replace(YARN, theta=1e4)
    new = {"rope_type": "default", "rope_theta": 5e4}
    assert read(rope_scaling="absent", rope_theta="absent", rope_parameters=new).rope == RopeConfig(5e4)


@pytest.mark.parametrize(
    "config",
    [
        read(),
        read(attention_bias=False, layer_types=[FULL] * 4, swiglu_alpha=1.5, tie_word_embeddings=True),
        read(num_local_experts=7, num_experts_per_tok=2, experts_per_token=2, rope_scaling=None),
    ],
)
def test_round_trip_is_exact(config: ModelConfig):
    raw = config_to_hf(config, "bfloat16")
    assert config_from_hf(raw, FILE) == config
    assert "quantization_config" not in raw


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"new_trick": 3}, "new_trick"),
        ({"experts_per_token": 3}, "experts_per_token"),
        ({"num_local_experts": 3}, "can choose from"),
        ({"swiglu_limit": 0}, "swiglu_limit"),
        ({"layer_types": [FULL]}, "layer_types"),
        ({"sliding_window": None}, "sliding_window"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"quantization_config": PACKING | {"group": 16}}, "quantization_config.group"),
    ],
)
def test_refusals_name_the_key(changes: dict[str, Any], named: str):
    with pytest.raises(CheckpointError) as caught:
        read(**changes)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"output_bias": False},
        {"layers": (LayerGroup((BlockKind(),), 2),)},
        {"moe": replace(read().moe_config, shared_size=64)},
        {"moe": replace(read().moe_config, clamped=None)},
    ],
)
def test_what_the_config_cannot_say_is_not_exported(changes: dict[str, Any]):
    with pytest.raises(CheckpointError, match="no config for this decoder"):
        config_to_hf(replace(read(), **changes), "float32")


def pack(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers of at most 3, `[E, D, F]`, as MXFP4 stores them with powers of one: each number on its own."""
    codes = np.array([0, 2, 4, 5])[np.abs(values).astype(int)] + 8 * (values < 0)
    turned = codes.transpose(0, 2, 1).reshape(values.shape[0], values.shape[2], -1, 32)
    blocks = np.ascontiguousarray(turned[..., ::2] | turned[..., 1::2] << 4, np.uint8)
    return blocks, np.full(turned.shape[:-1], 127, np.uint8)


def whole_numbers(config: ModelConfig) -> dict[str, np.ndarray]:
    """Tensors of such a checkpoint, from -3 to 3."""
    state = nnx.to_flat_state(nnx.state(nnx.eval_shape(lambda: Decoder(config))))
    shapes, rng = {path: value.get_value().shape for path, value in state}, np.random.default_rng(0)
    stored = {
        slot.name: slot.stored_shape(shapes[slot.path][len(slot.index) :])
        for slot in tensor_slots(config, layout_of(config))
    }
    return {name: rng.integers(-3, 4, shape).astype(ml_dtypes.bfloat16) for name, shape in stored.items()}


def test_packed_experts_are_unpacked_and_exported_as_floats(tmp_path: Path):
    """A checkpoint as OpenAI's, of experts that MXFP4 can hold, loads as the same one in bfloat16."""
    small = {"num_hidden_layers": 2, "layer_types": [SLIDING, FULL], "num_local_experts": 5, "head_dim": 8}
    config = read(**small)
    tensors, packed = whole_numbers(config), {}
    for name, tensor in tensors.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            packed[f"{name}_blocks"], packed[f"{name}_scales"] = pack(tensor.astype(np.float32))
        else:
            packed[name] = tensor
    assert len(packed) == len(tensors) + 4
    save_file(packed, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(RELEASED | small))
    found = load_pretrained(tmp_path)
    assert found.config == config
    assert found.embed[...].dtype == jnp.bfloat16
    gate = nnx.state(found)["groups"][0]["blocks"][0]["mlp"]["gate"][...]
    fused = tensors["model.layers.0.mlp.experts.gate_up_proj"]
    np.testing.assert_array_equal(gate[0], fused[..., ::2])  # gate and up in turns
    save_pretrained(found, tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(again[name], tensor)
