"""GGUF files of hybrids: what llama.cpp's converter does to their tensors, done here by its own steps, is undone."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from distillcache.models.checkpoint import load_pretrained, save_pretrained
from distillcache.models.config import BlockKind, DeltaConfig, ModelConfig, MoeConfig, plan_layers
from distillcache.models.decoder import Decoder
from distillcache.models.files.gguf.tokenizer import QWEN35_SPLIT
from distillcache.schemas.errors import CheckpointError
from tests.models.conftest import randomized
from tests.models.layers.recurrent.test_gated_delta import CONFIG

DENSE: ModelConfig = replace(CONFIG, family="qwen3_5_text", qkv_bias=True, output_bias=True)
SPARSE: ModelConfig = replace(
    CONFIG,
    family="qwen3_5_moe_text",
    intermediate_size=14,
    layers=plan_layers([BlockKind(mixer="gated_delta", moe=True), BlockKind(moe=True)]),
    moe=MoeConfig(5, 2, 14, 22, shared_gate=True),
)
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def dealt_out(values: np.ndarray, axis: int, width: int, delta: DeltaConfig) -> np.ndarray:
    """Value heads along an axis in llama.cpp's order, head by head."""
    served = delta.value_heads // delta.key_heads
    order = [key * served + number for number in range(served) for key in range(delta.key_heads)]
    places = np.concatenate([np.arange(head * width, (head + 1) * width) for head in order])
    return np.take(values, places, axis)


def converted(name: str, values: np.ndarray, delta: DeltaConfig) -> np.ndarray:
    """As the converter changes a tensor."""
    keys = 2 * delta.key_heads * delta.key_dim
    if name.endswith(("in_proj_qkv", "conv1d")):
        values = values.squeeze(1) if values.ndim == 3 else values
        values = np.concatenate([values[:keys], dealt_out(values[keys:], 0, delta.value_dim, delta)])
    elif name.endswith("in_proj_z"):
        values = dealt_out(values, 0, delta.value_dim, delta)
    elif name.endswith(("in_proj_a", "in_proj_b", "A_log", "dt_bias")):
        values = dealt_out(values, 0, 1, delta)
    elif name.endswith("out_proj"):
        values = dealt_out(values, 1, delta.value_dim, delta)
    if name.endswith("A_log"):
        values = -np.exp(values)
    if name.endswith("norm") and not name.endswith("linear_attn.norm"):
        values = values + 1
    return values


def tensors_of(folder: Path, config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    experts: dict[str, dict[int, np.ndarray]] = {}
    for name, stored in load_file(folder / "model.safetensors").items():
        stem, _, part = name.rpartition(".")
        if part not in ("weight", "bias"):
            stem, part = name, ""
        values = converted(stem, stored.astype(np.float32), config.delta_config)
        if stem in OUTER:
            yield f"{OUTER[stem]}.{part}", values
            continue
        block, inner = stem.removeprefix("model.layers.").split(".", 1)
        if inner.startswith("mlp.experts."):
            _, _, number, projection = inner.split(".")
            experts.setdefault(f"blk.{block}.ffn_{projection.removesuffix('_proj')}_exps.weight", {})[int(number)] = (
                values
            )
        elif inner.endswith("A_log"):
            yield f"blk.{block}.ssm_a", values
        elif inner.endswith("dt_bias"):
            yield f"blk.{block}.ssm_dt.bias", values
        else:
            yield f"blk.{block}.{NAMES[inner]}.{part}", values[0] if inner.endswith("expert_gate") else values
    for name, each in experts.items():
        yield name, np.stack([each[number] for number in sorted(each)])


def written(folder: Path, target: Path, config: ModelConfig, architecture: str, ahead: int = 0, **changes: Any) -> Path:
    """The file of a checkpoint. ahead: layers of multi-token prediction behind the last block."""
    delta, moe, writer = config.delta_config, config.moe, gguf.GGUFWriter(target, architecture)
    numbers: dict[str, Any] = {
        "block_count": config.num_blocks + ahead,
        "context_length": config.max_positions,
        "embedding_length": config.hidden_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": int(config.head_dim * config.rope.fraction),
        "full_attention_interval": 4,
        "ssm.conv_kernel": delta.taps,
        "ssm.state_size": delta.key_dim,
        "ssm.group_count": delta.key_heads,
        "ssm.time_step_rank": delta.value_heads,
        "ssm.inner_size": delta.value_heads * delta.value_dim,
    }
    if moe is None:
        numbers["feed_forward_length"] = config.intermediate_size
    else:
        numbers |= {"expert_count": moe.num_experts, "expert_used_count": moe.top_k}
        numbers |= {"expert_feed_forward_length": moe.expert_size}
        numbers |= {"expert_shared_feed_forward_length": moe.shared_size}
    numbers |= {"nextn_predict_layers": ahead} if ahead else {}
    for key, value in (numbers | changes).items():
        writer.add_uint32(f"{architecture}.{key}", value)
    writer.add_array(f"{architecture}.rope.dimension_sections", [11, 11, 10, 0])
    writer.add_float32(f"{architecture}.rope.freq_base", config.rope.theta)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", config.norm_eps)
    for name, values in tensors_of(folder, config):
        writer.add_tensor(name, np.ascontiguousarray(values))
    for layer in range(ahead):
        prefix = f"blk.{config.num_blocks + layer}"
        writer.add_tensor(f"{prefix}.nextn.eh_proj.weight", np.ones((3, 5), np.float32))
        writer.add_tensor(f"{prefix}.attn_norm.weight", np.ones(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.mark.parametrize(
    ("config", "architecture"), [(DENSE, "qwen35"), (SPARSE, "qwen35moe")], ids=["dense", "sparse"]
)
@pytest.mark.parametrize("ahead", [0, 2])
def test_equals_the_load_of_the_hf_directory(config: ModelConfig, architecture: str, ahead: int, tmp_path: Path):
    save_pretrained(randomized(Decoder(config)), tmp_path / "hf")
    found = load_pretrained(written(tmp_path / "hf", tmp_path / "m.gguf", config, architecture, ahead))
    expected = load_pretrained(tmp_path / "hf")
    assert found.config == replace(expected.config, mtp_layers=ahead)
    here, there = (dict(nnx.to_flat_state(nnx.state(each, nnx.Param))) for each in (found, expected))
    assert here.keys() == there.keys()
    for path, value in there.items():  # adding one and taking it away rounds, and so do exponential and logarithm
        np.testing.assert_allclose(here[path].get_value(), value.get_value(), rtol=0, atol=2e-6, err_msg=str(path))


@pytest.mark.parametrize(
    "changes", [{"ssm.group_count": 4}, {"ssm.inner_size": 41}, {"nextn_predict_layers": 3}], ids=str
)
def test_sizes_that_do_not_divide_are_refused(changes: dict[str, int], tmp_path: Path):
    save_pretrained(Decoder(DENSE), tmp_path / "hf")
    path = written(tmp_path / "hf", tmp_path / "m.gguf", DENSE, "qwen35", **changes)
    with pytest.raises(CheckpointError, match="do not divide"):
        load_pretrained(path)


def test_marks_are_letters_of_the_pre_tokenizer():
    """As llama.cpp and the tokenizer.json of Qwen3.5 cut texts."""
    assert QWEN35_SPLIT == (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
