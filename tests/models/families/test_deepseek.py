"""DeepSeek-V2, V3 and V3.2: released configs, defaults, refusals, weights in FP8, and layers that are left out.

Its numbers are in test_parity.py.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from distillcache.models.checkpoint import load_pretrained
from distillcache.models.config import (
    BlockKind,
    IndexConfig,
    LatentConfig,
    LayerGroup,
    ModelConfig,
    MoeConfig,
    RopeConfig,
)
from distillcache.models.families import config_from_hf, config_to_hf
from distillcache.schemas.errors import CheckpointError
from tests.models.conftest import GOLDEN
from tests.models.test_checkpoint import assert_same_parameters

FILE = Path("model/config.json")
FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
# The config of DeepSeek-V3 as released, sizes made small and blocks few.
RELEASED: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 14,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 6,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 5,
    "num_key_value_heads": 6,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": FP8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 61,
}


def read(**changes: Any) -> ModelConfig:
    return config_from_hf({key: value for key, value in (RELEASED | changes).items() if value != "absent"}, FILE)


def test_released_config():
    found = read()
    assert found.latent == LatentConfig(1536, 512, 128, 64, 128)
    assert (found.head_dim, found.value_dim, found.rope_dim, found.num_kv_heads) == (192, 128, 64, 6)
    routing: dict[str, Any] = {"scores": "sigmoid", "bias": True, "native_bias": True, "float32_router": True}
    assert found.moe == MoeConfig(256, 8, 14, 14, scaling=2.5, groups=8, groups_kept=4, **routing)
    assert found.layers == (LayerGroup((BlockKind(),), 3), LayerGroup((BlockKind(moe=True),), 2))
    assert (found.rope.kind, found.rope.interleaved, found.mtp_layers) == ("yarn", True, 1)
    # 192^-0.5 (0.1 ln 40 + 1)^2, from the released code.
    assert found.attention_scale == pytest.approx(0.1352337788608801, rel=1e-12)


def test_released_config_of_v31():
    assert read(quantization_config=FP8 | {"scale_fmt": "ue8m0"}) == read()


def test_defaults_are_those_of_transformers():
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "model_type")
    found = config_from_hf({key: RELEASED[key] for key in kept}, FILE)
    assert found.latent == read().latent
    assert found.moe == replace(read().moe_config, expert_size=2048, shared_size=2048)
    assert (found.layers, found.max_positions, found.norm_eps) == (read().layers, 4096, 1e-6)
    assert found.rope == RopeConfig(interleaved=True)
    assert found.attention_scale == 192**-0.5


def test_moonlight():
    """Queries from the stream, and one group of experts."""
    found = read(q_lora_rank=None, n_group=1, topk_group=1, rope_scaling=None, num_nextn_predict_layers=0)
    assert found.latent == LatentConfig(None, 512, 128, 64, 128)
    assert (found.moe_config.groups, found.mtp_layers) == (1, 0)


@pytest.mark.parametrize(
    "config",
    [
        read(),
        read(q_lora_rank=None, rope_interleave=False, attention_bias=True, tie_word_embeddings=True),
        read(n_group=1, topk_group=1, n_shared_experts=3, norm_topk_prob=False, first_k_dense_replace=0),
        read(rope_scaling=None, v_head_dim=96, num_mtp_layers=0, num_nextn_predict_layers="absent"),
    ],
)
def test_round_trip_is_exact(config: ModelConfig):
    raw = config_to_hf(config, "bfloat16")
    assert config_from_hf(raw, FILE) == replace(config, mtp_layers=0)
    assert raw["head_dim"] == raw["qk_rope_head_dim"]  # by which transformers rotates


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"new_trick": 3}, "new_trick"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"topk_method": "greedy"}, "topk_method"),
        ({"moe_layer_freq": 2}, "moe_layer_freq"),
        ({"num_key_value_heads": 2}, "num_key_value_heads"),
        ({"head_dim": 192}, "head_dim"),
        ({"qk_rope_head_dim": 7}, "even head width"),
        ({"kv_lora_rank": 0}, "kv_lora_rank"),
        ({"n_shared_experts": 0}, "n_shared_experts"),
        ({"n_group": 5}, "groups"),
        ({"rope_interleave": 1}, "rope_interleave"),
        ({"quantization_config": FP8 | {"weight_block_size": [128]}}, "weight_block_size"),
        ({"quantization_config": {key: FP8[key] for key in FP8 if key != "weight_block_size"}}, "quantization_config"),
        ({"quantization_config": FP8 | {"activation_scheme": "static"}}, "activation_scheme"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    ],
)
def test_refusals_name_the_key(changes: dict[str, Any], named: str):
    with pytest.raises(CheckpointError) as caught:
        read(**changes)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_scale": None},
        {"latent": None},
        {"qkv_bias": True},
        {"moe": replace(read().moe_config, shared_size=0)},
        {"moe": replace(read().moe_config, scores="softmax")},
        {"layers": (LayerGroup((BlockKind(4), BlockKind(moe=True)), 2),)},
    ],
)
def test_what_the_config_cannot_say_is_not_exported(changes: dict[str, Any]):
    with pytest.raises(CheckpointError, match="no config for this decoder"):
        config_to_hf(replace(read(), **changes), "float32")


V2: dict[str, Any] = {
    "model_type": "deepseek_v2",
    "scoring_func": "softmax",
    "topk_method": "group_limited_greedy",
    "norm_topk_prob": False,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": "absent",
    "quantization_config": "absent",
}
V32: dict[str, Any] = {"model_type": "deepseek_v32", "index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048}


def test_v2():
    """Groups rank by their best expert; without groups there is one."""
    found = read(**V2)
    assert found.moe == MoeConfig(256, 8, 14, 14, "softmax", False, 2.5, 8, 4, float32_router=True, group_best=1)
    assert (found.rope.interleaved, found.latent, found.mtp_layers) == (True, read().latent, 0)
    greedy = read(**V2 | {"topk_method": "greedy"})
    assert greedy.moe == replace(found.moe_config, groups=1, groups_kept=1)
    for config in (found, greedy, read(**V2, q_lora_rank=None, attention_bias=True)):
        assert config_from_hf(config_to_hf(config, "bfloat16"), FILE) == config


def test_v32():
    """A V3 with an indexer, which rotates halves; blocks with experts may be named one by one."""
    found = read(**V32)
    index = IndexConfig(64, 128, 2048)
    v3 = replace(read(), family="deepseek_v32")
    assert found == replace(v3, latent=LatentConfig(1536, 512, 128, 64, 128, index))
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    assert config_from_hf({key: RELEASED[key] for key in kept} | {"model_type": "deepseek_v32"}, FILE) == replace(
        found, moe=replace(found.moe_config, expert_size=2048, shared_size=2048), **plain_rope()
    )
    types = ["sparse", "dense", "dense", "sparse", "dense"]
    named = read(**V32, mlp_layer_types=types, layer_types=["deepseek_sparse_attention"] * 5)
    assert [kind.moe for kind in named.kinds] == [each == "sparse" for each in types]
    for config in (found, named):
        assert config_from_hf(config_to_hf(config, "bfloat16"), FILE) == replace(config, mtp_layers=0)


def plain_rope() -> dict[str, Any]:
    return {"rope": RopeConfig(interleaved=True), "attention_scale": 192**-0.5}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (V2 | {"norm_topk_prob": True}, "norm_topk_prob"),
        (V2 | {"topk_method": "noaux_tc"}, "topk_method"),
        (V2 | {"scoring_func": "sigmoid"}, "scoring_func"),
        (V2 | {"mlp_bias": True}, "mlp_bias"),
        (V2 | {"rope_interleave": False}, "rope_interleave"),
        (V32 | {"indexer_rope_interleave": True}, "indexer_rope_interleave"),
        (V32 | {"index_topk": 0}, "index_topk"),
        (V32 | {"indexer_types": ["full"] * 5}, "indexer_types"),
    ],
)
def test_refusals_of_v2_and_v32(changes: dict[str, Any], named: str):
    with pytest.raises(CheckpointError, match=named):
        read(**changes)


@pytest.mark.parametrize("inside", ["deepseek_v3", "kimi_k2"])
def test_kimi_with_eyes(inside: str):
    """The text model is a DeepSeek-V3, whatever its config is called; an export is one."""
    text = {key: value for key, value in RELEASED.items() if key != "quantization_config"} | {"model_type": inside}
    outer = {"model_type": "kimi_k25", "text_config": text, "vision_config": {}, "media_placeholder_token_id": 7}
    found = config_from_hf(outer, FILE)
    assert found == replace(read(), family="kimi_k25")
    assert config_from_hf(outer | {"tie_word_embeddings": True}, FILE).tie_embeddings
    raw = config_to_hf(found, "bfloat16")
    assert config_from_hf(raw, FILE) == replace(found, family="deepseek_v3", mtp_layers=0)
    with pytest.raises(CheckpointError, match="config of a deepseek_v3 or kimi_k2"):
        config_from_hf(outer | {"text_config": text | {"model_type": "deepseek_v2"}}, FILE)
    with pytest.raises(CheckpointError, match="encoder_only"):
        config_from_hf(outer | {"encoder_only": True}, FILE)


def test_kimi_as_it_is_published(tmp_path: Path):
    """Transformers saves blocks under another name. With a layer that guesses further ahead."""
    raw = json.loads((GOLDEN / "kimi_k25" / "config.json").read_text())
    raw["text_config"] |= {"model_type": "kimi_k2", "num_nextn_predict_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    stored = load_file(GOLDEN / "kimi_k25" / "model.safetensors")
    old = {name.replace(".blocks.", ".layers."): value for name, value in stored.items() if "vision" not in name}
    assert "language_model.model.layers.1.mlp.experts.6.up_proj.weight" in old
    assert "language_model.model.blocks.1.mlp.experts.6.up_proj.weight" in stored
    old |= dict.fromkeys(("language_model.model.layers.2.eh_proj.weight", "mm_projector.a"), np.ones(3, np.float32))
    save_file(old, tmp_path / "model.safetensors")
    assert_same_parameters(load_pretrained(tmp_path), load_pretrained(GOLDEN / "kimi_k25"))


def write_fp8(folder: Path, block: tuple[int, int], **more: np.ndarray) -> dict[str, np.ndarray]:
    """The golden model with its matrices in FP8, as DeepSeek stores them; returns what they mean, in float32."""
    stored, meant, rng = {}, {}, np.random.default_rng(0)
    raw = json.loads((GOLDEN / "deepseek_v3" / "config.json").read_text())
    for name, tensor in load_file(GOLDEN / "deepseek_v3" / "model.safetensors").items():
        stored[name] = meant[name] = tensor
        if tensor.ndim != 2 or "_proj" not in name:
            continue
        rows, columns = tensor.shape
        scale = rng.uniform(0.01, 2.0, (-(-rows // block[0]), -(-columns // block[1]))).astype(np.float32)
        spread = np.kron(scale, np.ones(block, np.float32))[:rows, :columns]
        stored[name] = (tensor.astype(np.float32) / spread).astype(ml_dtypes.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
        meant[name] = stored[name].astype(np.float32) * spread
    packing: dict[str, Any] = {"quantization_config": FP8 | {"weight_block_size": list(block)}}
    (folder / "config.json").write_text(json.dumps(raw | packing | {"num_nextn_predict_layers": 1}))
    save_file(stored | more, folder / "model.safetensors")
    return meant


def test_fp8_is_unpacked(tmp_path: Path):
    """Squares that do not divide the matrices. The dtype of a layer that is left out does not count."""
    left_out = {"model.layers.3.eh_proj.weight": np.ones((3, 5), ml_dtypes.float8_e4m3fn)}
    meant = write_fp8(tmp_path, (16, 7), **left_out)
    decoder = load_pretrained(tmp_path)
    block: Any = decoder.groups[1].blocks[0]
    assert decoder.embed[...].dtype == jnp.float32
    narrow = meant["model.layers.2.self_attn.kv_b_proj.weight"]
    np.testing.assert_array_equal(block.attention.kv_b[...][1].reshape(10, -1), narrow.T)
    expert = meant["model.layers.1.mlp.experts.7.down_proj.weight"]
    np.testing.assert_array_equal(block.mlp.down[...][0, 7], expert.T)


def test_scales_of_another_shape_are_refused(tmp_path: Path):
    name = "model.layers.0.mlp.up_proj.weight"
    write_fp8(tmp_path, (16, 7), **{f"{name}_scale_inv": np.ones((2, 2), np.float32)})
    with pytest.raises(CheckpointError, match=rf"(?s)scales .*{name}.*\(2, 2\).*\[3, 6\]"):
        load_pretrained(tmp_path)
