"""GGUF files of architectures whose keys become a config.json's, written here as llama.cpp's converter does, from
goldens, against the load of those.

Names are the `gguf` package's own, which the converter uses too; keys and what it does to tensors are stated here.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import gguf
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from distillcache.models.checkpoint import load_pretrained, open_tensors, read_config
from distillcache.models.config import Multipliers, TemperatureConfig
from distillcache.models.files.gguf.file import open_gguf
from distillcache.models.files.gguf.joined import gguf_source
from distillcache.models.files.tensors import WEIGHTS_NAME
from distillcache.schemas.errors import CheckpointError
from tests.models.conftest import GOLDEN
from tests.models.files.gguf.test_file import permuted

Raw = dict[str, Any]
Tensors = dict[str, np.ndarray]


def text_keys(raw: Raw) -> dict[str, Any]:
    """As `TextModel.set_gguf_parameters` writes them."""
    rope = raw.get("rope_parameters", {})
    rope = rope.get("full_attention", rope)
    names = {
        "block_count": "num_hidden_layers",
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
        "expert_used_count": "num_experts_per_tok",
        "expert_group_count": "n_group",
        "expert_group_used_count": "topk_group",
        "attention.key_length": "head_dim",
        "attention.value_length": "head_dim",
    }
    found = {ours: raw[theirs] for ours, theirs in names.items() if raw.get(theirs) is not None}
    for name in ("num_local_experts", "num_experts"):
        found |= {"expert_count": raw[name]} if raw.get(name) is not None else {}
    if rope.get("rope_type") == "yarn":
        found |= {"rope.scaling.type": "yarn", "rope.scaling.factor": rope["factor"]}
        found |= {"rope.scaling.original_context_length": rope["original_max_position_embeddings"]}
    return found | ({"rope.freq_base": float(rope["rope_theta"])} if rope else {})


def partial_keys(raw: Raw) -> dict[str, Any]:
    return {"rope.dimension_count": int(raw["head_dim"] * raw["rope_parameters"].get("partial_rotary_factor", 1))}


def latent_keys(raw: Raw) -> dict[str, Any]:
    """Of DeepseekV2Model."""
    rank, turned = raw["kv_lora_rank"], raw["qk_rope_head_dim"]
    found = {"attention.q_lora_rank": raw["q_lora_rank"]} if raw["q_lora_rank"] else {}
    if all_dim := raw["rope_parameters"].get("mscale_all_dim"):
        found["rope.scaling.yarn_log_multiplier"] = 0.1 * all_dim
    return found | {
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + turned,
        "attention.value_length": rank,
        "attention.key_length_mla": raw["qk_nope_head_dim"] + turned,
        "attention.value_length_mla": raw["v_head_dim"],
        "rope.dimension_count": turned,
        **routed_keys(raw),
    }


def routed_keys(raw: Raw) -> dict[str, Any]:
    norm = {"expert_weights_norm": True} if raw["norm_topk_prob"] else {}
    return norm | {
        "leading_dense_block_count": raw.get("first_k_dense_replace", 0),
        "expert_feed_forward_length": raw["moe_intermediate_size"],
        "expert_count": raw["n_routed_experts"],
        "expert_shared_count": raw["n_shared_experts"],
        "expert_weights_scale": float(raw["routed_scaling_factor"]),
    }


def next_keys(raw: Raw) -> dict[str, Any]:
    values = raw["linear_num_value_heads"]
    return partial_keys(raw) | {
        "expert_feed_forward_length": raw["moe_intermediate_size"],
        "expert_shared_feed_forward_length": raw["shared_expert_intermediate_size"],
        "full_attention_interval": 4,
        "ssm.conv_kernel": raw["linear_conv_kernel_dim"],
        "ssm.state_size": raw["linear_key_head_dim"],
        "ssm.group_count": raw["linear_num_key_heads"],
        "ssm.time_step_rank": values,
        "ssm.inner_size": values * raw["linear_value_head_dim"],
    }


def mamba_keys(taps: int, state: int, groups: int, heads: int, width: int) -> dict[str, Any]:
    found = {"conv_kernel": taps, "state_size": state, "group_count": groups, "time_step_rank": heads}
    return {f"ssm.{key}": value for key, value in (found | {"inner_size": heads * width}).items()}


def granite_keys(raw: Raw) -> dict[str, Any]:
    kinds = raw["layer_types"]
    names = ("mamba_d_conv", "mamba_d_state", "mamba_n_groups", "mamba_n_heads", "mamba_d_head")
    found = mamba_keys(*(raw[name] for name in names))
    rotary = raw["position_embedding_type"] == "rope"
    return found | {
        "attention.scale": raw["attention_multiplier"],
        "embedding_scale": raw["embedding_multiplier"],
        "residual_scale": raw["residual_multiplier"],
        "logit_scale": raw["logits_scaling"],
        "expert_shared_feed_forward_length": raw["shared_intermediate_size"],
        "attention.head_count_kv": [raw["num_key_value_heads"] * (kind == "full_attention") for kind in kinds],
        "rope.dimension_count": raw["head_dim"],
        "rope.scaling.finetuned": rotary,
        **({} if rotary else {"context_length": 2**20}),
    }


def falcon_keys(raw: Raw) -> dict[str, Any]:
    names = ("mamba_d_conv", "mamba_d_state", "mamba_n_groups", "mamba_n_heads", "mamba_d_head")
    return mamba_keys(*(raw[name] for name in names))


def nemotron_keys(raw: Raw) -> dict[str, Any]:
    kinds = raw["layers_block_type"]
    names = ("conv_kernel", "ssm_state_size", "n_groups", "mamba_num_heads", "mamba_head_dim")
    found = mamba_keys(*(raw[name] for name in names))
    sparse = "moe" in kinds
    inner = raw["moe_intermediate_size" if sparse else "intermediate_size"]
    found |= {
        "block_count": len(kinds),
        "attention.layer_norm_epsilon": raw["layer_norm_epsilon"],
        "attention.layer_norm_rms_epsilon": raw["layer_norm_epsilon"],
        "attention.head_count_kv": [raw["num_key_value_heads"] * (kind == "full_attention") for kind in kinds],
        "feed_forward_length": [inner * (kind in ("mlp", "moe")) for kind in kinds],
    }
    if sparse:
        found |= {key: value for key, value in routed_keys(raw).items() if key != "leading_dense_block_count"}
        found["expert_shared_feed_forward_length"] = raw["moe_shared_expert_intermediate_size"]
        found["moe_latent_size"] = raw["moe_latent_size"]
    else:
        found |= dict.fromkeys(("expert_used_count", "expert_group_count", "expert_group_used_count"))
    return found | {"rope.scaling.finetuned": False}


def window_keys(raw: Raw) -> dict[str, Any]:
    slides = [kind == "sliding_attention" for kind in raw["layer_types"]]
    return {"attention.sliding_window": raw["sliding_window"], "attention.sliding_window_pattern": slides}


def ernie_keys(raw: Raw) -> dict[str, Any]:
    return {
        "expert_count": raw["moe_num_experts"],
        "expert_used_count": raw["moe_k"],
        "expert_feed_forward_length": raw["moe_intermediate_size"],
        "expert_shared_count": raw["moe_num_shared_experts"],
        "expert_shared_feed_forward_length": raw["intermediate_size"] // raw["num_key_value_heads"],
        "interleave_moe_layer_step": raw["moe_layer_interval"],
        "leading_dense_block_count": raw["moe_layer_start_index"],
    }


def hunyuan_keys(raw: Raw) -> dict[str, Any]:
    width = raw["intermediate_size"]
    found = {"expert_shared_feed_forward_length": width, "expert_feed_forward_length": width}
    return found | {"expert_used_count": raw["moe_topk"], "expert_shared_count": 1}


def indexed_keys(raw: Raw) -> dict[str, Any]:
    names = {"head_count": "index_n_heads", "key_length": "index_head_dim", "top_k": "index_topk"}
    return latent_keys(raw) | {f"attention.indexer.{ours}": raw[theirs] for ours, theirs in names.items()}


def kimi_keys(raw: Raw) -> dict[str, Any]:
    rank, turned = raw["kv_lora_rank"], raw["qk_rope_head_dim"]
    names = {
        "context_length": "model_max_length",
        "expert_used_count": "num_experts_per_token",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_count": "num_shared_experts",
        "expert_weights_scale": "routed_scaling_factor",
        "kda.head_dim": "linear_head_dim",
        "ssm.conv_kernel": "linear_conv_kernel_dim",
        "attention.q_lora_rank": "q_lora_rank",
        "attention.value_length_mla": "v_head_dim",
    }
    return {ours: raw[theirs] for ours, theirs in names.items()} | {
        "leading_dense_block_count": raw["mlp_layer_types"].index("sparse"),
        "attention.head_count_kv": [int(kind == "full_attention") for kind in raw["layer_types"]],
        "attention.kv_lora_rank": rank,
        "attention.key_length": rank + turned,
        "attention.key_length_mla": raw["qk_nope_head_dim"] + turned,
        "rope.dimension_count": turned,
    }


def ahead_keys(raw: Raw) -> dict[str, Any]:
    """Of GLM-4.5, whose files count layers of multi-token prediction among the blocks."""
    ahead = raw.get("num_nextn_predict_layers", 0)
    found = routed_keys(raw) | {"block_count": raw["num_hidden_layers"] + ahead}
    return partial_keys(raw) | found | ({"nextn_predict_layers": ahead} if ahead else {})


def oss_keys(raw: Raw) -> dict[str, Any]:
    return {"attention.sliding_window": raw["sliding_window"], "expert_feed_forward_length": raw["intermediate_size"]}


def gemma_keys(raw: Raw) -> dict[str, Any]:
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    found = {cap: raw[cap] for cap in caps if raw[cap] is not None} | {
        "attention.sliding_window": raw["sliding_window"]
    }
    ropes = raw["rope_parameters"]
    if "full_attention" not in ropes:
        return found | {"rope.freq_base": None}
    scaling = {"rope.scaling.type": "linear", "rope.scaling.factor": ropes["full_attention"]["factor"]}
    return found | scaling | {"rope.freq_base_swa": ropes["sliding_attention"]["rope_theta"]}


def gemma4_keys(raw: Raw) -> dict[str, Any]:
    window = window_keys(raw)
    slides, own = window["attention.sliding_window_pattern"], raw["num_hidden_layers"] - raw["num_kv_shared_layers"]
    wide = next(iter(raw["per_layer_config"].values()))
    heads, inner = raw["num_key_value_heads"], raw["intermediate_size"]
    by_kind = {True: heads, False: wide.get("num_key_value_heads", heads)}
    found = window | {
        "final_logit_softcapping": raw["final_logit_softcapping"],
        "attention.shared_kv_layers": raw["num_kv_shared_layers"],
        "embedding_length_per_layer_input": raw["hidden_size_per_layer_input"],
        "attention.key_length": wide["head_dim"],
        "attention.value_length": wide["head_dim"],
        "attention.key_length_swa": raw["head_dim"],
        "attention.value_length_swa": raw["head_dim"],
        "rope.dimension_count": wide["head_dim"],
        "rope.dimension_count_swa": raw["head_dim"],
        "rope.freq_base_swa": raw["rope_parameters"]["sliding_attention"]["rope_theta"],
    }
    if raw["use_double_wide_mlp"]:
        found["feed_forward_length"] = [inner * (1 + (block >= own)) for block in range(raw["num_hidden_layers"])]
    if "num_key_value_heads" in wide:
        found["attention.head_count_kv"] = [by_kind[each] for each in slides]
    if raw["enable_moe_block"]:
        found |= {"expert_used_count": raw["top_k_experts"], "expert_feed_forward_length": raw["moe_intermediate_size"]}
    else:
        found["expert_count"] = None
    return found


def cohere_keys(raw: Raw) -> dict[str, Any]:
    found = {"attention.layer_norm_epsilon": raw["layer_norm_eps"], "logit_scale": raw["logit_scale"]}
    return found | {"attention.sliding_window": raw["sliding_window"], "rope.dimension_count": raw["head_dim"]}


def phi_keys(raw: Raw) -> dict[str, Any]:
    rope = raw["rope_parameters"]
    turned = int(rope["partial_rotary_factor"] * raw["hidden_size"]) // raw["num_attention_heads"]
    found = {"rope.scaling.original_context_length": rope["original_max_position_embeddings"]}
    return found | {
        "rope.dimension_count": turned,
        "rope.scaling.attn_factor": 1.34,
        "attention.sliding_window": raw["sliding_window"],
    }


def kept(name: str, values: np.ndarray, raw: Raw) -> Iterator[tuple[str, np.ndarray]]:
    yield name, values


def split_latent(name: str, values: np.ndarray, raw: Raw) -> Iterator[tuple[str, np.ndarray]]:
    if not name.endswith("kv_b_proj.weight"):
        yield name, values
        return
    plain = raw["qk_nope_head_dim"]
    heads = values.reshape(raw["num_attention_heads"], plain + raw["v_head_dim"], -1)
    yield name.replace("kv_b", "k_b"), np.stack([head[:plain].T for head in heads])
    yield name.replace("kv_b", "v_b"), np.stack([head[plain:] for head in heads])


def kimi_tensors(name: str, values: np.ndarray, raw: Raw) -> Iterator[tuple[str, np.ndarray]]:
    """Dense MLPs are named here as released files have them."""
    if name.count(".") == 5 and name.endswith("_proj.weight"):
        name = name.replace("block_sparse_moe", "mlp")
    if name.endswith("conv1d.weight"):
        values = values[None]
    elif name.endswith("A_log"):
        values = -np.exp(values)
    yield from split_latent(name.replace("dt_bias", "dt_proj.bias"), values, raw)


def next_tensors(name: str, values: np.ndarray, raw: Raw) -> Iterator[tuple[str, np.ndarray]]:
    """Norms have one added; what a key head has together is taken apart."""
    if name.endswith("in_proj_qkvz.weight"):
        keys, heads = raw["linear_key_head_dim"], raw["linear_num_key_heads"]
        served = raw["linear_num_value_heads"] // heads * raw["linear_value_head_dim"]
        runs = np.split(values, heads)
        cut = [np.split(run, [keys, 2 * keys, 2 * keys + served]) for run in runs]
        q, k, v, z = (np.concatenate([run[at] for run in cut]) for at in range(4))
        block = name.split(".")[2]
        yield f"blk.{block}.attn_qkv.weight", np.concatenate([q, k, v])
        yield f"blk.{block}.attn_gate.weight", z
        return
    for own, mine in mamba_tensors(name, values, raw):
        plain = own.endswith("norm.weight") and not own.endswith("linear_attn.norm.weight")
        yield own, mine + np.float32(1) if plain else mine.squeeze(-1) if own.endswith("A_log") else mine


def shifted(name: str, values: np.ndarray, raw: Raw) -> Iterator[tuple[str, np.ndarray]]:
    """Of Gemma 2 and 3."""
    yield name, values + np.float32(1) if name.endswith("norm.weight") else values


def oss_tensors(name: str, values: np.ndarray, raw: Raw) -> Iterator[tuple[str, np.ndarray]]:
    if "down_proj" in name and not name.endswith("bias"):
        yield f"{name}.weight", values.swapaxes(-1, -2)
    elif name.endswith("down_proj_bias"):
        yield name.replace("_bias", ".bias"), values
    elif "gate_up_proj" in name:
        ending = "bias" if name.endswith("bias") else "weight"
        rows = values if ending == "bias" else values.swapaxes(-1, -2)
        for start, part in enumerate(("gate", "up")):
            yield f"{name.partition('gate_up')[0]}{part}_proj.{ending}", rows[:, start::2]
    else:
        yield f"{name}.weight" if name.endswith("sinks") else name, values


def gemma4_tensors(name: str, values: np.ndarray, raw: Raw) -> Iterator[tuple[str, np.ndarray]]:
    if name.endswith("router.scale"):
        name = f"blk.{name.split('.')[2]}.ffn_gate_inp.scale"
    elif name.endswith("per_expert_scale"):
        name = f"blk.{name.split('.')[2]}.ffn_down_exps.scale"
    elif name.endswith(("layer_scalar", "experts.gate_up_proj", "experts.down_proj")):
        name = f"{name}.weight"
    yield name, values


def mistral4_tensors(name: str, values: np.ndarray, raw: Raw) -> Iterator[tuple[str, np.ndarray]]:
    if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        yield f"{name}.weight", values
    else:
        yield from split_latent(name, values, raw)


def smollm_tensors(name: str, values: np.ndarray, raw: Raw) -> Iterator[tuple[str, np.ndarray]]:
    for key, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        values = permuted(values, raw[heads]) if f".{key}." in name else values
    yield name, values


def mamba_tensors(name: str, values: np.ndarray, raw: Raw) -> Iterator[tuple[str, np.ndarray]]:
    """Of Mamba2Model."""
    if name.endswith("A_log"):
        values = -np.exp(values)[:, None]
    elif name.endswith((".D", "conv1d.weight")):
        values = values[:, None] if values.ndim == 1 else values.squeeze(1)
    elif name.endswith(("mamba.norm.weight", "mixer.norm.weight")):
        values = values.reshape(raw["n_groups" if "n_groups" in raw else "mamba_n_groups"], -1)
    yield name.replace("dt_bias", "dt_proj.bias"), values


def granite_tensors(name: str, values: np.ndarray, raw: Raw) -> Iterator[tuple[str, np.ndarray]]:
    sparse = raw.get("num_local_experts")
    if name.endswith("input_linear.weight"):
        block = name.split(".")[2]
        ending = "_exps" if "block_sparse" in name else "_shexp" if sparse else ""
        for part, half in zip(("gate", "up"), np.split(values, 2, axis=-2), strict=True):
            yield f"blk.{block}.ffn_{part}{ending}.weight", half
        return
    if not sparse:
        name = name.replace("shared_mlp.output_linear", "mlp.down_proj")
    for key, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        values = permuted(values, raw[heads]) if f".{key}." in name else values
    yield from mamba_tensors(name, values, raw)


def falcon_tensors(name: str, values: np.ndarray, raw: Raw) -> Iterator[tuple[str, np.ndarray]]:
    """Factors are multiplied into matrices; biases are as they were."""
    attention, inner = raw["attention_in_multiplier"], raw["mamba_d_ssm"]
    states = raw["mamba_n_groups"] * raw["mamba_d_state"]
    runs = np.repeat(raw["ssm_multipliers"], [inner, inner, states, states, raw["mamba_n_heads"]])
    factors: dict[str, Any] = {
        "down_proj.weight": raw["mlp_multipliers"][1],
        "gate_proj.weight": raw["mlp_multipliers"][0],
        "k_proj.weight": raw["key_multiplier"] * attention,
        "q_proj.weight": attention,
        "v_proj.weight": attention,
        "o_proj.weight": raw["attention_out_multiplier"],
        "out_proj.weight": raw["ssm_out_multiplier"],
        "in_proj.weight": raw["ssm_in_multiplier"] * runs[:, None],
        "lm_head.weight": raw["lm_head_multiplier"],
        "embed_tokens.weight": raw["embedding_multiplier"],
    }
    factor = next((each for ending, each in factors.items() if name.endswith(ending)), 1.0)
    yield from mamba_tensors(name, (values * factor).astype(np.float32), raw)


@dataclass(frozen=True)
class Case:
    """A golden and its architecture. stated: keys of its config that files of the architecture can say. read: fields of
    the config that they cannot. scores: `expert_gating_func`."""

    golden: str
    architecture: str
    keys: Callable[[Raw], dict[str, Any]] = lambda raw: {}
    tensors: Callable[[str, np.ndarray, Raw], Iterator[tuple[str, np.ndarray]]] = kept
    stated: dict[str, Any] = field(default_factory=dict)
    read: dict[str, Any] = field(default_factory=dict)
    scores: int | None = None


NO_LIMIT, NO_LEAST = {"time_step_limit": None}, {"time_step_min": 0.0}
# Blocks of Qwen3-Next, of which the third is dense: llama.cpp has no such.
FIRST_TWO = {"num_hidden_layers": 2, "mlp_only_layers": [], "layer_types": ["linear_attention", "full_attention"]}
NO_DENSE = {"mlp_layer_types": None, "first_k_dense_replace": 0, "num_nextn_predict_layers": 0}
# Three of seven frequencies, which is all that divisors can say.
SEVENTHS = {
    "rope_parameters": {
        "full_attention": {"partial_rotary_factor": 3 / 7, "rope_theta": 100.0, "rope_type": "proportional"},
        "sliding_attention": {"rope_theta": 20.0, "rope_type": "default"},
    }
}
PLAIN_ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
# In SmolLM3 every fourth block knows no positions; blocks of Gemma 3 up to the sixth have a window.
SMOLLM3 = {"no_rope_layers": None, "no_rope_layer_interval": 4, "layer_types": None, "use_sliding_window": False}
ONE_WINDOW = {"layer_types": None, "sliding_window_pattern": 6, "_sliding_window_pattern": 6}
YARN = {"factor": 4.0, "mscale": 1.9, "mscale_all_dim": 1.9, "original_max_position_embeddings": 16}
YARN |= {"rope_theta": 100.0, "rope_type": "yarn"}
CASES = [
    Case("glm4", "glm4", partial_keys),
    Case("minimax_m2", "minimax-m2", partial_keys, scores=2),
    Case("deepseek_v2", "deepseek2", latent_keys, split_latent, {"rope_parameters": YARN}, scores=1),
    Case("deepseek_v3", "deepseek2", latent_keys, split_latent, {"rope_parameters": YARN}, scores=2),
    Case("deepseek_v3_plain", "deepseek2", latent_keys, split_latent, {"rope_interleave": True}, scores=2),
    Case("qwen3_next", "qwen3next", next_keys, next_tensors, {"norm_topk_prob": True} | FIRST_TWO),
    Case("granitemoehybrid", "granitehybrid", granite_keys, granite_tensors, NO_LIMIT, {"max_positions": 2**20}),
    Case("granitemoehybrid_dense", "granitehybrid", granite_keys, granite_tensors),
    Case("nemotron_h", "nemotron_h", nemotron_keys, granite_tensors, NO_LEAST),
    Case("nemotron_h_moe", "nemotron_h_moe", nemotron_keys, granite_tensors, NO_LEAST, {"intermediate_size": 9}),
    Case("exaone4", "exaone4", window_keys),
    Case("dots1", "dots1", routed_keys, stated={"sliding_window": None, "layer_types": None}, scores=2),
    Case("apertus", "apertus"),
    Case(
        "mistral4",
        "mistral4",
        latent_keys,
        mistral4_tensors,
        {"rope_parameters": YARN | {"partial_rotary_factor": 8 / 13}},
    ),
    Case("glm4_moe", "glm4moe", ahead_keys, scores=2),
    Case(
        "glm_moe_dsa",
        "glm-dsa",
        indexed_keys,
        split_latent,
        NO_DENSE,
        scores=2,
    ),
    Case("ernie4_5_moe", "ernie4_5-moe", ernie_keys),
    Case("hunyuan_v1_moe", "hunyuan-moe", hunyuan_keys),
    Case("gpt_oss", "gpt-oss", oss_keys, oss_tensors, {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}),
    Case("olmoe", "olmoe", stated={"clip_qkv": None}),
    Case("olmo2", "olmo2", stated={"hidden_act": "silu"}),
    Case("olmo3", "olmo2", window_keys),
    Case("smollm3", "smollm3", tensors=smollm_tensors, stated=SMOLLM3),
    Case("gemma2", "gemma2", gemma_keys, shifted, {"query_pre_attn_scalar": 8, "rope_parameters": PLAIN_ROPE}),
    Case("gemma3_text", "gemma3", gemma_keys, shifted, {"query_pre_attn_scalar": 8} | ONE_WINDOW),
    Case("gemma4_text", "gemma4", gemma4_keys, gemma4_tensors, SEVENTHS),
    Case("gemma4_text_moe", "gemma4", gemma4_keys, gemma4_tensors, SEVENTHS),
    Case("gemma4_text_shared", "gemma4", gemma4_keys, gemma4_tensors, SEVENTHS),
    Case("phi3", "phi3", phi_keys),
    Case("kimi_linear", "kimi-linear", kimi_keys, kimi_tensors, {"num_expert_group": 1}, scores=2),
    Case("cohere2", "cohere2", cohere_keys, stated={"attention_bias": False, "layer_types": None}),
]
# Tensors that are made of configs.
EXTRA: dict[str, Tensors] = {
    "gemma4": {"rope_freqs.weight": np.array([1, 1, 1, 1e30, 1e30, 1e30, 1e30], np.float32)},
    "phi3": {
        "rope_factors_long.weight": np.array([1.5, 2.5, 6.0], np.float32),
        "rope_factors_short.weight": np.array([1.0, 1.25, 1.5], np.float32),
    },
}


def folder_of(case: Case, where: Path, more: Tensors | None = None) -> Path:
    """The golden's folder with what files of the architecture can say."""
    where.mkdir()
    raw = json.loads((GOLDEN / case.golden / "config.json").read_text())
    (where / "config.json").write_text(json.dumps(raw | case.stated))
    stored = load_file(GOLDEN / case.golden / "model.safetensors")
    dropped = f"model.layers.{case.stated.get('num_hidden_layers')}."
    unbiased = case.stated.get("attention_bias") is False
    kept_here = {
        name: values
        for name, values in stored.items()
        if not name.startswith(dropped) and not (unbiased and name.endswith(".bias"))
    }
    save_file(kept_here | (more or {}), where / WEIGHTS_NAME)
    return where


def written(case: Case, folder: Path, target: Path, extra: Tensors | None = None, **changes: Any) -> Path:
    """A folder as a file; a change of None removes a key. extra: more tensors."""
    raw = json.loads((folder / "config.json").read_text())
    keys = text_keys(raw) | case.keys(raw) | {"expert_gating_func": case.scores} | changes
    writer = gguf.GGUFWriter(target, case.architecture)
    add: dict[type, Callable[..., None]] = {int: writer.add_uint32, float: writer.add_float32}
    add |= {str: writer.add_string, bool: writer.add_bool, list: writer.add_array}
    for key, value in keys.items():
        if value is not None:
            add[type(value)](f"{case.architecture}.{key}", value)
    more = EXTRA.get(case.architecture, {}) | (extra or {})
    for name, values in (converted(case, folder, raw, writer) | more).items():
        writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def converted(case: Case, folder: Path, raw: Raw, writer: gguf.GGUFWriter) -> Tensors:
    """The tensors of the file; numbers of an activation become metadata."""
    depth = raw.get("num_hidden_layers") or len(raw["layers_block_type"])
    arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[case.architecture]
    table, found = gguf.get_tensor_name_map(arch, depth), dict[str, Any]()
    stated: dict[str, list[float]] = {}
    for name, stored in sorted(load_file(folder / WEIGHTS_NAME).items()):
        if "act_fn" in name:
            stated.setdefault(name.rpartition(".")[2], []).append(float(stored.astype(np.float32).item()))
            continue
        for own, values in case.tensors(name, stored.astype(np.float32), raw):
            before, _, behind = own.partition(".experts.")
            number, _, rest = behind.partition(".")
            if number.isdigit():
                start = before.replace("backbone", "model").replace("mixer", "mlp")
                found.setdefault(gguf_name(f"{start}.experts.{rest}", table), {})[int(number)] = values
            else:
                found[gguf_name(own, table)] = values[0] if own.endswith("shared_expert_gate.weight") else values
    for name, numbers in stated.items():
        writer.add_array(f"xielu.{name}", numbers)
    stacked = {
        name: np.stack([each[at] for at in sorted(each)]) for name, each in found.items() if isinstance(each, dict)
    }
    return found | stacked


def gguf_name(name: str, table: gguf.TensorNameMap) -> str:
    if name.startswith("blk."):
        return name
    name = name.replace("e_score_correction_bias", "e_score_correction.bias")
    for spelled in (name, name.replace("dt_proj.bias", "dt.bias")):
        if (own := table.get_name(spelled, (".weight", ".bias"))) is not None:
            return own
    raise AssertionError(name)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.golden)
def test_equals_the_hf_directory(case: Case, tmp_path: Path):
    folder = folder_of(case, tmp_path / "hf")
    path = written(case, folder, tmp_path / "m.gguf")
    config, expected = read_config(path), read_config(folder)
    assert config == replace(expected, **case.read)
    assert_same_tensors(path, folder)


def assert_same_tensors(path: Path, folder: Path) -> None:
    """Adding one and taking it away rounds, and so do exponential and logarithm."""
    here, there = gguf_source(open_gguf(path), read_config(path), path), open_tensors(folder, read_config(folder))
    assert here.shapes == there.shapes
    for name in there.shapes:
        np.testing.assert_allclose(
            here.read(name), there.read(name).astype(np.float32), rtol=0, atol=2e-6, err_msg=name
        )


def test_factors_of_falcon_h1_are_in_its_weights(tmp_path: Path):
    """The decoder is another one that computes the same. Files with tied embeddings cannot say the output's factor."""
    case = Case("falcon_h1_plain", "falcon-h1", falcon_keys, falcon_tensors)
    head = {"lm_head.weight": load_file(GOLDEN / case.golden / WEIGHTS_NAME)["model.embed_tokens.weight"]}
    folder = folder_of(replace(case, stated={"tie_word_embeddings": False}), tmp_path / "hf", head)
    path = written(case, folder, tmp_path / "m.gguf")
    found, golden = load_pretrained(path), load_file(GOLDEN / case.golden / "expected.safetensors")
    plain = {"multipliers": Multipliers(), "embed_scale": 1.0, "logits_divisor": 1.0}
    assert found.config == replace(read_config(folder), **plain)
    logits = np.asarray(found(jnp.asarray(golden["tokens"])).logits)
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=5e-6 * np.abs(golden["logits"]).max())
    tied = folder_of(case, tmp_path / "tied")
    with pytest.raises(CheckpointError, match="tied embeddings"):
        read_config(written(case, tied, tmp_path / "tied.gguf"))


CASE_OF = {case.golden: case for case in CASES}


def test_older_files_of_latent_attention(tmp_path: Path):
    """Before 2025 `kv_b` was one tensor, and a head's sizes stood under the usual keys."""
    case = replace(CASE_OF["deepseek_v3"], tensors=kept)
    folder = folder_of(case, tmp_path / "hf")
    sizes: dict[str, Any] = {"attention.key_length": 13, "attention.value_length": 7, "attention.head_count_kv": 6}
    sizes |= dict.fromkeys(("attention.key_length_mla", "attention.value_length_mla"))
    path = written(case, folder, tmp_path / "m.gguf", **sizes)
    assert read_config(path) == read_config(folder)
    assert_same_tensors(path, folder)


def test_queries_of_mistral_4_grow_where_a_file_says_so(tmp_path: Path):
    case = CASE_OF["mistral4"]
    path = written(case, folder_of(case, tmp_path / "hf"), tmp_path / "m.gguf", **{"attention.temperature_scale": 0.25})
    assert read_config(path).temperature == TemperatureConfig(0.25, 16.0, first=0, everywhere=True)


def test_layers_of_multi_token_prediction_are_left_out(tmp_path: Path):
    """They are counted among the blocks."""
    case = CASE_OF["deepseek_v3"]
    folder = folder_of(case, tmp_path / "hf")
    extra = {"blk.3.nextn.eh_proj.weight": np.ones((3, 5), np.float32)}
    path = written(case, folder, tmp_path / "m.gguf", extra, block_count=4, nextn_predict_layers=1)
    assert read_config(path) == replace(read_config(folder), mtp_layers=1)
    assert_same_tensors(path, folder)


@pytest.mark.parametrize(
    ("golden", "changes", "named"),
    [
        ("glm4", {"rope.dimension_sections": [8, 12, 12, 0]}, "glm4.rope.dimension_sections"),
        ("deepseek_v3", {"expert_gating_func": 3}, "deepseek2.expert_gating_func"),
        ("deepseek_v3", {"expert_count": None}, "deepseek2.expert_count"),
        ("deepseek_v3", {"attention.key_length_mla": 8}, "deepseek2.attention.key_length_mla"),
        ("deepseek_v3", {"attention.temperature_scale": 0.1}, "deepseek2.attention.temperature_scale"),
        ("nemotron_h", {"ssm.inner_size": 43}, "nemotron_h.ssm.inner_size"),
        ("nemotron_h", {"attention.head_count_kv": [0, 1, 2, 0]}, "nemotron_h.attention.head_count_kv"),
        ("granitemoehybrid", {"ssm.inner_size": 78}, "granitehybrid.ssm.inner_size"),
        ("exaone4", {"rope.dimension_count": 4}, "partial_rotary_factor"),
        ("dots1", {"attention.value_length": 6}, "dots1.attention.value_length"),
        ("glm4", {"expert_gating_func": [1, 2]}, "glm4.expert_gating_func"),
        ("deepseek_v2", {"expert_group_count": "four"}, "deepseek2.expert_group_count"),
        ("nemotron_h", {"feed_forward_length": [20.5, 0.0, 0.0, 0.0]}, "nemotron_h.feed_forward_length"),
        ("gemma4_text", {"attention.head_count_kv": None}, "gemma4.attention.head_count_kv"),
        ("gpt_oss", {"expert_gating_func": 2}, "gpt-oss.expert_gating_func"),
        ("gemma4_text", {"attention.sliding_window_pattern": [True, False]}, "gemma4.attention.sliding_window_pattern"),
        ("gemma4_text", {"attention.head_count_kv": [2, 1, 1, 1]}, "gemma4.attention.head_count_kv"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "gemma3.attn_logit_softcapping"),
        ("mistral4", {"attention.temperature_length": 4}, "mistral4.attention.temperature_length"),
    ],
)
def test_refusals_name_the_key(golden: str, changes: dict[str, Any], named: str, tmp_path: Path):
    case = CASE_OF[golden]
    folder = folder_of(case, tmp_path / "hf")
    with pytest.raises(CheckpointError) as caught:
        read_config(written(case, folder, tmp_path / "m.gguf", **changes))
    assert named in str(caught.value)
    assert "m.gguf" in str(caught.value)
