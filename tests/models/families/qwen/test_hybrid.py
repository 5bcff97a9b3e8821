"""Qwen3-Next and Qwen3.5: released configs, what transformers fills in, round trips, refusals, and forms of files.

Their numbers are in test_parity.py and layers/recurrent/test_gated_delta.py.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from distillcache.models.checkpoint import load_pretrained, save_pretrained
from distillcache.models.config import BlockKind, DeltaConfig, LayerGroup, ModelConfig, MoeConfig, RopeConfig
from distillcache.models.families import config_from_hf, config_to_hf
from distillcache.schemas.errors import CheckpointError
from tests.models.conftest import GOLDEN
from tests.models.test_checkpoint import assert_same_parameters

FILE = Path("model/config.json")
# The config.json of Qwen3-Next-80B-A3B as released, sizes made small.
NEXT = {
    "architectures": ["Qwen3NextForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "full_attention_interval": 4,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 36,
    "initializer_range": 0.02,
    "intermediate_size": 40,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 5,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_value_head_dim": 7,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": "qwen3_next",
    "moe_intermediate_size": 14,
    "norm_topk_prob": True,
    "num_attention_heads": 6,
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "num_hidden_layers": 8,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000000,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 22,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.0.dev0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 61,
}
# The text_config of Qwen3.5-27B likewise; that of the models with experts differs in a few keys.
DENSE = {key: NEXT[key] for key in NEXT if "expert" not in key and key not in ("architectures", "rope_theta")} | {
    "attn_output_gate": True,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 2,
    "mamba_ssm_dtype": "float32",
    "model_type": "qwen3_5_text",
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "output_gate_type": "swish",
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
        "rope_type": "default",
    },
}
for key in ("decoder_sparse_step", "norm_topk_prob", "moe_intermediate_size", "router_aux_loss_coef", "rope_scaling"):
    DENSE.pop(key, None)
SPARSE = {key: value for key, value in DENSE.items() if key != "intermediate_size"} | {
    key: NEXT[key]
    for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")
}
SPARSE |= {"model_type": "qwen3_5_moe_text"}
DELTA, FULL = BlockKind(mixer="gated_delta"), BlockKind()


def read(raw: dict[str, Any], **changes: Any) -> ModelConfig:
    return config_from_hf({key: value for key, value in (raw | changes).items() if value != "absent"}, FILE)


def around(text: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The vision-language model around a text_config, as released."""
    name = text["model_type"].removesuffix("_text")
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration" if "moe" in name else "Qwen3_5ForConditionalGeneration"],
        "image_token_id": 248056,
        "model_type": name,
        "text_config": text,
        "tie_word_embeddings": False,
        "transformers_version": "4.57.0.dev0",
        "video_token_id": 248057,
        "vision_config": {"depth": 27, "hidden_size": 1152, "model_type": name},
        "vision_end_token_id": 248054,
        "vision_start_token_id": 248053,
    } | more


def with_experts(kind: BlockKind) -> BlockKind:
    return replace(kind, moe=True)


def test_qwen3_next():
    assert read(NEXT) == ModelConfig(
        vocab_size=61,
        hidden_size=36,
        intermediate_size=40,
        num_heads=6,
        num_kv_heads=2,
        head_dim=16,
        layers=(LayerGroup(tuple(map(with_experts, (DELTA, DELTA, DELTA, FULL))), 2),),
        rope=RopeConfig(1e7, fraction=0.25),
        qk_norm="head",
        norm_product="offset",
        output_gate=True,
        delta=DeltaConfig(2, 6, 5, 7, 4),
        moe=MoeConfig(7, 3, 14, 22, shared_gate=True),
        max_positions=262144,
        family="qwen3_next",
    )


def test_qwen3_5():
    dense = replace(read(NEXT), layers=(LayerGroup((DELTA, DELTA, DELTA, FULL), 2),), moe=None)
    assert read(DENSE) == replace(dense, family="qwen3_5_text")
    assert read(around(DENSE)) == replace(dense, family="qwen3_5")
    sparse = read(SPARSE)
    assert replace(sparse, family="qwen3_next", intermediate_size=40) == read(NEXT)
    assert read(around(SPARSE)) == replace(sparse, family="qwen3_5_moe")


def test_defaults_are_those_of_transformers():
    silent = dict.fromkeys((key for key in NEXT if key.startswith("linear_") or "expert" in key), "absent")
    silent |= dict.fromkeys(
        ("full_attention_interval", "partial_rotary_factor", "head_dim", "mlp_only_layers"), "absent"
    )
    silent |= dict.fromkeys(("moe_intermediate_size", "norm_topk_prob", "num_key_value_heads"), "absent")
    found = read(NEXT, **silent)
    assert found.delta == DeltaConfig(16, 32, 128, 128, 4)
    assert found.moe == MoeConfig(512, 10, 512, 512, shared_gate=True)
    assert (found.kinds, found.head_dim, found.num_kv_heads) == (read(NEXT).kinds, 256, 2)
    assert found.rope.fraction == 0.25


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({"full_attention_interval": 2, "num_hidden_layers": 4}, [DELTA, FULL, DELTA, FULL]),
        ({"layer_types": ["full_attention", "linear_attention"], "num_hidden_layers": 2}, [FULL, DELTA]),
    ],
)
def test_which_blocks_have_attention(changes: dict[str, Any], kinds: list[BlockKind]):
    assert read(NEXT, **changes).kinds == tuple(map(with_experts, kinds))
    dense = read(NEXT, **changes, num_experts=0)
    assert (dense.kinds, dense.moe) == (tuple(kinds), None)


@pytest.mark.parametrize(
    ("beside", "inside", "tied"),
    [(True, "absent", True), (False, True, False), (None, True, True), (None, "absent", False)],
)
def test_whether_the_head_is_tied(beside: bool | None, inside: Any, tied: bool):
    text = {key: value for key, value in (DENSE | {"tie_word_embeddings": inside}).items() if value != "absent"}
    assert read(around(text, tie_word_embeddings=beside)).tie_embeddings is tied


@pytest.mark.parametrize(
    "config",
    [
        read(NEXT, mlp_only_layers=[1, 3], norm_topk_prob=False, attention_bias=True),
        read(NEXT, partial_rotary_factor=1.0, num_experts=0, tie_word_embeddings=True),
        read(NEXT, rope_scaling={"type": "yarn", "factor": 4.0}),
        read(DENSE, attention_bias=True),
        read(SPARSE),
    ],
)
def test_round_trip_is_exact(config: ModelConfig):
    assert config_from_hf(config_to_hf(config, "bfloat16"), FILE) == config


def test_the_text_model_may_have_the_name_of_the_whole():
    whole = around(DENSE)
    assert read(whole | {"text_config": DENSE | {"model_type": "qwen3_5"}}) == read(whole)


def test_the_text_model_is_exported():
    for text in (DENSE, SPARSE):
        hf = config_to_hf(read(around(text)), "bfloat16")
        assert hf["model_type"] == text["model_type"]
        assert config_from_hf(hf, FILE) == read(text)


@pytest.mark.parametrize(
    ("raw", "changes", "named"),
    [
        (NEXT, {"linear_num_value_heads": 5}, "linear_num_value_heads"),
        (NEXT, {"layer_types": ["linear_attention"] * 7}, "layer_types"),
        (NEXT, {"layer_types": ["sliding_attention"] * 8}, "layer_types"),
        (NEXT, {"use_sliding_window": True}, "use_sliding_window"),
        (NEXT, {"head_dim": None}, "head_dim"),
        (DENSE, {"attn_output_gate": False}, "attn_output_gate"),
        (DENSE, {"output_gate_type": "sigmoid"}, "output_gate_type"),
        (DENSE, {"mlp_only_layers": [0]}, "mlp_only_layers"),
        (SPARSE, {"norm_topk_prob": False}, "norm_topk_prob"),
        (SPARSE, {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size"),
        (around(DENSE) | {"text_config": DENSE | {"model_type": "qwen3_text"}}, {}, "text_config"),
        (around(DENSE), {"hidden_size": 36}, "hidden_size"),
    ],
)
def test_refusals_name_the_key(raw: dict[str, Any], changes: dict[str, Any], named: str):
    with pytest.raises(CheckpointError) as caught:
        read(raw, **changes)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"output_gate": False}, "no output gate"),
        ({"qk_norm": "none"}, "norms of heads"),
        ({"norm_product": "wide"}, "norms that add one"),
        ({"qkv_bias": True}, "some biases"),
        ({"layers": (LayerGroup((replace(FULL, window=5), DELTA), 1),)}, "window=5"),
        ({"layers": (LayerGroup((with_experts(DELTA), FULL), 1),)}, "blocks with experts"),
    ],
    ids=str,
)
def test_what_no_config_says_is_not_exported(changes: dict[str, Any], found: str):
    with pytest.raises(CheckpointError, match="transformers has no config") as caught:
        config_to_hf(replace(read(DENSE), **changes), "float32")
    assert found in caught.value.facts["found"]


def fused(tensors: dict[str, np.ndarray], *, turned: bool) -> dict[str, np.ndarray]:
    """The same checkpoint with the experts of a block in two tensors."""
    found = {name: value for name, value in tensors.items() if ".mlp.experts." not in name}
    stems = sorted({name.split("experts.")[0] for name in tensors if ".mlp.experts." in name})
    for stem in stems:
        gate, up, down = (
            np.stack([tensors[f"{stem}experts.{expert}.{matrix}_proj.weight"] for expert in range(7)])
            for matrix in ("gate", "up", "down")
        )
        both = {"gate_up_proj": np.concatenate([gate, up], axis=1), "down_proj": down}
        found |= {
            f"{stem}experts.{name}": np.ascontiguousarray(value.swapaxes(1, 2) if turned else value)
            for name, value in both.items()
        }
    return found


def singles(name: str, folder: Path) -> dict[str, np.ndarray]:
    """Tensors of a golden model as we export them: experts one by one."""
    save_pretrained(load_pretrained(GOLDEN / name), folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
def test_experts_together_and_apart_are_the_same(turned: bool, prefix: str, tmp_path: Path):
    """And under both spellings of the names."""
    tensors = singles("qwen3_5_moe_text", tmp_path / "apart")
    together = {name.replace("model.", prefix, 1): value for name, value in fused(tensors, turned=turned).items()}
    more = {"mtp.fc.weight": np.ones((2, 2), np.float32), "model.visual.patch_embed.proj.bias": np.ones(3, np.float32)}
    (tmp_path / "together").mkdir()
    config = (tmp_path / "apart/config.json").read_text()
    (tmp_path / "together/config.json").write_text(config)
    save_file(together | more, tmp_path / "together/model.safetensors")
    assert_same_parameters(load_pretrained(tmp_path / "together"), load_pretrained(tmp_path / "apart"))


def test_wide_tensors_do_not_widen_the_others(tmp_path: Path):
    """Released files have rates of decay in float32 beside bfloat16."""
    raw, tensors = GOLDEN / "qwen3_5_text", load_file(GOLDEN / "qwen3_5_text/model.safetensors")
    wide = ("A_log", "dt_bias", "linear_attn.norm.weight")
    assert any(name.endswith(wide) for name in tensors)
    mixed = {n: value.astype(np.float32) if n.endswith(wide) else value for n, value in tensors.items()}
    (tmp_path / "config.json").write_text(json.dumps(json.loads((raw / "config.json").read_text())))
    save_file(mixed, tmp_path / "model.safetensors")
    decoder = load_pretrained(tmp_path)
    assert decoder.dtype == jnp.bfloat16
    assert_same_parameters(decoder, load_pretrained(raw))


def test_an_export_has_the_tensors_of_its_source(tmp_path: Path):
    """Bit for bit, fused projections and convolutions too; what is float32 here is float32 there."""
    found = singles("qwen3_next", tmp_path)
    expected = load_file(GOLDEN / "qwen3_next/model.safetensors")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name].astype(np.float32), value.astype(np.float32), err_msg=name)
